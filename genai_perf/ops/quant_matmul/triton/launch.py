"""Running the kernels: outputs, grids and configurations. Nothing here waits for the device."""

import math
from functools import cache

import torch

from ...._backends import triton as toolchain
from ....formats import FORMATS as CODECS
from ....formats import NF4, CodeBook
from ....formats.dynamic_map import dynamic_map
from ..components import check_components, scale_places
from . import FORMATS, configs
from .kernels import (
    _quant_gemm_dx_kernel,
    _quant_gemm_kernel,
    _quant_gemv_kernel,
    _quant_merge_kernel,
)


@cache
def _table(book: CodeBook, device: torch.device) -> torch.Tensor:
    """The code book and the dynamic map, as `weights` reads them."""
    return torch.cat([book.book(device), dynamic_map().to(device)])


def _low_bit(number: int) -> int:
    return number & -number


class Weight:
    """A quantized (n, k) weight as the kernels take it.

    Args:
        format, group_size: as the operator takes them.
        weight: qdata, scale, zero_point, nested_scale, scale_offset.
    """

    def __init__(self, format: str, n: int, k: int, weight: tuple, group_size: int):
        check_components(format, n, k, weight, group_size)
        qdata, scale, zero, nested, offset = (None if t is None else t.contiguous() for t in weight)
        if qdata.is_floating_point():
            qdata = qdata.view(torch.uint8)
        self.n, self.k, self.format, self.nested, self.zeros = n, k, format, nested, zero
        self.flat = isinstance(CODECS[format], CodeBook)
        book = CODECS[format] if self.flat else NF4
        self.numbers = scale_places(format, n, k, group_size)
        self.group = self.numbers[-1]
        self.pointers = (qdata, scale, zero, nested, offset, _table(book, qdata.device))

    def layout(self, block_k: int) -> dict[str, object]:
        """The constexprs that `weights.Layout` names, for tiles of block_k columns."""
        whole = not self.flat and self.group >= self.k
        shared = math.gcd(self.k, self.group) if self.flat else self.group
        return {
            "FORMAT": FORMATS[self.format],
            "PAIRS": not self.flat or self.k % 2 == 0,
            "RUN": block_k if whole else min(_low_bit(shared), block_k),
            "NESTED": self.nested is not None,
            "ZEROS": self.zeros is not None,
        }


def forward(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    n, k = weight.n, weight.k
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel() == 0:
        return y
    if k == 0:  # an empty sum
        return y.zero_() if bias is None else y.copy_(bias)
    x = x.reshape(-1, k).contiguous()
    bias = None if bias is None else bias.contiguous()
    m, device, arch = x.shape[0], x.device, toolchain.arch(x.device)
    if m <= configs.FEW_ROWS:
        config = configs.choose("gemv", x, weight.format, n, k)
        splits = configs.splits(device, n, k, config)
        parts = x.new_empty(splits, m, n, dtype=torch.float32)
        toolchain.launch(
            _quant_gemv_kernel, -(-n // config["BLOCK_N"]) * splits * m, device, x,
            *weight.pointers, parts, x.stride(0), m, n, k, splits, *weight.numbers,
            **weight.layout(config["BLOCK_K"]), **config,
        )  # fmt: skip
        toolchain.launch(
            _quant_merge_kernel, -(-n // configs.MERGE["BLOCK"]) * m, device, parts, bias, y, m, n,
            splits, BIAS=bias is not None, **configs.MERGE,
        )  # fmt: skip
        return y
    config = configs.choose("gemm", x, weight.format, n, k)
    toolchain.launch(
        _quant_gemm_kernel, -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"]), device, x,
        *weight.pointers, bias, y, x.stride(0), m, n, k, *weight.numbers, BIAS=bias is not None,
        PRECISION=configs.precision(arch, x.dtype), **weight.layout(config["BLOCK_K"]), **config,
    )  # fmt: skip
    return y


def backward(dy: torch.Tensor, weight: Weight) -> torch.Tensor:
    n, k = weight.n, weight.k
    dx = dy.new_empty(*dy.shape[:-1], k)
    if dx.numel() == 0:
        return dx
    if n == 0:
        return dx.zero_()
    dy = dy.reshape(-1, n).contiguous()
    m, arch = dy.shape[0], toolchain.arch(dy.device)
    config = configs.choose("dx", dy, weight.format, n, k)
    toolchain.launch(
        _quant_gemm_dx_kernel, -(-m // config["BLOCK_M"]) * -(-k // config["BLOCK_K"]), dy.device,
        dy, *weight.pointers, dx, dy.stride(0), m, n, k, *weight.numbers,
        PRECISION=configs.precision(arch, dy.dtype), **weight.layout(config["BLOCK_K"]), **config,
    )  # fmt: skip
    return dx
