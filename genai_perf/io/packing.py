"""Bytes as 32-bit words, as the packed dialects store them (little-endian)."""

from collections.abc import Collection

import torch

from .._errors import CheckpointError


def words(row_bytes: torch.Tensor) -> torch.Tensor:
    """uint8 (rows, n) as int32 (rows, ceil(n/4)), a row padded with zeros to whole words."""
    rows, width = row_bytes.shape
    if width % 4:
        row_bytes = torch.nn.functional.pad(row_bytes, (0, -width % 4))
    return row_bytes.reshape(-1).view(torch.int32).view(rows, -1)


def row_bytes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `words`, padding included: int32 (rows, n) as uint8 (rows, 4n)."""
    return words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """The transpose, contiguous, with the strides of a fresh tensor also where a size is 1."""
    rows, columns = matrix.shape
    return matrix.T.contiguous().view(-1).view(columns, rows)


def expect(name: str, tensor: torch.Tensor, dtypes: Collection[torch.dtype],
           shape: tuple[int, ...]) -> None:  # fmt: skip
    """Raises CheckpointError unless the stored tensor has the shape and one of the dtypes."""
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name}: must be {next(iter(dtypes))} {list(shape)}, "
                              f"got {tensor.dtype} {list(tensor.shape)}")  # fmt: skip


def half_scales(name: str, scale: torch.Tensor, method: str) -> torch.Tensor:
    """The scales in fp16 or bf16, without loss."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scale.to(dtype).to(scale.dtype), scale):
            return scale.to(dtype)
    raise CheckpointError(f"{name}: {method} stores scales as fp16 or bf16, these are neither: "
                          f"quantize with scale_dtype=torch.float16")  # fmt: skip
