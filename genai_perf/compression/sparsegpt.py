"""SparseGPT: one-shot pruning that updates the weights it keeps."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .._checks import check_choice, check_ndim, check_tensor, fail
from .._errors import CalibrationError
from . import masks, refinement
from .hessian import Factor, all_finite, check_hessian, damp, factorize, relative_error
from .sweep import Grid, sweep


@dataclass(frozen=True)
class SparseResult:
    """What a pruner returns.

    Attributes:
        weight: (out_features, in_features), updated, zero where pruned, dtype of the input weight.
        mask: the same shape, bool, True where a weight is kept.
        before, hessian: what the pruner was given.
        error: || (W - weight) X ||^2 / || W X ||^2 over the calibration inputs; computed when it is
            first read, which takes as long as the factor of the Hessian.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    before: torch.Tensor = field(repr=False)
    hessian: torch.Tensor | None = field(repr=False)

    @cached_property
    def error(self) -> float:
        return relative_error(self.before, self.weight, self.hessian)


def check_weight(op: str, weight: torch.Tensor, hessian: torch.Tensor | None,
                 allow_nonfinite: bool = False) -> None:  # fmt: skip
    check_tensor(op, weight=weight)
    check_ndim(op, 2, "(out_features, in_features)", weight=weight)
    if hessian is not None and hessian.shape != (weight.shape[1],) * 2:
        columns = weight.shape[1]
        fail(op, "hessian", f"({columns}, {columns}), the weight's in_features",
             f"shape {tuple(hessian.shape)}")  # fmt: skip
    if hessian is not None:
        check_hessian(op, hessian)
    if not allow_nonfinite and not all_finite(weight):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        fail(op, "weight", "finite", f"{weight[row, column].item()} at ({row}, {column})")


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    refine: str | None = "cg",
    search: int = 40,
    damp_frac: float = 0.01,
    block_size: int = 128,
    quantizer: Grid | None = None,
    factor: Factor | None = None,
    name: str = "sparsegpt.solve",
) -> SparseResult:
    """Prunes one layer, moving what is lost into the weights that stay.

    The algorithm as published (refine=None) sweeps over the inputs with U^T U = H^-1: a pruned
    weight w_j costs w_j^2 / U[j, j]^2 and its error w_j / U[j, j] is subtracted, times row j of U,
    from the weights to its right. Refinement then takes what the sweep leaves on the table. Weights
    that are zero already stay zero and count; dead inputs (zero in all calibration) are pruned.

    Args:
        weight: (out_features, in_features), any float dtype; not changed.
        hessian: (in_features, in_features), sum of x x^T over calibration inputs, at any scale.
            The maths runs in its dtype, at least fp32.
        sparsity: fraction of zeros in every block of block_size columns, over all rows together:
            exactly round(rows * columns * sparsity).
        pattern: instead, "n:m" is exactly n zeros in every m consecutive inputs of each row; a last
            group of r < m has floor(n * r / m).
        refine: "cg" re-solves the kept weights by conjugate gradients, near to exact least squares
            on the result's mask; None is the algorithm as published.
        search: with refine, rounds of a search for a better mask before that, each about the price
            of a product of weight and Hessian; 0 keeps the mask of the sweep.
        damp_frac: added to H's diagonal, as a fraction of its mean.
        block_size: columns pruned together; rounded down to a multiple of m.
        quantizer: a grid such as `grid.IntGrid`, fitted to the dense weights; what is kept is
            rounded to it in the same sweep, which compensates both; with refine, in a second sweep
            from the refined weights, to which the grid is fitted.
        factor: `hessian.factorize(hessian, damp_frac=...)`, to share it between layers with the
            same input; damp_frac is then the factor's.
        name: the layer, for messages.

    Raises:
        CalibrationError: the Hessian is empty or singular; names the layer and the damping.
        ValueError: a wrong shape, a weight that is NaN or infinite, a fraction outside [0, 1).

    Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
    in One-Shot", algorithm 1 and section 3.
    """
    wanted = masks.parse(name, sparsity, pattern)
    check_weight(name, weight, hessian)
    check_choice(name, "refine", refine, (None, "cg"))
    if isinstance(search, bool) or not isinstance(search, int) or search < 0:
        fail(name, "search", "a number of rounds, at least 0", repr(search))
    if block_size < max(1, wanted.group):
        fail(name, "block_size", f"at least {max(1, wanted.group)}", block_size)
    block_size -= block_size % (wanted.group or 1)
    factor = factor or factorize(hessian, damp_frac=damp_frac, name=name)
    root = factor.root
    dense = weight.detach().to(root.dtype)
    if factor.dead.any():
        dense = dense.masked_fill(factor.dead, 0)
    joint = None if refine else quantizer
    if joint:
        joint.fit(dense, root.diagonal() ** 2)
    zero = dense == 0
    new, pruned, _ = sweep(dense, root, block_size=block_size, sparsity=wanted, zero=zero,
                        grid=joint)  # fmt: skip
    if refine:
        damped, _ = damp(hessian, factor.damp_frac, name=name)
        new, pruned = _refine(dense, new, pruned, damped, wanted, zero, search, block_size)
        if quantizer:
            quantizer.fit(new, root.diagonal() ** 2)
            new, *_ = sweep(new, root, block_size=block_size, zero=pruned, grid=quantizer)
    new = new.to(weight.dtype)
    if not all_finite(new):
        raise CalibrationError(f"{name}: the update left the range of {weight.dtype}; "
                               f"raise damp_frac, now {factor.damp_frac}")  # fmt: skip
    return SparseResult(new, ~pruned, weight, hessian)


def _refine(
    dense: torch.Tensor,
    swept: torch.Tensor,
    pruned: torch.Tensor,
    damped: torch.Tensor,
    wanted: masks.Sparsity,
    zero: torch.Tensor,
    rounds: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, pruned) after the search and the back-solve; never worse than what was swept."""
    if rounds:
        found = refinement.search(dense, damped, wanted, zero=zero, start=swept, rounds=rounds,
                                  block_size=block_size)  # fmt: skip
        new = refinement.solve(dense, ~found, damped, start=swept.masked_fill(found, 0))
        if relative_error(dense, new, damped) <= relative_error(dense, swept, damped):
            return new, found
    return refinement.solve(dense, ~pruned, damped, start=swept), pruned
