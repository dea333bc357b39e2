"""One wording for every ValueError: `op: argument must be <expected>, got <got>`."""

import math
from collections.abc import Collection

import numpy as np
import torch

_FLAGS = (bool, np.bool_, torch.SymBool)
FAR = 1 << 62  # beyond every length: kernels take 64-bit integers


def fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def check_tensor(op: str, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_ndim(op: str, ndim: int, layout: str, **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if value.dim() != ndim:
            fail(op, name, f"{layout} ({ndim} dimensions)", f"shape {tuple(value.shape)}")


def check_dtype(op: str, allowed: Collection[torch.dtype], **tensors: torch.Tensor) -> None:
    for name, value in tensors.items():
        if value.dtype not in allowed:
            fail(op, name, "one of " + ", ".join(map(str, allowed)), value.dtype)


def check_same(op: str, what: str, **tensors: torch.Tensor) -> None:
    """All tensors agree in attribute `what` (`dtype`, `device`) with the first one."""
    items = list(tensors.items())
    first_name, first = items[0]
    for name, value in items[1:]:
        if getattr(value, what) != getattr(first, what):
            fail(op, name, f"of the {what} of {first_name} ({getattr(first, what)})",
                 getattr(value, what))  # fmt: skip


def check_choice(op: str, argument: str, value: object, choices: Collection) -> None:
    if value not in choices:
        fail(op, argument, "one of " + ", ".join(map(repr, choices)), repr(value))


def check_flags(op: str, **flags: bool) -> None:
    """Of numbers and words, which would count as true, each is refused."""
    for name, value in flags.items():
        if not isinstance(value, _FLAGS):
            fail(op, name, "True or False", repr(value))


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            fail(op, name, "positive", value)


def number(op: str, argument: str, value: object) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not -math.inf < found < math.inf:
        fail(op, argument, "a finite number", repr(value))
    return found


def scale_of_scores(op: str, softmax_scale: float | None, headdim: int) -> float:
    return (
        1 / math.sqrt(headdim)
        if softmax_scale is None
        else number(op, "softmax_scale", softmax_scale)
    )


def check_softcap(op: str, value: object) -> float:
    found = number(op, "softcap", value)
    if found < 0:
        fail(op, "softcap", "0 (none) or positive and finite", value)
    return found


def check_window(op: str, window_size) -> tuple[int, int]:
    """(left, right) with None made -1."""
    if window_size == (None, None):
        return -1, -1
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        fail(op, "window_size", "a pair (left, right)", repr(window_size))
    for side in window_size:
        if side is not None and (not isinstance(side, int) or side < 0):
            fail(op, "window_size", "(left, right), each None or an int >= 0", repr(window_size))
    left, right = (-1 if side is None else side for side in window_size)
    return left, right


def heads_fit(q, k, v, dtypes: Collection[torch.dtype]) -> bool:
    """Whether q (batch, seqlen_q, nheads, headdim), k (rows, seqlen_k, nheads_k, headdim) and v
    (rows, seqlen_k, nheads_k, headdim_v) belong together: 2 us where the checks that name what is
    wrong take 7."""
    tensor = torch.Tensor
    if not (isinstance(q, tensor) and isinstance(k, tensor) and isinstance(v, tensor)):
        return False
    if not (q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype):
        return False
    (*_, heads, dim), (*rows_k, heads_k, dim_k), (*like_k, dim_v) = q.shape, k.shape, v.shape
    return (
        dim == dim_k
        and like_k == [*rows_k, heads_k]
        and dim > 0 < dim_v
        and heads_k > 0
        and heads % heads_k == 0
        and q.dtype in dtypes
        and q.device == k.device == v.device
    )
