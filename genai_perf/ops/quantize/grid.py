"""Grids that weights are rounded to: a scale, and where asked a zero point, for each group of input
columns of a row, covering the group or searched for. `quantize(search=True)` rounds to them, and so
does everything in `genai_perf.compression` that quantizes."""

from typing import NamedTuple

import torch

from ..._backends import native
from ..._checks import check_choice, fail
from ...formats import QuantizedTensor, Spec, get, int4

# Candidate scales of the search, as fractions of the one that just covers the extremes.
_SHRINKS = tuple(1.0 - 0.0125 * i for i in range(33))  # 1.0 to 0.6
_WIDER = tuple(1.0 - 0.02 * i for i in range(38))  # 1.0 to 0.26, for 2 and 3 bits

# Rows packed at once: packing takes four times their size in fp32.
_ROWS = 512


class Tables(NamedTuple):
    """An integer grid as the native sweep reads it.

    scale, zero: (groups, rows) fp32; groups: (columns,) int64, the group of each column; low, high:
    the codes.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    groups: torch.Tensor
    low: float
    high: float


class GroupGrid:
    """What all grids do: scales of groups, fitted once or when a sweep arrives at a group.

    Args:
        group_size: columns that share a scale, -1 for the whole row; the last may be shorter.
        search: choose each scale among 0.6 (0.26 at 2 and 3 bits) to 1.0 of the one that covers the
            group, for the least importance-weighted squared error; else the covering one.
        refit: fit each group when a sweep arrives at it, on weights that carry the updates so far.
    """

    _shrinks = _SHRINKS

    def __init__(self, *, group_size: int, search: bool, refit: bool = False):
        self.group_size, self.search, self._refits, self.refit = group_size, search, refit, 1

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
        if not self.search:
            self._scale[group], self._zero[group] = self._candidates(high, low)
            return
        shrinks = torch.tensor(self._shrinks, dtype=part.dtype, device=part.device)[:, None]
        scale, zero = self._candidates(high * shrinks, low * shrinks)  # (candidates, rows)
        first = group * self.width
        importance = self._importance[first : first + len(part)]
        best = self._cheapest(part, importance, scale, zero)[None]
        self._scale[group] = scale.gather(0, best)[0]
        self._zero[group] = zero.gather(0, best)[0]

    def _candidates(self, high, low) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and signed zero point that cover low..high, a range that holds 0."""
        raise NotImplementedError

    def _nearest(
        self, values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
    ) -> torch.Tensor:
        """The grid points nearest to values, (..., rows)."""
        raise NotImplementedError

    def _cheapest(self, part, importance, scale, zero) -> torch.Tensor:
        """(rows,) int64: which candidate costs the least, the first of equal ones."""
        costs = [(self._nearest(part, *one) - part).square_().mul_(importance[:, None]).sum(0)
                 for one in zip(scale, zero, strict=True)]  # fmt: skip
        return torch.stack(costs).argmin(0)

    def enter(self, column: int, upcoming: torch.Tensor) -> None:
        if self._refits and column % self.width == 0:
            self._fit(column // self.width, upcoming[: self.width])

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        group = column // self.width
        return self._nearest(values, self._scale[group], self._zero[group])

    def tables(self) -> Tables | None:
        """What a sweep needs to round natively; None where it has to ask `round`."""
        return None

    def _spread(self, groups: torch.Tensor) -> torch.Tensor:
        """(groups, rows) as (rows, columns)."""
        return groups.T.repeat_interleave(self.width, 1)[:, : self.columns]

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """The codes nearest to weight, (rows, columns).

        Args:
            dtype: what the packed tensor dequantizes to by default.
        """
        raise NotImplementedError


class IntGrid(GroupGrid):
    """Points (code - zero_point) * scale for codes of `bits` bits; 0 is always one of them.

    Args:
        bits: 2, 3, 4, or 8 (symmetric, whole rows): the layouts that `formats` has.
        group_size, search, refit: as in `GroupGrid`.
        symmetric: codes around 0 with no zero point.
        scale_dtype: what scales are rounded to before codes are computed.
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
        super().__init__(group_size=group_size, search=search, refit=refit)
        check_choice("IntGrid", "bits", bits, (2, 3, 4, 8))
        if bits == 8 and (group_size != -1 or not symmetric):
            got = f"{group_size}, {symmetric}"
            fail("IntGrid", "group_size, symmetric", "-1, True at 8 bits", got)
        int4.INT4.spec(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
        self.bits, self.symmetric = bits, symmetric
        self._shrinks = _SHRINKS if bits >= 4 else _WIDER
        self._low = -(1 << bits - 1) + (bits == 8)  # int8 leaves -128 out
        self._high = (1 << bits - 1) - 1
        self._scale_dtype = scale_dtype or torch.float32

    def _candidates(self, high, low) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero = int4.covering(low, high, self._low, self._high, symmetric=self.symmetric,
                                    scale_dtype=self._scale_dtype)  # fmt: skip
        scale = scale.to(high.dtype)
        return scale, torch.zeros_like(scale) if zero is None else zero

    def _nearest(self, values, scale, zero) -> torch.Tensor:
        return self._codes(values, scale, zero).sub_(zero).mul_(scale)

    def _codes(self, values, scale, zero) -> torch.Tensor:
        return (values / scale).round_().add_(zero).clamp_(self._low, self._high)

    def _cheapest(self, part, importance, scale, zero) -> torch.Tensor:
        if part.dtype != torch.float32 or native.why_not(part) is not None:
            return super()._cheapest(part, importance, scale, zero)
        columns, rows = part.shape
        best = torch.empty(rows, dtype=torch.int64)
        tensors = [t.contiguous() for t in (part, importance, scale, zero)]
        native.lib().grid_search(
            columns, rows, len(scale), *(t.data_ptr() for t in tensors), self._low, self._high,
            best.data_ptr(), native.threads(),
        )  # fmt: skip
        return best

    def tables(self) -> Tables | None:
        if self._refits:
            return None
        groups = torch.arange(self.columns) // self.width
        return Tables(self._scale, self._zero, groups, self._low, self._high)

    def pack(self, weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        rows = []
        for start in range(0, max(1, len(weight)), _ROWS):
            here = slice(start, start + _ROWS)
            scale, zero = (self._spread(t[:, here]) for t in (self._scale, self._zero))
            codes = self._codes(weight[here], scale, zero)
            rows.append(codes.to(torch.int8) if self.bits == 8
                        else int4.pack((codes - self._low).to(torch.uint8), self.bits))  # fmt: skip
        qdata, scale = torch.cat(rows), self._scale.T.contiguous()
        if self.bits == 8:  # whose scales are fp32, here with values that scale_dtype holds
            return QuantizedTensor("int8", weight.shape, dtype, qdata, scale.float())
        parts = {"scale": scale.to(self._scale_dtype)}
        if not self.symmetric:
            parts["zero_point"] = (self._zero.T - self._low).to(torch.uint8).contiguous()
        parts["group_size"] = self.group_size
        return QuantizedTensor(f"int{self.bits}", weight.shape, dtype, qdata, **parts)


class PlainIntGrid(IntGrid):
    """The same without the native search."""

    _cheapest = GroupGrid._cheapest


def searched(x: torch.Tensor, importance: torch.Tensor | None, format: str, group_size: int,
             symmetric: bool, scale_dtype: torch.dtype,
             kind: type[IntGrid] = IntGrid) -> list[torch.Tensor]:  # fmt: skip
    """The components of x (..., K), on a searched grid of `kind`."""
    if x.numel() == 0:
        spec = Spec(group_size, False, symmetric, scale_dtype)
        return list(get(format).encode(x.float(), spec).values())
    rows = x.float().reshape(-1, x.shape[-1])
    grid = kind(bits=get(format).bits, group_size=group_size, symmetric=symmetric,
                scale_dtype=scale_dtype)  # fmt: skip
    grid.fit(rows, rows.new_ones(rows.shape[1]) if importance is None else importance.float())
    parts = grid.pack(rows, torch.float32).components()
    return [part.view(*x.shape[:-1], part.shape[1]) for part in parts.values()]
