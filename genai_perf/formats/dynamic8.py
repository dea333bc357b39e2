"""dynamic8: 8-bit codes of the signed dynamic map, one scale for each block of elements."""

import math

import torch

from .._checks import check_choice
from .base import Format, Layout, QuantizedTensor, Spec, ceil_div
from .code_book import BLOCK_SIZES
from .dynamic_map import decode_blocks, encode_blocks


class Dynamic8(Format):
    """qdata uint8 of x's shape; scale fp32 (nblocks,) = absmax of `group_size` consecutive elements
    in row-major order (256; blocks run across row ends); x = map[qdata] * scale, the nearest code
    exactly: half the error of int8 and below on values of many magnitudes (optimizer states,
    gradients).
    Source: 8-Bit Optimizers via Block-wise Quantization, arXiv:2110.02861, section 2.
    """

    name = "dynamic8"
    options = ("group_size",)

    def _resolve(self, *, group_size: int = 256) -> Spec:
        check_choice("quantize", "group_size", group_size, BLOCK_SIZES)
        return Spec(group_size)

    def layout(self, shape: tuple[int, ...], spec: Spec) -> Layout:
        check_choice("quantize", "group_size", spec.group_size, BLOCK_SIZES)
        blocks = ceil_div(math.prod(shape), spec.group_size)
        return {"qdata": (tuple(shape), torch.uint8), "scale": ((blocks,), torch.float32)}

    def encode(self, x: torch.Tensor, spec: Spec) -> dict[str, torch.Tensor]:
        codes, absmax = encode_blocks(x.reshape(-1), spec.group_size)
        return {"qdata": codes.view(x.shape), "scale": absmax}

    def decode(self, qt: QuantizedTensor) -> torch.Tensor:
        return decode_blocks(qt.qdata.reshape(-1), qt.scale, qt.group_size).view(qt.shape)


DYNAMIC8 = Dynamic8()
quantize, dequantize = DYNAMIC8.quantize, DYNAMIC8.dequantize
