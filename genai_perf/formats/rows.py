"""Rows of a quantized weight, cut apart and put together without touching a value."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from .base import QuantizedTensor
from .code_book import block_scales


def split(qt: QuantizedTensor, parts: int, *, interleaved: bool = False) -> list[QuantizedTensor]:
    """The weight (N, K) as `parts` weights of N / parts rows each; their bytes are views.

    Args:
        interleaved: the parts' rows take turns in it.

    Raises:
        ValueError: the parts would share a scale, or a byte.
    """
    n, k = qt.shape
    rows = n // parts
    if n % parts or _flat(qt) or (_squares(qt) and (interleaved or rows % 128)):
        raise ValueError(f"{n} rows of {qt.format} in groups of {qt.group_size} cannot be cut into "
                         f"{parts}")  # fmt: skip
    tensors = {name: [t] * parts if len(t) == 1 else
               [t[i::parts] for i in range(parts)] if interleaved else t.chunk(parts)
               for name, t in qt.components().items()}  # fmt: skip
    return [replace(qt, shape=torch.Size((rows, k)), **{name: t[i] for name, t in tensors.items()})
            for i in range(parts)]  # fmt: skip


def join(parts: Sequence[QuantizedTensor], *, interleaved: bool = False) -> QuantizedTensor:
    """The weights, of equal width, below each other. A scale for a whole tensor becomes one a row,
    double-quantized scales become the fp32 numbers that they stand for.

    Args:
        interleaved: they take turns, row by row; weights of one shape.

    Raises:
        ValueError: formats differ, or blocks do not end where a weight does.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(p.format, p.group_size, p.zero_point is None, p.shape[1]) for p in parts}
    whole = first.group_size
    if _flat(first):
        fits = all(p.shape.numel() % whole == 0 for p in parts[:-1])
        parts = [replace(p, scale=block_scales(p), nested_scale=None, scale_offset=None)
                 for p in parts]  # fmt: skip
    elif first.format.startswith("fp8"):
        fits = not _squares(first) or all(p.shape[0] % 128 == 0 for p in parts[:-1])
        if whole == 0:
            parts = [replace(p, scale=p.scale.expand(p.shape[0], 1), group_size=-1) for p in parts]
    else:
        fits = True
    if interleaved:
        fits = not _flat(first) and not _squares(first) and len({p.shape for p in parts}) == 1
    if len(kinds) > 1 or not fits:
        what = ", ".join(f"{p.format} {tuple(p.shape)} in groups of {p.group_size}" for p in parts)
        raise ValueError(f"weights cannot be put below each other: {what}")
    names = parts[0].components()
    shape = torch.Size((sum(p.shape[0] for p in parts), first.shape[1]))
    put = in_turns if interleaved else torch.cat
    return replace(parts[0], shape=shape, **{name: put([getattr(p, name) for p in parts])
                                             for name in names})  # fmt: skip


def in_turns(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors (N, ...) of one shape as one of all their rows: the first of each, then the second
    of each."""
    return torch.stack(list(parts), 1).flatten(0, 1)


def _squares(qt: QuantizedTensor) -> bool:
    """Whether a scale serves 128 rows."""
    return qt.group_size == 128 and qt.format.startswith("fp8")


def _flat(qt: QuantizedTensor) -> bool:
    """Whether the codes are one sequence, in blocks that run across row ends."""
    return qt.scale.dim() == 1
