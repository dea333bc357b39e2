"""Hadamard rotations folded into weights: outliers are spread over all channels, nothing is added
to what a server runs.

R1 turns the residual stream: embeddings and every layer that writes to the stream give x Q, every
layer that reads it takes x Q, and normalizations, whose gains go into their readers, do not see a
rotation. R2 turns the values of every attention head, which the output projection takes back.
Source: Ashkboos et al. 2024, "QuaRot", section 4; Liu et al. 2024, "SpinQuant", section 3.
"""

from collections.abc import Iterator

import torch
from torch import nn

from .._errors import CheckpointError
from .experts import Expert
from .structure import Probe, check_same, gain_offset, is_rms_norm, norms, run

_ROTATION = "rotation"  # in messages


class Rotation:
    """x -> x Q for vectors of `size`: random signs, then a Hadamard transform of the largest power
    of two in size, times a random rotation of what is left of it.

    Args:
        size: length of the last dimension.
        seed: of the signs and the small rotation; the same gives the same Q everywhere.
    """

    def __init__(self, size: int, *, seed: int):
        self.size, self._power = size, size & -size
        generator = torch.Generator().manual_seed(seed)
        self._signs = torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1
        rest = size // self._power
        square = torch.randn(rest, rest, generator=generator, dtype=torch.float64)
        self._small = torch.linalg.qr(square)[0].float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x Q for x (..., size), in fp32; a new tensor."""
        work = x.float() * self._signs.to(x.device)
        return _mixed(work, self._power, self._small.to(x.device))

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """x Q^T, the inverse: Hadamard matrices are their own."""
        work = _mixed(x.float().clone(), self._power, self._small.T.to(x.device))
        return work * self._signs.to(x.device)

    def rows(self, matrix: torch.Tensor) -> torch.Tensor:
        """Q^T M for M (size, columns)."""
        return self(matrix.T).T


def _mixed(x: torch.Tensor, power: int, small: torch.Tensor) -> torch.Tensor:
    """x, written over, times a Hadamard matrix of `power` (x) a small rotation."""
    shape, step = x.shape, 1
    work = x.reshape(-1, power, len(small))
    while step < power:
        pairs = work.view(-1, power // (2 * step), 2, step, len(small))
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        total = first + second
        torch.sub(first, second, out=second)
        first.copy_(total)
        step *= 2
    work = work * power**-0.5
    return (work @ small if len(small) > 1 else work * small[0, 0].sign()).reshape(shape)


class BlockRotation:
    """Rotates a model block after block.

    Args:
        model: a `BlockModel`.
        seed: of the rotations.
        heads: whether to rotate values and output projections too (R2).

    Raises:
        CheckpointError: the model's normalizations are not RMSNorm, it has stacked experts, or no
            one final norm before its head.
    """

    def __init__(self, model, *, seed: int, heads: bool):
        self._model, self._heads, config = model, heads, model.model.config.get_text_config()
        self.stream = Rotation(config.hidden_size, seed=seed)
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        self._value = Rotation(head_dim, seed=seed + 1)
        self._embedding, self._head = _ends(model.model)
        inside = tuple(f"{prefix}." for prefix, _ in model.blocks)
        final = {name: module for name, module in model.model.named_modules()
                 if not name.startswith(inside)
                 and (is_rms_norm(module) or isinstance(module, nn.LayerNorm))}  # fmt: skip
        if len(final) != 1 or not is_rms_norm(*final.values()):
            kinds = ", ".join(f"{name} ({type(m).__name__})" for name, m in final.items())
            raise CheckpointError(f"{_ROTATION} needs one RMSNorm outside the blocks, before the "
                                  f"head, found {kinds or 'none'}")  # fmt: skip
        self._final = next(iter(final))

    def check_embedding(self, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        """Refuses a model whose first block is not given a multiple of its embedding."""
        name = self._embedding
        rows = self._model.checkpoint_tensor(name)[ids].to(hidden)
        factor = (hidden * rows).sum() / rows.square().sum()
        check_same(name, _ROTATION, hidden, rows * factor)

    def block(self, i: int, probe: Probe) -> tuple[str, ...]:
        """Rotates block i, which is loaded; returns what could not be rotated, as notes."""
        model, (prefix, _) = self._model, self._model.blocks[i]
        linears = model.linears(i)
        if any(isinstance(layer, Expert) for layer in linears.values()):
            raise CheckpointError(f"{prefix}: {_ROTATION} does not know stacked experts")
        before = self.stream(run(model, i, probe))
        found = norms(model, i, probe)
        if not found or not all(is_rms_norm(norm.module) for norm in found):
            raise CheckpointError(f"{prefix}: {_ROTATION} needs blocks that begin with RMSNorm")
        reading = {name for norm in found for name in norm.readers}
        for norm in found:
            for layer in norm.readers.values():
                model.set_weight(layer, self.stream(model.get_weight(layer) * norm.gain))
            norm.set_gain(torch.ones_like(norm.gain))
        for name, layer in linears.items():
            weight = model.get_weight(layer)
            if name not in reading and len(weight) == self.stream.size:
                model.set_weight(layer, self.stream.rows(weight))
                _set_bias(layer, self.stream)
        notes = self._rotate_values(linears, prefix) if self._heads else ()
        after = run(model, i, probe, self.stream(probe.hidden).to(probe.hidden.dtype))
        check_same(prefix, _ROTATION, before, after)
        return notes

    def _rotate_values(self, linears: dict, prefix: str) -> tuple[str, ...]:
        model, named = self._model, {name.rpartition(".")[2]: m for name, m in linears.items()}
        value, output = named.get("v_proj"), named.get("o_proj")
        size = self._value.size
        if value is None or output is None or len(model.get_weight(value)) % size:
            return (f"{prefix}: values are not rotated: no v_proj and o_proj with whole heads",)
        weight = model.get_weight(value)
        heads = weight.unflatten(0, (-1, size)).transpose(1, 2)  # (heads, inputs, head size)
        model.set_weight(value, self._value(heads).transpose(1, 2).flatten(0, 1))
        _set_bias(value, lambda bias: self._value(bias.view(-1, size)).flatten())
        weight = model.get_weight(output).unflatten(1, (-1, size))
        model.set_weight(output, self._value(weight).flatten(1))
        return ()

    def outside(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator:
        """The model's tensors outside its blocks, rotated; a tied head becomes one of its own."""
        tensors = dict(tensors)  # mapped, not read
        names = {"embedding": self._embedding, "head": self._head, "norm": f"{self._final}.weight"}
        norm = self._model.model.get_submodule(self._final)
        stored = tensors[names["norm"]]
        offset = gain_offset(norm)
        gain = stored.float() + offset
        for name, tensor in tensors.items():
            if name == names["norm"]:
                tensor = torch.full_like(stored, 1 - offset)
            elif name in (names["embedding"], names["head"]):
                head = name == names["head"] and name != names["embedding"]
                yield name, self._by_rows(tensor, gain if head else None)
                continue
            yield name, tensor
        if names["head"] not in tensors:
            yield names["head"], self._by_rows(tensors[names["embedding"]], gain)

    def _by_rows(self, matrix: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """The rows of an embedding or a head rotated, a few at a time."""
        out = torch.empty_like(matrix)
        for start in range(0, len(matrix), 4096):
            part = matrix[start : start + 4096].float()
            out[start : start + 4096] = self.stream(part if gain is None else part * gain)
        return out


def _ends(model: nn.Module) -> tuple[str, str]:
    """Full names of the embedding's and the head's weights."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise CheckpointError(f"{_ROTATION} needs a language model with a head without bias")
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def _set_bias(layer: nn.Module, rotate) -> None:
    if layer.bias is not None:
        value = rotate(layer.bias.detach()).to(layer.bias.dtype)
        layer.bias = nn.Parameter(value, requires_grad=False)
