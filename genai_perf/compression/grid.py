"""Integer grids with a scale, and where asked a zero point, for each group of input columns."""

import torch

from .._checks import check_choice, fail
from ..formats import QuantizedTensor, int4

# Candidate scales of the search, as fractions of the one that just covers the extremes.
_SHRINKS = tuple(1.0 - 0.0125 * i for i in range(33))  # 1.0 to 0.6


class IntGrid:
    """Points (code - zero_point) * scale for codes of `bits` bits; 0 is always one of them.

    Args:
        bits: 4, or 8 (symmetric, whole rows): the layouts that `formats` has.
        group_size: columns that share a scale, -1 for the whole row; the last may be shorter.
        symmetric: codes around 0 with no zero point.
        scale_dtype: what scales are rounded to before codes are computed.
        search: choose each scale among 0.6 to 1.0 of the one that covers the group, for the least
            importance-weighted squared error; else the covering one.
        refit: fit each group when a sweep arrives at it, on weights that carry the updates so far.
    """

    def __init__(
        self,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        scale_dtype: torch.dtype | None = None,
        search: bool = True,
        refit: bool = False,
    ):
        check_choice("IntGrid", "bits", bits, (4, 8))
        if bits == 8 and (group_size != -1 or not symmetric):
            got = f"{group_size}, {symmetric}"
            fail("IntGrid", "group_size, symmetric", "-1, True at 8 bits", got)
        int4.INT4.spec(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        self.search, self._refits, self.refit = search, refit, 1
        self._low = -(1 << bits - 1) + (bits == 8)  # int8 leaves -128 out
        self._high = (1 << bits - 1) - 1
        self._steps = self._high - self._low
        self._scale_dtype = scale_dtype or torch.float32

    def fit(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Sets the grid for weight, (rows, columns).

        Args:
            importance: (columns,), what a squared error in each column costs.
        """
        rows, self.columns = weight.shape
        self.width = self.columns if self.group_size == -1 else min(self.group_size, self.columns)
        self.refit = self.width if self._refits else 1
        self._importance = importance
        groups = -(-self.columns // self.width)
        # One contiguous row per group: the sweep reads a group's scales for all rows at once.
        self._scale = weight.new_zeros(groups, rows)
        self._zero = weight.new_zeros(groups, rows)
        if not self._refits:
            for group, part in enumerate(weight.split(self.width, dim=1)):
                self._fit(group, part.T)

    def _fit(self, group: int, part: torch.Tensor) -> None:
        """Scales of one group from its weights, part: (group columns, rows)."""
        high = part.amax(0).clamp_(min=0)
        low = part.amin(0).clamp_(max=0)
        shrinks, weights = (1.0,), None
        if self.search:
            first = group * self.width
            shrinks, weights = _SHRINKS, self._importance[first : first + len(part), None]
        best = torch.full_like(high, torch.inf)
        for shrink in shrinks:
            scale, zero = self._candidate(high * shrink, low * shrink)
            if weights is None:
                self._scale[group], self._zero[group] = scale, zero
                return
            points = self._nearest(part, scale, zero)
            cost = points.sub_(part).square_().mul_(weights).sum(0)
            better = cost < best
            best = torch.where(better, cost, best)
            self._scale[group] = torch.where(better, scale, self._scale[group])
            self._zero[group] = torch.where(better, zero, self._zero[group])

    def _candidate(self, high, low) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and signed zero point that cover low..high, a range that holds 0."""
        spread = 2 * torch.maximum(high, -low) if self.symmetric else high - low
        scale = int4.round_scale(spread / self._steps, self._scale_dtype).to(high.dtype)
        if self.symmetric:
            return scale, torch.zeros_like(scale)
        return scale, (self._low - low / scale).clamp_(self._low, self._high).round_()

    def _nearest(
        self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        return self._codes(values, scale, zero).sub_(zero).mul_(scale)

    def _codes(self, values, scale, zero) -> torch.Tensor:
        return (values / scale).round_().add_(zero).clamp_(self._low, self._high)

    def enter(self, column: int, upcoming: torch.Tensor) -> None:
        if self._refits and column % self.width == 0:
            self._fit(column // self.width, upcoming[: self.width])

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        group = column // self.width
        return self._nearest(values, self._scale[group], self._zero[group])

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """The codes of weight, (rows, columns), all of whose values are on the grid.

        Args:
            dtype: what the packed tensor dequantizes to by default.
        """
        columns = weight.shape[1]
        per_weight = (t.T.repeat_interleave(self.width, 1) for t in (self._scale, self._zero))
        codes = self._codes(weight, *(t[:, :columns] for t in per_weight))
        scale = self._scale.T.contiguous()
        if self.bits == 8:  # whose scales are fp32, here with values that scale_dtype holds
            return QuantizedTensor("int8", weight.shape, dtype, codes.to(torch.int8), scale.float())
        parts = {"scale": scale.to(self._scale_dtype)}
        if not self.symmetric:
            parts["zero_point"] = (self._zero.T - self._low).to(torch.uint8).contiguous()
        qdata = int4.pack((codes - self._low).to(torch.uint8))
        parts["group_size"] = self.group_size
        return QuantizedTensor("int4", weight.shape, dtype, qdata, **parts)
