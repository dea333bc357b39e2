"""GPTQ: rounding to a grid, each column's error made good in the columns to its right."""

from dataclasses import dataclass

import torch

from .._checks import check_choice, fail
from ..formats import QuantizedTensor
from ..formats.base import FLOATS
from ..ops.quantize.grid import GroupGrid, IntGrid, Tables
from .hessian import Factor, factorize, swept_error
from .sparsegpt import check_weight
from .sweep import sweep


@dataclass(frozen=True)
class QuantizedResult:
    """What a quantizer returns.

    Attributes:
        qweight: the packed weight.
        weight: (out_features, in_features), what qweight dequantizes to.
        error: || (W - weight) X ||^2 / || W X ||^2 over the calibration inputs.
    """

    qweight: QuantizedTensor
    weight: torch.Tensor
    error: float


class _Permuted:
    """A fitted grid seen by a sweep that visits columns in another order."""

    def __init__(self, grid: GroupGrid, order: torch.Tensor):
        self._grid, self._order, self.refit = grid, order, 1

    def enter(self, column: int, upcoming: torch.Tensor) -> None:
        pass

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        return self._grid.round(values, int(self._order[column]))

    def tables(self) -> Tables | None:
        tables = self._grid.tables()
        return tables and tables._replace(groups=tables.groups[self._order.cpu()])


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    scales: str = "static",
    search: bool = True,
    act_order: bool = False,
    damp_frac: float = 0.01,
    block_size: int = 128,
    scale_dtype: torch.dtype | None = None,
    mask: torch.Tensor | None = None,
    factor: Factor | None = None,
    grid: GroupGrid | None = None,
    name: str = "gptq.solve",
) -> QuantizedResult:
    """Quantizes one layer to integers with group scales, minimising the error of its outputs.

    Sweeps over the inputs with U^T U = H^-1: column j is rounded, and its error over U[j, j],
    times row j of U, is subtracted from the columns to its right.

    Args:
        weight: (out_features, in_features), any float dtype; not changed.
        hessian: (in_features, in_features), sum of x x^T over calibration inputs, at any scale.
            The maths runs in its dtype, at least fp32.
        bits: 2, 3, 4, or 8 with group_size -1 and symmetric.
        group_size: inputs that share a scale, -1 for the whole row.
        symmetric: no zero point.
        scales: "static", fitted to the dense weights; "sweep", fitted to each group's updated
            weights when the sweep arrives there (needs group_size <= block_size).
        search: choose scales for the least expected output error, not to cover the extremes.
        act_order: visit columns by falling diag(H), with static scales, so that the stored order of
            columns does not change and no index is needed.
        damp_frac: added to H's diagonal, as a fraction of its mean.
        block_size: columns between two full updates of the weights.
        scale_dtype: what scales are stored in (fp32 if None).
        mask: (out_features, in_features) bool, False where a weight is pruned: it becomes 0, and
            that error is compensated with the others.
        factor: `hessian.factorize(hessian, damp_frac=..., by_diagonal=act_order)`, to share it
            between layers with the same input.
        grid: what to round to, such as `float_grid.Nf4Grid`, in place of the integers that bits,
            group_size, symmetric, search and scale_dtype describe.
        name: the layer, for messages.

    Dead inputs (zero in all calibration) cost nothing and are rounded as they are.

    Raises:
        CalibrationError: the Hessian is empty or singular; names the layer and the damping.
        ValueError: a wrong shape, a weight that is NaN or infinite, settings that clash.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", section 3.3.
    """
    check_weight(name, weight, hessian)
    check_choice(name, "scales", scales, ("static", "sweep"))
    if block_size < 1:
        fail(name, "block_size", "positive", block_size)
    refit = scales == "sweep"
    if refit and act_order:
        raise ValueError(f"{name}: act_order needs scales='static', got 'sweep'")
    if refit and not 0 < group_size <= block_size:
        fail(
            name,
            "group_size",
            f"from 1 to block_size ({block_size}) with scales='sweep'",
            group_size,
        )
    if refit:
        block_size -= block_size % group_size
    grid = grid or IntGrid(bits=bits, group_size=group_size, symmetric=symmetric,
                           scale_dtype=scale_dtype, search=search, refit=refit)  # fmt: skip
    factor = factor or factorize(hessian, damp_frac=damp_frac, by_diagonal=act_order, name=name)
    if (factor.order is not None) != act_order:
        fail(name, "factor", f"made with by_diagonal={act_order}", f"{not act_order}")
    root, order = factor.root, factor.order
    dense = weight.detach().to(root.dtype, copy=order is None)  # the sweep writes to it
    zero = None
    if mask is not None:
        if mask.shape != weight.shape:
            fail(name, "mask", f"of the weight's shape {tuple(weight.shape)}", tuple(mask.shape))
        zero = ~mask
    importance = root.diagonal() ** 2
    if order is None:
        grid.fit(dense, importance)
        new, _, cost = sweep(dense, root, block_size=block_size, zero=zero, grid=grid,
                             overwrite=True)  # fmt: skip
    else:
        back = order.argsort()
        grid.fit(dense, importance[back])
        visited = None if zero is None else zero[:, order]
        dense = dense[:, order]
        new, _, cost = sweep(dense, root, block_size=block_size, zero=visited,
                             grid=_Permuted(grid, order), overwrite=True)  # fmt: skip
        del dense
        new = new[:, back]
    dtype = weight.dtype if weight.dtype in FLOATS else torch.float32
    qweight = grid.pack(new, dtype)
    error = swept_error(weight, new, hessian, factor, cost)
    del new
    return QuantizedResult(qweight, stands_for(qweight), error)


def stands_for(qweight: QuantizedTensor) -> torch.Tensor:
    """What a weight dequantizes to, some rows at a time where it can be: the codec's temporaries
    are several times the weight in fp32."""
    if not qweight.by_rows:
        return qweight.dequantize()
    out = torch.empty(qweight.shape, dtype=qweight.dtype, device=qweight.device)
    for start in range(0, len(out), 512):
        out[start : start + 512] = qweight.rows(start, start + 512).dequantize()
    return out
