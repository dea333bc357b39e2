"""The dynamic map: 256 values, dense near zero, and their exact nearest codes.

Signed it lies in [-0.99, 1], unsigned in [0, 1] and twice as fine.
Source: 8-Bit Approximations for Parallelism in Deep Learning, arXiv:1511.04561, section 2.1.
"""

import math
from functools import cache

import torch

from .base import ceil_div

# No block is divided by less, so that zeros give no NaN; bitsandbytes' floor.
ABSMAX_FLOOR = 1e-38


@cache
def dynamic_map(signed: bool = True) -> torch.Tensor:
    """The 256 values in rising order, fp32: for each decade 10^-6 ... 10^0 the centres of 1, 2, 4,
    ..., 64 equal parts of [0.1, 1] (unsigned: twice as many), of both signs; and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float32)
        centres = (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += centres + ([-c for c in centres] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def map_on(device: torch.device) -> torch.Tensor:
    """The signed map on `device`, copied there once: a kernel's launch waits for no copy."""
    return dynamic_map().to(device)


@cache
def dynamic_bounds(signed: bool = True) -> torch.Tensor:
    """The 255 fp32 midpoints between neighbours; a value on one takes the lower code."""
    values = dynamic_map(signed)
    return (values[:-1] + values[1:]) / 2.0


def encode_blocks(
    x: torch.Tensor, block: int, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes (uint8) of the flat fp32 `x`, and the absmax of each `block` elements."""
    blocks = ceil_div(x.numel(), block)
    padded = torch.nn.functional.pad(x, (0, blocks * block - x.numel())).view(blocks, block)
    absmax = padded.abs().amax(1)
    t = (padded * (1.0 / absmax.clamp(min=ABSMAX_FLOOR))[:, None]).clamp(-1, 1)
    codes = torch.bucketize(t, dynamic_bounds(signed).to(x.device))
    return codes.to(torch.uint8).view(-1)[: x.numel()], absmax


def decode_blocks(
    codes: torch.Tensor, absmax: torch.Tensor, block: int, signed: bool = True
) -> torch.Tensor:
    values = dynamic_map(signed).to(codes.device)[codes.long()]
    return values * absmax.repeat_interleave(block)[: codes.numel()]


@cache
def bin_starts(signed: bool = True) -> torch.Tensor:
    """For each bin of csrc/cpu/quantize.h, the code of its smallest element: uint8 (3072,).

    A bin is the sign, the exponent from 2^-23 up (smaller ones share it) and six bits of mantissa,
    or no sign and seven: narrower than any step of the map, so it holds at most one bound.
    """
    bits = 6 if signed else 7
    steps = torch.arange((24 << bits) + 1, dtype=torch.int32) + (104 << bits)
    edges = (steps << (23 - bits)).view(torch.float32)
    edges[0] = 0.0
    bounds = dynamic_bounds(signed)
    above = torch.bucketize(edges[:-1], bounds)
    if not signed:
        return above.to(torch.uint8)
    # Mirrored: the smallest element is next to the outer edge, which belongs to the next bin.
    below = torch.bucketize(-edges[1:], bounds, right=True)
    return torch.cat([above, below]).to(torch.uint8)


@cache
def kernel_tables(signed: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """value, bound and start of csrc/cpu/quantize.h DynamicMap."""
    bounds = torch.cat([dynamic_bounds(signed), torch.tensor([math.inf], dtype=torch.float32)])
    return dynamic_map(signed), bounds, torch.nn.functional.pad(bin_starts(signed), (0, 3))
