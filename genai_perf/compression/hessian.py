"""The second moment of a linear layer's inputs, and the factor of its inverse for the solvers."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .._checks import check_ndim, check_tensor, fail
from .._errors import CalibrationError


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
    """

    def __init__(self, columns: int, *, name: str = "layer", device: str | torch.device = "cpu"):
        self.name, self.tokens = name, 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        """Adds the tokens of x, (..., columns); with `keep`, (...) bool, those where it is true."""
        if x.shape[-1] != self._sum.shape[0]:
            fail("Hessian.add", "x", f"(..., {self._sum.shape[0]})", f"shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, x.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1)]
        rows = rows.to(self._sum)
        with full_precision():
            self._sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def matrix(self) -> torch.Tensor:
        """H, (columns, columns) fp32.

        Raises:
            CalibrationError: no token was added, or an activation was NaN or infinite.
        """
        if self.tokens == 0:
            raise CalibrationError(f"{self.name}: no calibration token reached this layer")
        matrix = self._sum * (2.0 / self.tokens)
        if not torch.isfinite(matrix.sum()):
            raise CalibrationError(f"{self.name}: its calibration inputs hold NaN or infinity")
        return matrix


@dataclass(frozen=True)
class Damped:
    """A Hessian made positive definite.

    Attributes:
        hessian: (columns, columns), dead columns set to 1 on the diagonal, then damping added.
        dead: (columns,) bool, the inputs that were zero on every calibration token.
    """

    hessian: torch.Tensor
    dead: torch.Tensor


def damp(hessian: torch.Tensor, damp_frac: float, *, name: str = "layer") -> Damped:
    """H with 1 on the diagonal of dead columns, then + damp_frac * mean(diag H) on all of it.

    Source: Frantar and Alistarh 2023, "SparseGPT", and its published code: the mean is taken after
    dead columns are set.
    """
    check_tensor(name, hessian=hessian)
    check_ndim(name, 2, "(columns, columns)", hessian=hessian)
    if hessian.shape[0] != hessian.shape[1]:
        fail(name, "hessian", "square", f"shape {tuple(hessian.shape)}")
    if not damp_frac >= 0:
        fail(name, "damp_frac", "at least 0", damp_frac)
    dtype = torch.promote_types(hessian.dtype, torch.float32)
    damped = hessian.detach().to(dtype, copy=True)
    diagonal = damped.diagonal()
    if not torch.isfinite(damped.sum()):
        raise CalibrationError(f"{name}: its Hessian holds NaN or infinity")
    dead = diagonal == 0
    if bool(dead.all()):
        raise CalibrationError(
            f"{name}: its Hessian is zero: every calibration input of this layer was 0"
        )
    diagonal[dead] = 1
    diagonal += damp_frac * diagonal.mean()
    return Damped(damped, dead)


def inverse_factor(damped: torch.Tensor, *, damp_frac: float, name: str = "layer") -> torch.Tensor:
    """U, upper triangular, with H^-1 = U^T U.

    U[j, j]^2 is the variance of weight j given the weights before it, which are already frozen when
    a sweep arrives at column j. Reversing rows and columns turns the factor of the inverse into
    the inverse of a factor: one Cholesky and one triangular inverse. Where a model has a few huge
    input channels, damping is 1e-6 of the largest diagonal entry; what fp32 cannot resolve then is
    factored in float64.

    Raises:
        CalibrationError: H is singular to its own precision; names the layer and the damping.
    """
    smallest = 8 * torch.finfo(damped.dtype).eps
    for dtype in (damped.dtype, torch.float64):
        lower, info = torch.linalg.cholesky_ex(damped.to(dtype).flip(0, 1))
        # The part of each diagonal entry that the others do not explain.
        pivots = lower.diagonal().flip(0) ** 2 / damped.diagonal()
        if int(info) == 0 and bool((pivots > smallest).all()):
            identity = torch.eye(len(lower), dtype=dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1).to(damped.dtype)
    raise CalibrationError(
        f"{name}: its Hessian is singular (fewer calibration tokens than inputs, or inputs that "
        f"repeat each other); raise damp_frac, now {damp_frac}, or calibrate on more text"
    )


def relative_error(
    before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor | None
) -> float:
    """|| (before - after) X ||^2 / || before X ||^2 over the inputs X that a Hessian sums up; with
    no Hessian, || before - after ||^2 / || before ||^2."""
    dtype = torch.float32 if hessian is None else hessian.dtype

    def energy(rows: torch.Tensor) -> float:
        parts = rows.split(1024)  # the product is as large as its rows
        products = (((p if hessian is None else p @ hessian) * p) for p in parts)
        return sum(float(p.sum(dtype=torch.float64)) for p in products)

    with full_precision():
        total = energy(before.to(dtype))
        lost = energy(before.to(dtype) - after.to(dtype))
    return lost / total if total > 0 else 0.0
