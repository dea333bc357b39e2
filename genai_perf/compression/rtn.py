"""RTN: round to nearest in any of the formats, no calibration. The baseline of quantizers."""

from dataclasses import replace

import torch

from .. import formats
from ..formats import IntGroups, QuantizedTensor, int4
from ..formats.base import FLOATS
from ..ops.quantize.grid import GroupGrid
from .gptq import QuantizedResult, stands_for
from .hessian import relative_error
from .sparsegpt import check_weight


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None = None,
    *,
    format: str,
    group_size: int | None = None,
    symmetric: bool = True,
    double_quant: bool = False,
    granularity: str | None = None,
    scale_dtype: torch.dtype | None = None,
    allow_nonfinite: bool = False,
    grid: GroupGrid | None = None,
    importance: torch.Tensor | None = None,
    name: str = "rtn.solve",
) -> QuantizedResult:
    """Rounds a weight to a format, keeping its zeros.

    Args:
        weight: (out_features, in_features); not changed.
        hessian: (in_features, in_features), for the result's error alone; None: that of the weight.
        format: a name of `genai_perf.formats.FORMATS`.
        group_size, symmetric, double_quant, granularity, allow_nonfinite: as in
            `genai_perf.quantize`.
        scale_dtype: what scales are rounded to before codes are computed, so that a loader that
            keeps them in it reads the same weight; nf4, whose scales stay fp32, ignores it.
        grid: fitted to the weight and rounded to, in place of what the options above describe.
        importance: (in_features,), what a squared error in each column costs a grid; None: 1.
        name: the layer, for messages.
    """
    check_weight(name, weight, hessian, allow_nonfinite)
    if grid is not None:
        dense = weight.detach().float()
        grid.fit(dense, dense.new_ones(dense.shape[1]) if importance is None else importance)
        qweight = grid.pack(dense, weight.dtype if weight.dtype in FLOATS else torch.float32)
        new = stands_for(qweight)
        return QuantizedResult(qweight, new, relative_error(weight, new, hessian))
    chosen = formats.get(format)
    qweight = chosen.quantize(
        weight,
        group_size=group_size,
        symmetric=symmetric,
        double_quant=double_quant,
        granularity=granularity,
        scale_dtype=scale_dtype if isinstance(chosen, IntGroups) else None,
        allow_nonfinite=allow_nonfinite,
    )
    if format in ("int8", "fp8", "fp8_e5m2") and scale_dtype not in (None, torch.float32):
        qweight = _round_scales(weight, qweight, scale_dtype)
    new = stands_for(qweight)
    return QuantizedResult(qweight, new, relative_error(weight, new, hessian))


def _round_scales(weight: torch.Tensor, qweight: QuantizedTensor, dtype: torch.dtype):
    """The weight in qweight's format with scales, still fp32, that `dtype` holds exactly."""
    qweight = replace(qweight, scale=int4.round_scale(qweight.scale, dtype).float())
    ones = torch.ones(qweight.shape, device=weight.device).to(qweight.qdata.dtype)
    codes = weight.float() / replace(qweight, qdata=ones).dequantize(torch.float32)
    if qweight.format == "int8":
        codes = codes.round().clamp(-127, 127)
    else:
        largest = torch.finfo(qweight.qdata.dtype).max
        codes = codes.clamp(-largest, largest)
    return replace(qweight, qdata=codes.to(qweight.qdata.dtype))
