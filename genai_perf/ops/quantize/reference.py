"""The oracle: the codecs of genai_perf.formats, wherever torch runs."""

import torch

from ... import formats
from ...formats import Spec
from ...formats.base import check_finite, from_parts
from . import grid


def why_not_quantize(*args) -> str | None:
    return None


def quantize(x: torch.Tensor, format: str, *spec) -> list[torch.Tensor]:
    spec = Spec(*spec)
    if not spec.allow_nonfinite:
        check_finite(x)
    return list(formats.get(format).encode(x.float(), spec).values())


why_not_searched = why_not_quantize


def searched(x, importance, *rest) -> list[torch.Tensor]:
    check_finite(x)
    return grid.searched(x, importance, *rest, grid.PlainIntGrid)


def why_not_dequantize(*args) -> str | None:
    return None


def dequantize(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
               dtype) -> torch.Tensor:  # fmt: skip
    qt = from_parts(qdata, scale, zero_point, nested_scale, scale_offset, format, group_size, shape,
                   dtype)  # fmt: skip
    return formats.get(format).dequantize(qt)
