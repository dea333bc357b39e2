"""RIA: prunes by relative importance and activations, with no update."""

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
    power: float = 0.5,
    name: str = "ria.solve",
) -> SparseResult:
    """Prunes by (|w_ij| / sum_j |w_ij| + |w_ij| / sum_i |w_ij|) * ||x_j||^power.

    A weight counts by its share of its row and of its column, so that no row or column is emptied.

    Args:
        weight: (out_features, in_features); not changed.
        hessian: (in_features, in_features), sum of x x^T; its diagonal holds the ||x_j||^2.
        sparsity: fraction of the whole weight, exactly round(numel * sparsity).
        pattern: instead, "n:m" is exactly n zeros in every m consecutive inputs of each row.
        power: of the input norms.
        name: the layer, for messages.

    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
    Language Models", section 3.2.
    """
    wanted = masks.parse(name, sparsity, pattern)
    check_weight(name, weight, hessian)
    size = weight.detach().abs().float()
    shares = (size / size.sum(dim, keepdim=True).clamp_(min=1e-30) for dim in (0, 1))
    scores = sum(shares) * hessian.diagonal().float().sqrt() ** power
    return keep_best(weight, hessian, scores, wanted)
