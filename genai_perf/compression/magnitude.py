"""Magnitude pruning: the smallest weights go, nothing else changes. The baseline."""

import torch

from . import masks
from .sparsegpt import SparseResult, check_weight


def solve(
    weight: torch.Tensor,
    hessian: torch.Tensor | None = None,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    name: str = "magnitude.solve",
) -> SparseResult:
    """Prunes the weights of least |w|.

    Args:
        weight: (out_features, in_features); not changed.
        hessian: (in_features, in_features), for the result's error alone; None: that of the weight.
        sparsity: fraction of the whole weight, exactly round(numel * sparsity).
        pattern: instead, "n:m" is exactly n zeros in every m consecutive inputs of each row.
        name: the layer, for messages.
    """
    wanted = masks.parse(name, sparsity, pattern)
    check_weight(name, weight, hessian)
    return keep_best(weight, hessian, weight.abs().float(), wanted)


def keep_best(
    weight: torch.Tensor, hessian: torch.Tensor | None, scores: torch.Tensor, wanted: masks.Sparsity
) -> SparseResult:
    """The weight as it is, zero where `wanted` prunes by scores (rows, columns)."""
    mask = ~wanted.choose_everywhere(scores, weight == 0, max(1, weight.shape[1]))
    new = weight * mask
    return SparseResult(new, mask, weight, hessian)
