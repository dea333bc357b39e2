"""2:4: of every 4 consecutive inputs at most 2 are kept, with 2 bits for the place of each."""

import torch

from .._checks import fail
from .base import QuantizedTensor
from .sparse_tensor import SparseTensor, pack_codes, pad, source, unpack_codes


def _nibble(kept: int) -> int:
    """Places of the two stored values, 2 bits each, for the 4 bits that say what is kept; a zero
    is stored where fewer are. 255 where there are more."""
    places = [i for i in range(4) if kept >> i & 1]
    if len(places) > 2:
        return 255
    spare = [i for i in range(4) if i not in places]
    low, high = sorted(places + spare[: 2 - len(places)])
    return low | high << 2


_NIBBLES = tuple(_nibble(kept) for kept in range(16))


def pack(weight: torch.Tensor | QuantizedTensor) -> SparseTensor:
    """A pruned weight without its zeros.

    values: 4 for every 8 columns, in the order of the columns. index: for group g of a row, the
    places p0 < p1 of its two values as p0 + 4 p1, in the low nibble of byte g / 2 where g is even,
    else in the high one. A last group shorter than 4, and a last byte, are filled with zeros.

    Args:
        weight: (N, K), fp32, bf16 or fp16; or an int8 or symmetric int4 QuantizedTensor.

    Raises:
        ValueError: a group with more than 2 nonzeros (named), NaN or infinity.
    """
    codes, nibbles, dtype, parts = source("sparse24.pack", weight)
    shape = codes.shape
    groups = pad(codes).unflatten(1, (-1, 4))
    bits = ((groups != 0) << torch.arange(4, device=codes.device)).sum(2)
    places = torch.tensor(_NIBBLES, dtype=torch.uint8, device=codes.device)[bits]
    if (places == 255).any():
        row, group = (places == 255).nonzero()[0].tolist()
        fail("sparse24.pack", "weight", "zero in 2 of every 4 columns",
             f"{int(bits[row, group]).bit_count()} nonzeros at row {row}, columns "
             f"{4 * group} to {4 * group + 3}")  # fmt: skip
    at = torch.stack([places & 3, places >> 2], dim=2).long()
    values = pack_codes(groups.gather(2, at).flatten(1).contiguous(), nibbles)
    index = places[:, ::2] | places[:, 1::2] << 4
    return SparseTensor("2:4", shape, dtype, values, index, **parts)


def take(tensor: SparseTensor, dense: torch.Tensor) -> torch.Tensor:
    """The elements of dense, (N, K), at the places of the stored values, in their shape."""
    return pad(dense).unflatten(1, (-1, 4)).gather(2, _at(tensor)).flatten(1)


def _at(tensor: SparseTensor) -> torch.Tensor:
    index = torch.stack([tensor.index & 15, tensor.index >> 4], dim=2).flatten(1)
    return torch.stack([index & 3, index >> 2], dim=2).long()


def expand(tensor: SparseTensor) -> torch.Tensor:
    """(N, K): values, or codes, at their places."""
    n, k = tensor.shape
    codes = unpack_codes(tensor)
    at = _at(tensor)
    out = codes.new_zeros(n, at.shape[1], 4)
    return out.scatter_(2, at, codes.unflatten(1, (-1, 2))).flatten(1)[:, :k]
