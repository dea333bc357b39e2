"""fp8: e4m3fn (to 448 or 240), e5m2 and e3m4; fp32 scales for the tensor, a row, 128 elements of a
row or a 128x128 block."""

from functools import cache

import torch

from .._checks import check_choice
from .base import SCALE_FLOOR, Format, Layout, QuantizedTensor, Spec, ceil_div

BLOCK = 128
# QuantizedTensor.group_size says the granularity.
GROUP_SIZES = {"tensor": 0, "row": -1, "block": BLOCK, "group": -BLOCK}


class Fp8(Format):
    """qdata fp8 (..., K); scale fp32 multiplies: x = qdata * scale, scale = absmax / fmax.

    granularity "tensor": scale (1, ..., 1), group_size 0; "row": (..., 1), group_size -1;
    "block": (..., ceil(N/128), ceil(K/128)), group_size 128; "group", 128 elements of a row:
    (..., ceil(K/128)), group_size -128. The cast rounds half to even and
    saturates at +-fmax (448 for e4m3fn, 57344 for e5m2, 240 for fp8_240, 15.5 for
    e3m4, whose codes are bytes: torch has no such dtype); with allow_nonfinite the
    scale is that of the finite elements, infinities saturate and NaN stays NaN.
    Source: FP8 Formats for Deep Learning, arXiv:2209.05433, section 3.
    """

    options = ("granularity", "group_size", "allow_nonfinite")

    def __init__(self, name: str, code_dtype: torch.dtype, largest: float | None = None):
        self.name, self.code_dtype = name, code_dtype
        self.max = torch.finfo(code_dtype).max if largest is None else largest

    def _resolve(self, *, granularity: str | None = None, group_size: int | None = None,
                allow_nonfinite: bool = False) -> Spec:  # fmt: skip
        if group_size is None:
            check_choice("quantize", "granularity", granularity or "row", GROUP_SIZES)
            group_size = GROUP_SIZES[granularity or "row"]
        allowed = GROUP_SIZES.values() if granularity is None else (GROUP_SIZES[granularity],)
        check_choice("quantize", "group_size", group_size, tuple(allowed))
        return Spec(group_size, allow_nonfinite=allow_nonfinite)

    def _scale_shape(self, shape: tuple[int, ...], group_size: int) -> tuple[int, ...]:
        if group_size == 0:
            return (1,) * len(shape)
        if group_size == -1:
            return (*shape[:-1], 1)
        if group_size == -BLOCK:
            return (*shape[:-1], ceil_div(shape[-1], BLOCK))
        rows = (ceil_div(shape[-2], BLOCK),) if len(shape) > 1 else ()
        return (*shape[:-2], *rows, ceil_div(shape[-1], BLOCK))

    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        check_choice("quantize", "group_size", spec.group_size, tuple(GROUP_SIZES.values()))
        return {
            "qdata": (tuple(shape), self.code_dtype),
            "scale": (self._scale_shape(shape, spec.group_size), torch.float32),
        }

    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        absmax = self._absmax(x, spec)
        scale = (absmax / self.max).clamp(min=SCALE_FLOOR)
        q = (x / _spread(scale, x.shape, spec.group_size)).clamp(-self.max, self.max)
        return {"qdata": self._cast(q), "scale": scale}

    def _cast(self, q: torch.Tensor) -> torch.Tensor:
        return q.to(self.code_dtype)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def _absmax(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        magnitude = x.abs()
        if spec.allow_nonfinite:
            magnitude = torch.where(torch.isfinite(x), magnitude, 0.0)
        shape = self._scale_shape(x.shape, spec.group_size)
        if x.numel() == 0:
            return x.new_zeros(shape)
        if spec.group_size == 0:
            return magnitude.amax().reshape(shape)
        if spec.group_size == -1:
            return magnitude.amax(-1, keepdim=True)
        if spec.group_size == -BLOCK:
            padded = torch.nn.functional.pad(magnitude, (0, -x.shape[-1] % BLOCK))
            return padded.unflatten(-1, (-1, BLOCK)).amax(-1)
        magnitude = magnitude if x.dim() > 1 else magnitude[None]
        n, k = magnitude.shape[-2:]
        padded = torch.nn.functional.pad(magnitude, (0, -k % BLOCK, 0, -n % BLOCK))
        blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
        return blocks.amax((-3, -1)).reshape(shape)

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        return self._values(qt.qdata) * _spread(qt.scale, qt.shape, qt.group_size)


def _spread(scale: torch.Tensor, shape: tuple[int, ...], group_size: int) -> torch.Tensor:
    """Scales as something that broadcasts against a tensor of `shape`."""
    if group_size not in (BLOCK, -BLOCK):
        return scale
    scale = scale.repeat_interleave(BLOCK, -1)[..., : shape[-1]]
    if group_size == -BLOCK or len(shape) == 1:
        return scale
    return scale.repeat_interleave(BLOCK, -2)[..., : shape[-2], :]


class E3M4(Fp8):
    """Sign, three bits of exponent, four of mantissa, with infinities, as AWS Neuron has it."""

    def __init__(self):
        super().__init__("fp8_e3m4", torch.uint8, 15.5)

    def _cast(self, q: torch.Tensor) -> torch.Tensor:
        # Steps of 2^-6 below 1/4, then of a sixteenth of the power below: one formula counts both.
        exponent = torch.frexp(q.abs().clamp(min=0.25)).exponent - 1
        steps = (q.abs() * torch.exp2(4.0 - exponent)).round()
        code = ((exponent + 2) * 16 + steps).nan_to_num(nan=0x78).to(torch.uint8)
        return code | (torch.signbit(q).to(torch.uint8) << 7)

    def _values(self, codes: torch.Tensor) -> torch.Tensor:
        return e3m4_values().to(codes.device)[codes.long()]


@cache
def e3m4_values() -> torch.Tensor:
    """What each of the 256 codes of e3m4 stands for, fp32."""
    code = torch.arange(128)
    exponent, mantissa = code // 16, code % 16
    values = torch.where(exponent == 0, mantissa / 64, (16 + mantissa) * 2.0 ** (exponent - 7))
    values[112:] = torch.nan
    values[112] = torch.inf
    return torch.cat([values, -values])


FP8 = Fp8("fp8", torch.float8_e4m3fn)
FP8_E5M2 = Fp8("fp8_e5m2", torch.float8_e5m2)
# e4m3 as AWS trn1 and trn2 have it, without the codes above 240.
FP8_240 = Fp8("fp8_240", torch.float8_e4m3fn, 240.0)
FP8_E3M4 = E3M4()
quantize, dequantize = FP8.quantize, FP8.dequantize
