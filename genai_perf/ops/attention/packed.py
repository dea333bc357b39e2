"""Packed sequences: where each lies in (total, nheads, headdim) tensors."""

import torch

from ..._checks import fail


def bounds(cu_seqlens: torch.Tensor, total: int, longest: int, side: str) -> list[int]:
    """The values of cu_seqlens_<side>, checked against the `total` rows that it cuts and against
    max_seqlen_<side>, `longest`.

    Waits for the device where it is not the CPU: only backends that need the values call it.
    """
    name, values = f"cu_seqlens_{side}", cu_seqlens.tolist()
    if values[0] != 0 or values[-1] > total:
        fail("attention", name, f"from 0 to at most {total} (the rows of its tensor)",
             f"{values[0]} to {values[-1]}")  # fmt: skip
    pairs = list(enumerate(zip(values, values[1:], strict=False)))
    for i, (a, b) in pairs:
        if b < a:
            fail("attention", name, "non-decreasing", f"{a}, {b} at positions {i}, {i + 1}")
    for i, (a, b) in pairs:
        if b - a > longest:
            fail("attention", f"max_seqlen_{side}", f"at least {b - a} (sequence {i})", longest)
    return values
