"""int4, int3 and int2: groups along a row, symmetric or asymmetric, as compressed-tensors'
pack-quantized."""

import torch

from .._checks import check_choice, fail
from .base import FLOATS, SCALE_FLOOR, Format, Layout, QuantizedTensor, Spec, ceil_div


class IntGroups(Format):
    """qdata uint8 (..., ceil(b*K/8)): unsigned codes u of b bits, each row one little-endian bit
    stream: element i has bits b*i to b*i + b - 1. int4's element 2i is the low nibble of byte i;
    int3's eight elements take three bytes, two of them across a byte's end.

    group_size elements of a row share a scale (128; -1: the row; a last group may be shorter).
    For int4 (h = 2^(b-1) in place of 8 in general), symmetric: u = q + 8,
    q = clamp(round_half_even(x / scale), -8, 7), scale = absmax / 7.5, dequantized (u - 8) * scale.
    Asymmetric: scale = (max - min) / (2^b - 1) over a range that holds 0,
    zero_point uint8 (..., K/g) = round(-min / scale), dequantized (u - zero_point) * scale.
    scale (..., ceil(K/g)) is rounded to scale_dtype before the codes are computed.
    Source: compressed-tensors, min-max round-to-nearest.
    """

    options = ("group_size", "symmetric", "scale_dtype")
    default_group_size = 128

    def __init__(self, bits: int):
        self.name, self.bits = f"int{bits}", bits
        self.half = 1 << bits - 1

    def _resolve(self, *, group_size: int | None = None, symmetric: bool = True,
                scale_dtype: torch.dtype = torch.float32) -> Spec:  # fmt: skip
        check_choice("quantize", "scale_dtype", scale_dtype, FLOATS)
        group_size = self.default_group_size if group_size is None else group_size
        _check_group_size(group_size)
        return Spec(group_size, False, symmetric, scale_dtype)

    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        _check_group_size(spec.group_size)
        *lead, k = shape
        scales = (*lead, group_count(k, spec.group_size))
        layout = {
            "qdata": ((*lead, ceil_div(k * self.bits, 8)), torch.uint8),
            "scale": (scales, spec.scale_dtype),
        }
        if not spec.symmetric:
            layout["zero_point"] = (scales, torch.uint8)
        return layout

    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        k = x.shape[-1]
        g = spec.group_size if spec.group_size > 0 else max(k, 1)
        groups = group_count(k, spec.group_size)
        # Zeros after the last element leave absmax alone, and a range that holds 0.
        x = torch.nn.functional.pad(x, (0, groups * g - k)).unflatten(-1, (groups, g))
        scale, zero = self._parameters(x, spec)
        low, high = -self.half, self.half - 1
        if zero is None:
            q = (x / scale.float()[..., None]).round().clamp(low, high)
        else:
            q = (x / scale.float()[..., None] + zero[..., None]).clamp(low, high).round()
        u = (q + self.half).to(torch.uint8).flatten(-2)[..., :k]
        components = {"qdata": pack(u, self.bits), "scale": scale}
        return (
            components if zero is None else components | {"zero_point": (zero + self.half).byte()}
        )

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        k = qt.shape[-1]
        g = qt.group_size if qt.group_size > 0 else max(k, 1)
        zero = torch.tensor(float(self.half), device=qt.device)
        if qt.zero_point is not None:
            zero = qt.zero_point.float().repeat_interleave(g, -1)[..., :k]
        scale = qt.scale.float().repeat_interleave(g, -1)[..., :k]
        return (unpack(qt.qdata, k, self.bits).float() - zero) * scale

    def _parameters(self, x: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale in `spec.scale_dtype`, and signed zero point as fp32, over the last axis."""
        if x.shape[-1] == 0 or x.numel() == 0:
            low = high = x.new_zeros(x.shape[:-1])
        else:
            low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
        return covering(low, high, -self.half, self.half - 1, symmetric=spec.symmetric,
                        scale_dtype=spec.scale_dtype)  # fmt: skip


def covering(low: torch.Tensor, high: torch.Tensor, first: int, last: int, *, symmetric: bool,
             scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The grid of signed codes first..last that covers low..high, ranges that hold 0: the scale in
    `scale_dtype`, and unless symmetric the signed zero point in the dtype of `low`."""
    steps = float(last - first)
    if symmetric:
        return round_scale(torch.maximum(-low, high) / (steps / 2), scale_dtype), None
    scale = (high - low) / steps
    # The range of values near the largest float overflows; its steps do not.
    scale = torch.where(torch.isinf(scale), high / steps - low / steps, scale)
    scale = round_scale(scale, scale_dtype)
    return scale, (first - low / scale.to(low.dtype)).clamp(first, last).round()


def round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` in `dtype`, at least the smallest number by which fp32 can divide safely."""
    # fp16 keeps its subnormals: weights below 4.6e-4 have such scales.
    floor = 2.0**-24 if dtype is torch.float16 else SCALE_FLOOR
    rounded = scale.clamp(min=floor).to(dtype)
    if dtype is torch.float16 and torch.isinf(rounded).any():
        fail("quantize", "scale_dtype", "wide enough for the scales of x",
             f"{dtype} for a scale of {scale.max().item():g}")  # fmt: skip
    return rounded


def pack(u: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Codes of `bits` bits, uint8 (..., K), as one little-endian bit stream a row, uint8
    (..., ceil(bits*K/8))."""
    k = u.shape[-1]
    if bits == 4:
        u = torch.nn.functional.pad(u, (0, k % 2))
        return u[..., ::2] | (u[..., 1::2] << 4)
    eight = torch.nn.functional.pad(u, (0, -k % 8)).unflatten(-1, (-1, 8)).int()
    shifts = bits * torch.arange(8, dtype=torch.int32, device=u.device)
    words = (eight << shifts).sum(-1, dtype=torch.int32)
    parts = (words[..., None] >> 8 * torch.arange(bits, device=u.device)) & 255
    return parts.to(torch.uint8).flatten(-2)[..., : ceil_div(bits * k, 8)]


def unpack(packed: torch.Tensor, k: int, bits: int = 4) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes (..., k)."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :k]
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    words = (whole.int() << 8 * torch.arange(bits, device=packed.device)).sum(-1)
    codes = (words[..., None] >> bits * torch.arange(8, device=packed.device)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :k]


def group_count(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else ceil_div(k, group_size)


def _check_group_size(group_size: int) -> None:
    if group_size != -1 and (group_size <= 0 or group_size % 8):
        fail("quantize", "group_size", "-1 (a whole row) or a positive multiple of 8", group_size)


INT4, INT3, INT2 = IntGroups(4), IntGroups(3), IntGroups(2)
quantize, dequantize = INT4.quantize, INT4.dequantize
