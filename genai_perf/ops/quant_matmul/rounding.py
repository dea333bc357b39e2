"""Rows of x as the codes that `activations` multiplies."""

import torch

from ...formats import Spec, get
from ..quantize import dequantize, quantize

GROUP = 128  # columns of fp8 that share a scale, in x and in W


def rounded(x: torch.Tensor, format: str, *,
            groups: bool = False) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(codes (..., K), scale) of x (..., K): scale (..., 1), or with `groups` (..., ceil(K / 128)),
    one for 128 columns. It is NaN where an infinity or NaN is among them."""
    if groups:
        k = x.shape[-1]
        padded = torch.nn.functional.pad(x, (0, -k % GROUP)).unflatten(-1, (-(-k // GROUP), GROUP))
        codes, scale = rounded(padded, format)
        return codes.flatten(-2)[..., :k], scale[..., 0]
    finite = torch.isfinite(x).all(-1, keepdim=True)
    parts = get(format).encode(torch.where(finite, x, 0).float(), Spec())
    return parts["qdata"], torch.where(finite, parts["scale"], torch.nan)


def in_groups(group_size: int) -> bool:
    """Whether fp8 weights with this group_size meet x in groups of 128 columns, or in rows."""
    return group_size in (GROUP, -GROUP)


def fp8_values(x: torch.Tensor, format: str, group_size: int) -> torch.Tensor:
    """What the fp8 codes of x stand for, fp32 (..., K); NaN where x is not finite."""
    finite = torch.isfinite(x)
    granularity = "group" if in_groups(group_size) else "row"
    codes = quantize(torch.where(finite, x, 0), format, granularity=granularity)
    return torch.where(finite, dequantize(codes, torch.float32), torch.nan)
