"""Bitmask: any zeros at all, one bit a weight for where they are, and the kept values in order."""

import torch

from .base import QuantizedTensor
from .sparse_tensor import UNIT, SparseTensor, pack_codes, pad, row_starts, source, unpack_codes


def pack(weight: torch.Tensor | QuantizedTensor) -> SparseTensor:
    """A pruned weight without its zeros.

    values: the nonzeros, row after row; each row of 4-bit codes begins with a byte. index: bit i of
    byte j of a row is set where column 8 j + i is kept.

    Args:
        weight: (N, K), fp32, bf16 or fp16; or an int8 or symmetric int4 QuantizedTensor.

    Raises:
        ValueError: another kind of weight, NaN or infinity.
    """
    codes, nibbles, dtype, parts = source("sparse.pack", weight)
    nonzero = codes != 0
    bits = pad(nonzero).unflatten(1, (-1, UNIT)) << torch.arange(UNIT, device=codes.device)
    index = bits.sum(2).to(torch.uint8)
    start = row_starts(index, nibbles)
    values = codes[nonzero]
    if nibbles:
        even = values.new_zeros(int(start[-1]))
        even[_places(nonzero, start)] = values
        values = pack_codes(even, nibbles)
    return SparseTensor("bitmask", codes.shape, dtype, values, index, row_start=start, **parts)


def _places(where: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Where in the flat values each kept weight stands, in row-major order."""
    rank = where.cumsum(1) - 1
    return (rank + start[:-1, None])[where]


def kept(tensor: SparseTensor) -> torch.Tensor:
    """(N, K) bool: where a value is stored."""
    shifts = torch.arange(UNIT, dtype=torch.uint8, device=tensor.device)
    bits = (tensor.index[:, :, None] >> shifts & 1) != 0
    return bits.flatten(1)[:, : tensor.shape[1]]


def take(tensor: SparseTensor, dense: torch.Tensor) -> torch.Tensor:
    """The elements of dense, (N, K), at the places of the stored values, in their order."""
    return dense[kept(tensor)]


def expand(tensor: SparseTensor) -> torch.Tensor:
    """(N, K): values, or codes, at their places."""
    where, codes = kept(tensor), unpack_codes(tensor)
    out = codes.new_zeros(tensor.shape)
    places = _places(where, tensor.row_start) if tensor.bits == 4 else slice(None)
    out[where] = codes[places]
    return out
