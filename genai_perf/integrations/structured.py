"""Path in, path out: smaller dense models, without the blocks, neurons, heads that count least."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._checks import fail
from .._errors import CheckpointError
from ..compression import calibration as text
from ..compression import structured
from ..io.writer import carry_over
from . import skeleton


@dataclass(frozen=True)
class Pruned:
    """What `prune_structured` did.

    Attributes:
        blocks: the blocks that were kept.
        parameters_before, parameters_after: of the whole model.
        scores: what each part contributed, before.
    """

    blocks: tuple[int, ...]
    parameters_before: int
    parameters_after: int
    scores: structured.Scores

    def __str__(self) -> str:
        share = self.parameters_after / self.parameters_before
        counts = f"{self.parameters_before:,} -> {self.parameters_after:,} parameters"
        return f"{counts} ({share:.1%}), blocks kept: {', '.join(map(str, self.blocks))}"


@torch.no_grad()
def prune_structured(
    src: str | Path,
    dst: str | Path,
    *,
    calibration: str | Path | Sequence[str] | torch.Tensor,
    blocks: int | None = None,
    neurons: int | None = None,
    kv_heads: int | None = None,
    experts: int | None = None,
    max_seqlen: int = 256,
    n_samples: int = 64,
    seed: int = 0,
) -> Pruned:
    """Writes a smaller dense model that `from_pretrained` loads, its config updated.

    Importance is measured on the calibration: a block's by how little it turns its input, a
    neuron's and a head group's by the energy it adds, an expert's by routing weight times output.
    The model is in memory as a whole. What it loses, a short distillation brings back
    (examples/prune_and_distill.py).

    Args:
        src: dense checkpoint folder.
        dst: folder to create.
        calibration: a text file, texts, or int64 token ids (windows, seqlen).
        blocks: how many decoder blocks to keep.
        neurons: feed-forward neurons to keep in each block.
        kv_heads: key-value heads to keep in each block, each with all its query heads.
        experts: experts to keep in each block, at least as many as a token is routed to.
        max_seqlen, n_samples, seed: of the calibration windows, as in `compress`.

    Raises:
        CheckpointError: src cannot be read, dst exists, a structure that is not known.
        ValueError: more to keep than there is, or nothing.

    Source: Men et al. 2024 (ShortGPT) for blocks, Muralidharan et al. 2024 (Minitron) for widths.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    src, dst = Path(src), Path(dst)
    if dst.exists():
        raise CheckpointError(f"destination {dst} exists: name a folder that does not")
    try:
        model = AutoModelForCausalLM.from_pretrained(src, trust_remote_code=False).eval()
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{src}: {' '.join(str(error).split())[:300]}") from error
    stored = model.config.dtype
    model.float()
    config = model.config
    found = skeleton.find_blocks(model)
    limits = {
        "blocks": (blocks, len(found)),
        "neurons": (neurons, getattr(config, "intermediate_size", None)),
        "kv_heads": (kv_heads, getattr(config, "num_key_value_heads", None)
                     or getattr(config, "num_attention_heads", 0)),
        "experts": (experts, _expert_count(config)[1]),
    }  # fmt: skip
    for name, (wanted, there) in limits.items():
        if wanted is not None and there is not None and not 0 < wanted <= there:
            fail("prune_structured", name, f"from 1 to {there}", wanted)
    if all(wanted is None for wanted, _ in limits.values()):
        raise ValueError(
            "prune_structured: give at least one of blocks, neurons, kv_heads, experts"
        )
    if experts is not None and experts < config.num_experts_per_tok:
        fail("prune_structured", "experts", f"at least {config.num_experts_per_tok}, to which a "
             f"token is routed", experts)  # fmt: skip
    if isinstance(calibration, torch.Tensor):
        windows = calibration
    else:
        if isinstance(calibration, str | Path):
            calibration = text.read_texts(calibration)
        tokenizer = AutoTokenizer.from_pretrained(src, trust_remote_code=False)
        windows = text.windows(
            calibration, lambda one: tokenizer(one, verbose=False).input_ids,
            max_seqlen=max_seqlen, n_samples=n_samples, vocab_size=config.vocab_size, seed=seed,
        )  # fmt: skip
    groups = limits["kv_heads"][1] if kv_heads is not None else 0
    watch = structured.Watch(
        found, neurons=neurons is not None, groups=groups, experts=experts is not None
    )
    for batch in windows.split(8):
        model(input_ids=batch, use_cache=False)
    scores = watch.scores()
    kept = _slice(model, found, scores, blocks, neurons, kv_heads, experts)
    state = kept[1]
    smaller = type(model)(config).eval()
    smaller.load_state_dict(state, strict=True)
    smaller.tie_weights()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    smaller.to(stored).save_pretrained(dst)
    carry_over(src, dst)
    return Pruned(tuple(kept[0]), before, after, scores)


def _expert_count(config) -> tuple[str, int]:
    """The config's name for its number of experts, and the number."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, name, None):
            return name, getattr(config, name)
    return "num_experts", 0


def _slice(model, found, scores, blocks, neurons, kv_heads, experts):
    """(blocks kept, state dict of the smaller model); the model's config is updated."""
    config, state = model.config, dict(model.state_dict())
    for i, (name, block) in enumerate(found):
        if neurons is not None:
            structured.keep_neurons(state, name, structured.best(scores.neurons[i], neurons))
        if kv_heads is not None:
            kept = structured.best(scores.groups[i], kv_heads)
            structured.keep_groups(state, name, kept, len(scores.groups[i]))
        if experts is not None:
            part, _, router = structured.find_experts(name, block)
            kept = structured.best(scores.experts[i], experts)
            structured.keep_experts(state, f"{name}.{router}", f"{name}.{part}", kept)
    if neurons is not None:
        config.intermediate_size = neurons
    if kv_heads is not None:
        heads, groups = config.num_attention_heads, len(scores.groups[0])
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        config.num_attention_heads = heads // groups * kv_heads
        config.num_key_value_heads = kv_heads
    if experts is not None:
        setattr(config, _expert_count(config)[0], experts)
    chosen = list(range(len(found)))
    if blocks is not None:
        chosen = structured.best(torch.tensor(scores.blocks), blocks).tolist()
        state = structured.keep_blocks(state, found[0][0].rpartition(".")[0], chosen)
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in chosen]
    return chosen, state
