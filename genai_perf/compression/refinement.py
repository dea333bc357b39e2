"""Least squares on a fixed mask: the best values for the weights that pruning keeps."""

import torch

from .hessian import full_precision


def solve(
    weight: torch.Tensor,
    mask: torch.Tensor,
    hessian: torch.Tensor,
    *,
    start: torch.Tensor,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """For every row w, argmin over v that is zero off the mask of (v - w) H (v - w)^T.

    Conjugate gradients on all rows at once, preconditioned by the diagonal of H; one matmul an
    iteration.

    Args:
        weight: (rows, columns), dense, in H's dtype.
        mask: (rows, columns) bool, True where a weight may be nonzero.
        hessian: (columns, columns), positive definite.
        start: (rows, columns), zero off the mask.
        iterations: at most this many.
        tolerance: stop when every row's preconditioned gradient norm has fallen by this factor
            from what it is at v = 0.

    Source: Meng et al. 2024, "ALPS", whose second stage solves the same problem the same way.
    """
    inverse = 1.0 / hessian.diagonal()

    def gradient(values: torch.Tensor) -> torch.Tensor:
        with full_precision():
            return (values @ hessian).mul_(mask)

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(1, keepdim=True)

    values = start.clone()
    at_zero = gradient(weight)
    target = tolerance**2 * dot(at_zero * inverse, at_zero)
    residual = gradient(weight - values)
    scaled = residual * inverse
    direction, energy = scaled.clone(), dot(scaled, residual)
    for _ in range(iterations):
        active = energy > target
        if not active.any():
            break
        product = gradient(direction)
        curvature = dot(direction, product)
        step = torch.where(active & (curvature > 0), energy / curvature, 0.0)
        values.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        scaled = residual * inverse
        new_energy = dot(scaled, residual)
        direction.mul_(torch.where(energy > 0, new_energy / energy, 0.0)).add_(scaled)
        energy = new_energy
    return values.mul_(mask)
