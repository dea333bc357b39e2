"""RTN: round to nearest in any of the formats, no calibration. The baseline of quantizers."""

import torch

from .. import formats
from .gptq import QuantizedResult
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
    name: str = "rtn.solve",
) -> QuantizedResult:
    """Rounds a weight to a format, keeping its zeros.

    Args:
        weight: (out_features, in_features); not changed.
        hessian: (in_features, in_features), for the result's error alone; None: that of the weight.
        format: a name of `genai_perf.formats.FORMATS`.
        group_size, symmetric, double_quant, granularity, scale_dtype: as in `genai_perf.quantize`.
        name: the layer, for messages.
    """
    check_weight(name, weight, hessian)
    qweight = formats.get(format).quantize(
        weight, group_size=group_size, symmetric=symmetric, double_quant=double_quant,
        granularity=granularity, scale_dtype=scale_dtype)  # fmt: skip
    new = qweight.dequantize()
    return QuantizedResult(qweight, new, relative_error(weight, new, hessian))
