"""Grids whose points are not evenly spaced: fp8 with a scale a row, nf4 with one for 64 inputs."""

import torch

from .._checks import fail
from ..formats import FP8, NF4, QuantizedTensor, code_book, int4
from ..formats.base import SCALE_FLOOR
from ..ops.quantize.grid import GroupGrid


class Fp8Grid(GroupGrid):
    """Values of e4m3fn times a scale for each row.

    Args:
        scale_dtype: what scales are rounded to; they stay fp32.
        search: as in `GroupGrid`.
    """

    def __init__(self, *, scale_dtype: torch.dtype | None = None, search: bool = True):
        super().__init__(group_size=-1, search=search)
        self._scale_dtype = scale_dtype or torch.float32

    def _candidates(self, high, low) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.maximum(high, -low) / FP8.max
        scale = int4.round_scale(scale, self._scale_dtype).to(high.dtype)
        return scale, torch.zeros_like(scale)

    def _nearest(self, values, scale, zero) -> torch.Tensor:
        return _fp8(values / scale).to(values.dtype).mul_(scale)

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        scale = self._scale.T.contiguous()
        return QuantizedTensor("fp8", weight.shape, dtype, _fp8(weight / scale), scale.float())


def _fp8(values: torch.Tensor) -> torch.Tensor:
    return values.float().clamp(-FP8.max, FP8.max).to(FP8.code_dtype)


class Nf4Grid(GroupGrid):
    """Points of the nf4 code book times a scale for each 64 inputs, which must divide the columns.

    Args:
        double_quant: round the scales to their 8 bits as soon as they are fitted.
        search: as in `GroupGrid`.
    """

    def __init__(self, *, double_quant: bool = False, search: bool = True):
        super().__init__(group_size=64, search=search)
        self._double_quant = double_quant

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        if weight.shape[1] % self.group_size:
            fail("Nf4Grid", "weight", f"of a multiple of {self.group_size} columns",
                 f"shape {tuple(weight.shape)}")  # fmt: skip
        self._book = NF4.book(weight.device).to(weight.dtype)
        self._middles = NF4.bounds(weight.device)
        super().fit(weight, importance)
        absmax = self._scale.T.float().flatten()  # blocks in row-major order
        self._parts = {"scale": absmax}
        if self._double_quant:
            self._parts = code_book.nest(absmax)
            none = torch.empty(0, dtype=torch.uint8)
            nested = QuantizedTensor("nf4", weight.shape, torch.float32, none, **self._parts)
            absmax = code_book.block_scales(nested)
        self._scale = absmax.view(len(weight), -1).T.to(weight.dtype).contiguous()

    def _candidates(self, high, low) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.maximum(high, -low).clamp(min=SCALE_FLOOR)
        return scale, torch.zeros_like(scale)

    def _nearest(self, values, scale, zero) -> torch.Tensor:
        return self._book[self._codes(values, scale).long()] * scale

    def _codes(self, values, scale) -> torch.Tensor:
        ratios = (values / scale).float().contiguous()
        return torch.bucketize(ratios, self._middles, out_int32=True)

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        codes = self._codes(weight, self._spread(self._scale)).to(torch.uint8).flatten()
        return QuantizedTensor("nf4", weight.shape, dtype, (codes[::2] << 4) | codes[1::2],
                               group_size=self.group_size, **self._parts)  # fmt: skip
