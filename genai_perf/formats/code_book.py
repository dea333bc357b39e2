"""4-bit codes of a book of 16 values, blocks of 64, optional double quantization: nf4 and fp4."""

import math

import torch

from .._checks import check_choice
from .base import Format, Layout, QuantizedTensor, Spec, ceil_div
from .dynamic_map import ABSMAX_FLOOR, decode_blocks, encode_blocks

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256


class CodeBook(Format):
    """qdata uint8 (ceil(N*K/2),): codes in row-major order, even element in the high nibble.

    scale fp32 (nblocks,) = absmax of `group_size` consecutive elements (64; blocks run across row
    ends); code = that of the value whose place in rising order is the number of midpoints between
    neighbours below x * (1 / absmax); x = book[code] * scale.
    double_quant: scale uint8 (nblocks,) holds codes of the signed dynamic map, nested_scale fp32
    (ceil(nblocks/256),), scale_offset fp32 () the mean absmax:
    absmax = map[scale] * nested_scale + scale_offset.
    Source: QLoRA, arXiv:2305.14314, section 3; codes and absmax equal bitsandbytes', bit for bit.
    """

    options = ("group_size", "double_quant")

    def __init__(self, name: str, values: tuple[float, ...]):
        self.name, self.values = name, values
        self.order = sorted(range(16), key=values.__getitem__)  # code of each place

    def book(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The 16 values by code, fp32."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    def bounds(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The 15 midpoints of neighbours, rising, fp32."""
        rising = self.book(device)[self.order]
        return (rising[:-1] + rising[1:]) / 2

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
        places = torch.bucketize(t, self.bounds(x.device), out_int32=True)
        codes = torch.tensor(self.order, dtype=torch.uint8, device=x.device)[places]
        components = {"qdata": (codes[::2] << 4) | codes[1::2], "scale": absmax}
        return components if not spec.double_quant else components | nest(absmax)

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        codes = torch.stack([qt.qdata >> 4, qt.qdata & 15], 1).view(-1)[: qt.shape.numel()]
        absmax = block_scales(qt).repeat_interleave(qt.group_size)[: codes.numel()]
        return (self.book(qt.device)[codes.long()] * absmax).view(qt.shape)


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
