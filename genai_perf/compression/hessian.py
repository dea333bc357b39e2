"""The second moment of a linear layer's inputs, and the factor of its inverse for the solvers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .._checks import check_ndim, check_tensor, fail
from .._errors import CalibrationError

_PANEL = 512  # rows or columns that are copied, or inverted, at once


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
    if not torch.isfinite(hessian.sum(dtype=torch.float64)):
        raise CalibrationError(f"{name}: its Hessian holds NaN or infinity")
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
        upper: (columns, columns), U upper triangular with U^T U = H^-1, H damped.
        dead: (columns,) bool, inputs that were zero on every calibration token.
        order: (columns,), the columns in the order of U's; None: as they are.
        damp_frac: the damping, as a fraction of the mean of diag H.
    """

    upper: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None
    damp_frac: float


def factorize(
    hessian: torch.Tensor, *, damp_frac: float, by_diagonal: bool = False, name: str = "layer"
) -> Factor:
    """Damps H and factors its inverse.

    U[j, j]^2 is the variance of weight j given the weights before it, which are already frozen when
    a sweep arrives at column j. Reversing rows and columns turns the factor of the inverse into
    the inverse of a factor: one Cholesky and one triangular inverse. Where a model has a few huge
    input channels, damping is 1e-6 of the largest diagonal entry: what fp32 cannot resolve well is
    factored in float64. Beside H, at most one and a half matrices of its size are alive.

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
    last_first = torch.arange(len(diagonal), device=hessian.device) if order is None else order
    last_first = last_first.flip(0)
    eps = torch.finfo(compute).eps  # below about 4 of it, an fp32 Hessian holds rounding alone
    for dtype, smallest in ((compute, 64 * eps), (torch.float64, 4 * eps)):
        work = torch.empty_like(hessian, dtype=dtype, memory_format=torch.contiguous_format)
        for start in range(0, len(work), _PANEL):
            rows = last_first[start : start + _PANEL]
            work[start : start + _PANEL] = hessian[rows][:, last_first]
        if dtype != diagonal.dtype:
            diagonal, _ = _damped_diagonal(hessian, damp_frac, name, dtype)
        wanted = diagonal[last_first]
        work.diagonal().copy_(wanted)
        info = torch.empty((), dtype=torch.int32, device=work.device)
        # The transpose is column-major, which LAPACK wants, and leaves L itself row-major.
        torch.linalg.cholesky_ex(work.T, upper=True, out=(work.T, info))
        # The part of each diagonal entry that the others do not explain.
        pivots = work.diagonal() ** 2 / wanted
        if int(info) == 0 and bool((pivots > smallest).all()):
            _invert(work)
            _reverse(work.view(-1))  # rows and columns at once
            return Factor(work.to(compute), dead, order, damp_frac)
    raise CalibrationError(
        f"{name}: its Hessian is singular (fewer calibration tokens than inputs, or inputs that "
        f"repeat each other); raise damp_frac, now {damp_frac}, or calibrate on more text"
    )


def _invert(lower: torch.Tensor) -> None:
    """Inverts a lower triangular matrix in place, by halves: [A 0; B C] has the inverse
    [A^-1 0; -C^-1 B A^-1  C^-1]. Matmuls, panel by panel, skip most of the zeros; solving with A
    and C instead takes a third longer."""
    columns = len(lower)
    if columns <= _PANEL:
        identity = torch.eye(columns, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = columns // 2
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(first)
    _invert(second)
    product = torch.empty_like(below)
    with full_precision():
        for start in range(0, half, _PANEL):
            stop = min(start + _PANEL, half)
            torch.mm(below[:, start:], first[start:, start:stop], out=product[:, start:stop])
        product.neg_()
        for start in range(0, columns - half, _PANEL):
            stop = min(start + _PANEL, columns - half)
            torch.mm(second[start:stop, :stop], product[:stop], out=below[start:stop])


def _reverse(values: torch.Tensor) -> None:
    """Reverses a vector in place, a part at a time."""
    count, part = len(values), 1 << 20
    for start in range(0, count // 2, part):
        stop = min(start + part, count // 2)
        head, tail = values[start:stop], values[count - stop : count - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)


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
    with full_precision():
        total = energy(before.to(dtype))
        lost = energy(before.to(dtype) - after.to(dtype))
    return lost / total if total > 0 else 0.0


def _norm(rows: torch.Tensor) -> float:
    return float(rows.square().sum(dtype=torch.float64))


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
