"""int8: one symmetric scale a row, as bitsandbytes' vector-wise int8."""

import torch

from .base import Format, Layout, QuantizedTensor, Spec

# Below it 127 / absmax leaves fp32, so the row is first multiplied by 2^64, which is exact.
TINY_ROW = 2.0**-119
LIFT = 2.0**64


class Int8(Format):
    """qdata int8 (..., K), scale fp32 (..., 1) = absmax / 127.

    q = round_half_even(x * ((1 / absmax) * 127)), x = q * scale: the factor is rounded twice, as
    bitsandbytes has it. A row of zeros has scale 0 and codes 0.
    Source: LLM.int8(), arXiv:2208.07339, section 2.1.
    """

    name = "int8"

    def _resolve(self) -> Spec:
        return Spec()

    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        return {
            "qdata": (tuple(shape), torch.int8),
            "scale": ((*shape[:-1], 1), torch.float32),
        }

    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        if x.shape[-1] == 0:
            return {"qdata": x.to(torch.int8), "scale": x.new_zeros((*x.shape[:-1], 1))}
        absmax = x.abs().amax(-1, keepdim=True)
        lift = torch.where(absmax < TINY_ROW, LIFT, 1.0)
        factor = torch.where(absmax > 0, (absmax * lift).reciprocal() * 127.0, 0.0)
        return {"qdata": (x * lift * factor).round().to(torch.int8), "scale": absmax / 127.0}

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        return qt.qdata.float() * qt.scale


INT8 = Int8()
quantize, dequantize = INT8.quantize, INT8.dequantize
