"""nf4: 4-bit codes of the normal code book, blocks of 64, optional double quantization."""

import math

import torch

from .._checks import check_choice
from .base import Format, Layout, QuantizedTensor, Spec, ceil_div
from .dynamic_map import ABSMAX_FLOOR, decode_blocks, encode_blocks

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256

# csrc/common/codebooks.h holds the same numbers; a test compares them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def code_book(device: torch.device | str = "cpu") -> torch.Tensor:
    """The 16 NF4 values, fp32, rising."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


class Nf4(Format):
    """qdata uint8 (ceil(N*K/2),): codes in row-major order, even element in the high nibble.

    scale fp32 (nblocks,) = absmax of `group_size` consecutive elements (64; blocks run across row
    ends); code = number of midpoints of the code book below x * (1 / absmax);
    x = book[code] * scale.
    double_quant: scale uint8 (nblocks,) holds codes of the signed dynamic map, nested_scale fp32
    (ceil(nblocks/256),), scale_offset fp32 () the mean absmax:
    absmax = map[scale] * nested_scale + scale_offset.
    Source: QLoRA, arXiv:2305.14314, section 3; codes and absmax equal bitsandbytes', bit for bit.
    """

    name = "nf4"
    options = ("group_size", "double_quant")

    def _resolve(self, *, group_size: int = 64, double_quant: bool = False) -> Spec:
        check_choice("quantize", "group_size", group_size, BLOCK_SIZES)
        return Spec(group_size, double_quant)

    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        check_choice("quantize", "group_size", spec.group_size, BLOCK_SIZES)
        count = math.prod(shape)
        blocks = ceil_div(count, spec.group_size)
        scale_dtype = torch.uint8 if spec.double_quant else torch.float32
        layout = {
            "qdata": ((ceil_div(count, 2),), torch.uint8),
            "scale": ((blocks,), scale_dtype),
        }
        if spec.double_quant:
            layout["nested_scale"] = ((ceil_div(blocks, NESTED_BLOCK),), torch.float32)
            layout["scale_offset"] = ((), torch.float32)
        return layout

    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        x, block = x.reshape(-1), spec.group_size
        full = x.numel() // block * block
        blocks = x[:full].view(-1, block)
        absmax = blocks.abs().amax(1)
        t = (blocks * (1.0 / absmax.clamp(min=ABSMAX_FLOOR))[:, None]).view(-1)
        if full < x.numel():
            # bitsandbytes' CPU path treats the last partial block its own way: the floor is kept in
            # the scale, and elements are divided by it.
            last = x[full:].abs().amax(0, keepdim=True).clamp(min=ABSMAX_FLOOR)
            absmax, t = torch.cat([absmax, last]), torch.cat([t, x[full:] / last])
        if t.numel() % 2:
            t = torch.nn.functional.pad(t, (0, 1))
        book = code_book(x.device)
        codes = torch.bucketize(t, (book[:-1] + book[1:]) / 2, out_int32=True).to(torch.uint8)
        components = {"qdata": (codes[::2] << 4) | codes[1::2], "scale": absmax}
        return components if not spec.double_quant else components | nest(absmax)

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        codes = torch.stack([qt.qdata >> 4, qt.qdata & 15], 1).view(-1)[: qt.shape.numel()]
        absmax = block_scales(qt).repeat_interleave(qt.group_size)[: codes.numel()]
        return (code_book(qt.device)[codes.long()] * absmax).view(qt.shape)


def nest(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Double quantization of fp32 block scales."""
    offset = mean(absmax)
    codes, nested = encode_blocks(absmax - offset, NESTED_BLOCK)
    return {"scale": codes, "nested_scale": nested, "scale_offset": offset}


def mean(absmax: torch.Tensor) -> torch.Tensor:
    """torch's fp32 mean, as bitsandbytes takes it, except where its sum overflows or is empty."""
    if not absmax.numel():
        return absmax.new_zeros(())
    offset = absmax.mean()
    return offset if torch.isfinite(offset) else absmax.double().mean().float()


def block_scales(qt: QuantizedTensor) -> torch.Tensor:
    """The fp32 scale of each block, (nblocks,), double quantization undone."""
    if qt.nested_scale is None:
        return qt.scale
    scales = decode_blocks(qt.scale, qt.nested_scale, NESTED_BLOCK) + qt.scale_offset
    # A scale rounded up to infinity would make NaN of the zeros of its block.
    return scales.clamp(max=torch.finfo(torch.float32).max)


FORMAT = Nf4()
quantize, dequantize = FORMAT.quantize, FORMAT.dequantize
