"""The second moment of a linear layer's inputs, and the factor of its inverse for the solvers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .._checks import check_ndim, check_tensor, fail
from .._errors import CalibrationError

_PANEL = 512  # rows or columns that are copied, multiplied or factored at once


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 matmuls in fp32: TF32 and bf16 shortcuts off, the caller's setting back afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Hessian:
    """Accumulates H = (2 / n) sum x x^T over the n input tokens of one linear layer, in fp32.

    Args:
        columns: the layer's in_features.
        name: the layer, for messages.
        device: where the matrix lives.

    Attributes:
        tokens: n.
        peak: (columns,) fp32, the largest |x| of each input.
    """

    def __init__(self, columns: int, *, name: str = "layer", device: str | torch.device = "cpu"):
        self.name, self.tokens = name, 0
        self._mean = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.peak = torch.zeros(columns, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Adds the tokens of x, (..., columns); with `keep`, (...) bool, those where it is true."""
        if x.shape[-1] != self._mean.shape[0]:
            fail("Hessian.add", "x", f"(..., {self._mean.shape[0]})", f"shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1)]
        if not len(rows):
            return
        rows = rows.to(self._mean)
        torch.maximum(self.peak, rows.amax(0), out=self.peak)
        torch.maximum(self.peak, rows.amin(0).neg_(), out=self.peak)
        before, self.tokens = self.tokens, self.tokens + len(rows)
        with full_precision():
            self._mean.addmm_(rows.T, rows, beta=before / self.tokens, alpha=2 / self.tokens)

    def matrix(self) -> torch.Tensor:
        """H, (columns, columns) fp32; not a copy.

        Raises:
            CalibrationError: no token was added, or an activation was NaN or infinite.
        """
        if self.tokens == 0:
            raise CalibrationError(f"{self.name}: no calibration token reached this layer")
        if not torch.isfinite(self._mean.sum()):
            raise CalibrationError(f"{self.name}: its calibration inputs hold NaN or infinity")
        return self._mean

    @property
    def sums(self) -> torch.Tensor:
        """The matrix as it is now, to be added to in place."""
        return self._mean

    def weigh(self, share: float, tokens: int) -> None:
        """Makes it its part of a mean over `tokens` tokens, of which it saw this share."""
        self._mean *= share
        self.tokens = tokens

    def rescale(self, scale: torch.Tensor) -> None:
        """Makes it that of the inputs x / scale, (columns,)."""
        self._mean.div_(scale).div_(scale[:, None])
        self.peak /= scale


def damp(
    hessian: torch.Tensor, damp_frac: float, *, name: str = "layer"
) -> tuple[torch.Tensor, torch.Tensor]:
    """H with 1 on the diagonal of dead columns, then + damp_frac * mean(diag H) on all of it.

    Returns:
        (damped, dead): a new (columns, columns) matrix; (columns,) bool, the inputs that were zero
        on every calibration token.

    Source: Frantar and Alistarh 2023, "SparseGPT", and its published code: the mean is taken after
    dead columns are set.
    """
    compute = torch.promote_types(hessian.dtype, torch.float32)
    diagonal, dead = _damped_diagonal(hessian, damp_frac, name, compute)
    damped = hessian.detach().to(compute, copy=True)
    damped.diagonal().copy_(diagonal)
    return damped, dead


def all_finite(values: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity; reads once and makes nothing."""
    return not values.numel() or all(bool(torch.isfinite(v)) for v in torch.aminmax(values))


def check_hessian(name: str, hessian: torch.Tensor) -> None:
    if not all_finite(hessian):
        raise CalibrationError(f"{name}: its Hessian holds NaN or infinity")


def _damped_diagonal(
    hessian: torch.Tensor, damp_frac: float, name: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`damp`'s diagonal, in dtype, and its dead columns; the Hessian checked."""
    check_tensor(name, hessian=hessian)
    check_ndim(name, 2, "(columns, columns)", hessian=hessian)
    if hessian.shape[0] != hessian.shape[1]:
        fail(name, "hessian", "square", f"shape {tuple(hessian.shape)}")
    if not damp_frac >= 0:
        fail(name, "damp_frac", "at least 0", damp_frac)
    check_hessian(name, hessian)
    diagonal = hessian.detach().diagonal().to(dtype, copy=True)
    dead = diagonal == 0
    if bool(dead.all()):
        raise CalibrationError(
            f"{name}: its Hessian is zero: every calibration input of this layer was 0"
        )
    diagonal[dead] = 1
    diagonal += damp_frac * diagonal.mean()
    return diagonal, dead


@dataclass(frozen=True)
class Factor:
    """What a sweep needs of a Hessian.

    Attributes:
        root: (columns, columns), L lower triangular with L^T L = H, H damped.
        dead: (columns,) bool, inputs that were zero on every calibration token.
        order: (columns,), the columns in the order of L's; None: as they are.
        damp_frac: the damping, as a fraction of the mean of diag H.
    """

    root: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None
    damp_frac: float


def factorize(
    hessian: torch.Tensor, *, damp_frac: float, by_diagonal: bool = False, name: str = "layer"
) -> Factor:
    """Damps H and factors it, last column first.

    L^-1 = U^T with U^T U = H^-1, U upper triangular: U[j, j]^2 = L[j, j]^-2 is the variance of
    weight j given the weights before it, which are already frozen when a sweep arrives at column j.
    Nothing is inverted: see `sweep.sweep`. Where a model has a few huge input channels, damping is
    1e-6 of the largest diagonal entry: what fp32 cannot resolve well is factored in float64.

    Args:
        hessian: (columns, columns), not changed.
        by_diagonal: order columns by falling diag(H).

    Raises:
        CalibrationError: H is empty, or singular to its own precision; names the layer and the
            damping.
    """
    compute = torch.promote_types(hessian.dtype, torch.float32)
    diagonal, dead = _damped_diagonal(hessian, damp_frac, name, compute)
    order = diagonal.argsort(descending=True, stable=True) if by_diagonal else None
    eps = torch.finfo(compute).eps  # below about 4 of it, an fp32 Hessian holds rounding alone
    for dtype, smallest in ((compute, 64 * eps), (torch.float64, 4 * eps)):
        root = _lower(hessian, order, dtype)
        if dtype != diagonal.dtype:
            diagonal, _ = _damped_diagonal(hessian, damp_frac, name, dtype)
        wanted = diagonal if order is None else diagonal[order]
        root.diagonal().copy_(wanted)
        # The part of each diagonal entry that the others do not explain.
        if _factor(root) and bool((root.diagonal() ** 2 / wanted > smallest).all()):
            return Factor(root.to(compute), dead, order, damp_frac)
    raise CalibrationError(
        f"{name}: its Hessian is singular (fewer calibration tokens than inputs, or inputs that "
        f"repeat each other); raise damp_frac, now {damp_frac}, or calibrate on more text"
    )


def _lower(hessian: torch.Tensor, order: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The lower triangle of H, its rows and columns in `order`: a new matrix."""
    if order is None:
        return hessian.tril().to(dtype).contiguous()
    work = torch.empty_like(hessian, dtype=dtype, memory_format=torch.contiguous_format)
    for start in range(0, len(order), _PANEL):
        work[start : start + _PANEL] = hessian[order[start : start + _PANEL]][:, order]
    return work.tril_()


def _factor(work: torch.Tensor) -> bool:
    """Replaces the lower triangle of H by L with L^T L = H, by halves: of [A B^T; B D] first
    D = L2^T L2, then X with L2^T X = B, and the rest of A, A - X^T X; False where H is not
    positive definite. Only lower triangles are read and written."""
    columns = len(work)
    if columns <= _PANEL:
        upper, info = torch.linalg.cholesky_ex(work.flip(0, 1), upper=True)
        work.copy_(upper.flip(0, 1))
        return int(info) == 0
    half = columns // 2
    first, below, second = work[:half, :half], work[half:, :half], work[half:, half:]
    if not _factor(second):
        return False
    with full_precision():
        # Transposed, which LAPACK takes without a copy.
        solved = torch.linalg.solve_triangular(second, below.T, upper=False, left=False).T
        below.copy_(solved)
        for start in range(0, half, _PANEL):
            stop = min(start + _PANEL, half)
            first[start:, start:stop].addmm_(solved[:, start:].T, solved[:, start:stop], alpha=-1)
    return _factor(first)


class Inputs:
    """A Hessian and its factor, shared by layers that have the same input."""

    def __init__(self, hessian: torch.Tensor, *, name: str):
        self.hessian, self._name, self._factor, self._key = hessian, name, None, None

    def factor(self, damp_frac: float, *, by_diagonal: bool = False) -> Factor:
        if self._key != (damp_frac, by_diagonal):
            self._factor = factorize(self.hessian, damp_frac=damp_frac, by_diagonal=by_diagonal,
                                     name=self._name)  # fmt: skip
            self._key = damp_frac, by_diagonal
        return self._factor


def relative_error(
    before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor | None
) -> float:
    """|| (before - after) X ||^2 / || before X ||^2 over the inputs X that a Hessian sums up; with
    no Hessian, || before - after ||^2 / || before ||^2."""
    dtype = torch.float32 if hessian is None else hessian.dtype
    energy = _norm if hessian is None else lambda rows: _energy(rows, hessian)
    total = lost = 0.0
    with full_precision():
        for start in range(0, len(before), _PANEL):  # fp32 copies of all rows would be large
            part = before[start : start + _PANEL].to(dtype)
            total += energy(part)
            lost += energy(part - after[start : start + _PANEL].to(dtype))
    return lost / total if total > 0 else 0.0


def swept_error(
    before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor, factor: Factor, cost: float
) -> float:
    """`relative_error` of what a sweep changed, from the `cost` that it summed up: without the
    share of the damping that is what the outputs lost, and only the whole is multiplied out.

    Args:
        before, after: (rows, columns).
        factor: the Hessian's, that the sweep went by.
    """
    diagonal = hessian.diagonal().to(factor.root.dtype, copy=True)
    diagonal[factor.dead] = 1
    damping = (factor.damp_frac * diagonal.mean()).expand(len(diagonal)) + factor.dead.to(diagonal)
    changed, total = torch.zeros_like(diagonal, dtype=torch.float64), 0.0
    hessian = hessian.to(diagonal)
    with full_precision():
        for start in range(0, len(before), _PANEL):
            part = before[start : start + _PANEL].to(diagonal)
            total += _energy(part, hessian)
            change = part - after[start : start + _PANEL].to(diagonal)
            changed += change.square_().sum(0, dtype=torch.float64)
    lost = cost - float(changed @ damping.double())
    if lost < 1e-3 * cost:  # the rest of a difference this small would be rounding
        return relative_error(before, after, hessian)
    return lost / total if total > 0 else 0.0


def _norm(rows: torch.Tensor) -> float:
    return float(rows.square().sum(-1).sum(dtype=torch.float64))


def _energy(rows: torch.Tensor, hessian: torch.Tensor) -> float:
    """Sum over rows of r H r^T: with H symmetric, its blocks below the diagonal count twice and
    those above are never multiplied."""
    total, panel = 0.0, 512
    for start in range(0, rows.shape[1], panel):
        stop = min(start + panel, rows.shape[1])
        part = rows[:, start:stop]
        product = part @ hessian[start:stop, start:stop]
        product.addmm_(rows[:, stop:], hessian[stop:, start:stop], alpha=2)
        total += float(product.mul_(part).sum(dtype=torch.float64))
    return total
