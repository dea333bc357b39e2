"""Wanda: prunes each output's least |w| times input norm, with no update."""

import torch

from . import masks
from .magnitude import keep_best
from .sparsegpt import SparseResult, check_weight


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    name: str = "wanda.solve",
) -> SparseResult:
    """Prunes by |w_ij| * ||x_j||, compared within each row.

    Args:
        weight: (out_features, in_features); not changed.
        hessian: (in_features, in_features), sum of x x^T; its diagonal holds the ||x_j||^2.
        sparsity: fraction of each row, exactly round(in_features * sparsity).
        pattern: instead, "n:m" is exactly n zeros in every m consecutive inputs of each row.
        name: the layer, for messages.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models".
    """
    wanted = masks.parse(name, sparsity, pattern)
    check_weight(name, weight, hessian)
    scores = weight.abs().float() * hessian.diagonal().sqrt().float()
    if wanted.group:
        return keep_best(weight, hessian, scores, wanted)
    zero = weight == 0
    count = round(weight.shape[1] * wanted.fraction)
    mask = ~(masks.smallest(torch.where(zero, -1.0, scores), count) | zero)
    new = weight * mask
    return SparseResult(new, mask, weight, hessian)
