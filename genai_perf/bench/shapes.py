"""An op's cases in the shapes of a checkpoint: `genaiperf bench run OP --model PATH`.

The benchmark cases with heads, layers and vocabulary taken from config.json and the weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..io.checkpoints import Checkpoint
from .suites import suite

# Embeddings are looked up, not multiplied.
_NOT_LAYERS = ("embed", "wte", "wpe")


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint says: heads, their dimension, (n, k) of its linear layers, vocabulary."""

    heads: int
    heads_k: int
    dim: int
    hidden: int
    vocab: int
    positions: int
    layers: tuple[tuple[int, int], ...]


def shapes(folder: Path) -> Shapes:
    """Read them.

    Raises:
        CheckpointError: no checkpoint.
        ValueError: its config.json lacks a number.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config.get("text_config") or checkpoint.config

    def number(*names: str) -> int:
        for name in names:
            if config.get(name):
                return int(config[name])
        raise ValueError(f"{folder}/config.json must hold {' or '.join(names)}")

    heads, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    infos = [
        checkpoint.info(name)
        for name in checkpoint.names()
        if name.endswith(".weight") and not any(word in name for word in _NOT_LAYERS)
    ]
    layers = dict.fromkeys(tuple(info.shape) for info in infos if len(info.shape) == 2)
    return Shapes(
        heads=heads,
        heads_k=int(config.get("num_key_value_heads") or heads),
        dim=int(config.get("head_dim") or hidden // heads),
        hidden=hidden,
        vocab=number("vocab_size"),
        positions=number("max_position_embeddings", "n_positions"),
        layers=tuple(layers),
    )  # fmt: skip


def cases(op: str, model: Path | None) -> dict[str, object]:
    """The benchmark cases of an op by name, with `model` in its shapes.

    Raises:
        ValueError: the op has no shapes of a model; see `shapes`.
    """
    known = suite(op).cases()
    if model is None:
        return known
    if op not in _CHANGES:
        raise ValueError(f"bench: {op} has no cases in the shapes of a model; those that have: "
                         f"{', '.join(_CHANGES)}")  # fmt: skip
    found, change = shapes(model), _CHANGES[op]
    return {new.name: new for case in known.values() for new in change(case, found)}


def _attention(case, found: Shapes) -> Iterator:
    if case.seqlen_q <= found.positions and "model" not in case.tags:
        yield replace(case, name=case.name.replace(f"_d{case.headdim}", f"_d{found.dim}"),
                      nheads=found.heads, nheads_k=found.heads_k, headdim=found.dim)  # fmt: skip


def _decode(case, found: Shapes) -> Iterator:
    if max(case.lengths) < found.positions and case.rotary_dim in (0, found.dim):
        yield replace(case, nheads=found.heads, nheads_k=found.heads_k, headdim=found.dim)


def _linear(case, found: Shapes) -> Iterator:
    for n, k in found.layers:
        name = case.name.replace(f"{case.n}x{case.k}", f"{n}x{k}")
        yield replace(case, name=name, n=n, k=k)


def _quantize(case, found: Shapes) -> Iterator:
    for n, k in found.layers:
        size = "x".join(map(str, dict.fromkeys(case.shape)))
        yield replace(case, name=case.name.replace(size, f"{n}x{k}"), shape=(n, k))


def _distill(case, found: Shapes) -> Iterator:
    yield replace(case, hidden=found.hidden, vocab=found.vocab)


_CHANGES = {
    "attention": _attention,
    "decode_attention": _decode,
    "quantize": _quantize,
    "quant_matmul": _linear,
    "sparse_matmul": _linear,
    "distill_loss": _distill,
}
