"""The components of a sparse weight as kernels take them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..._checks import fail

OP = "sparse_matmul"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 1 << 21  # weights decoded at once: 8 MB


class Weight(NamedTuple):
    """Contiguous components that fit each other.

    tensors: values, index, row_start (bitmask) and scale (codes).
    sizes: bytes of the index a row, scales a row, columns that share one.
    """

    tensors: tuple[torch.Tensor | None, ...]
    sizes: tuple[int, int, int]


def checked(n, k, values, index, row_start, scale, group_size) -> Weight:
    """Kernels trust their pointers: components that do not fit a weight (n, k) stop here. On an
    accelerator the number of values of a bitmask is taken on trust, because reading it would wait
    for the device.

    Raises:
        ValueError: names the component.
    """
    units = -(-k // 8)
    if values.dtype not in (*FLOATS, torch.int8, torch.uint8):
        fail(OP, "values", "fp32, bf16, fp16, int8 or uint8", values.dtype)
    if index.dtype != torch.uint8 or index.numel() != n * units:
        fail(OP, "index", f"{n * units} of torch.uint8 for shape {(n, k)}",
             f"{index.numel()} of {index.dtype}")  # fmt: skip
    count = 4 * units * n
    if row_start is not None:
        if row_start.dtype != torch.int64 or row_start.numel() != n + 1:
            fail(OP, "row_start", f"{n + 1} of torch.int64",
                 f"{row_start.numel()} of {row_start.dtype}")  # fmt: skip
        count = int(row_start[-1]) if row_start.is_cpu else None
    stored = values.numel() * (2 if values.dtype == torch.uint8 else 1)
    if count is not None and stored != count:
        fail(OP, "values", f"as many as the index says ({count})", stored)
    if group_size != -1 and (group_size < 8 or group_size % 8):
        fail(OP, "group_size", "-1 or a multiple of 8", group_size)
    groups = -(-k // group_size) if group_size > 0 else 1
    floats = values.dtype in FLOATS
    if (scale is None) != floats or (scale is not None and scale.numel() != n * groups):
        got = None if scale is None else scale.numel()
        fail(OP, "scale", f"{n * groups} for codes, None for floats", got)
    if scale is not None and scale.dtype not in FLOATS:
        fail(OP, "scale", "fp32, bf16 or fp16", scale.dtype)
    held = tuple(None if t is None else t.contiguous() for t in (values, index, row_start, scale))
    return Weight(held, (units, groups, group_size if group_size > 0 else max(8, 8 * units)))


def panels(n: int, k: int) -> Iterator[tuple[int, int]]:
    """(first row, end) of parts of W that are decoded at once."""
    step = max(1, PANEL // max(1, k))
    for start in range(0, n, step):
        yield start, min(start + step, n)
