"""OWL: blocks with more outliers are pruned less, at the same sparsity of the whole."""

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .._checks import check_positive, fail
from .capture import Layer, watched

ALLOCATIONS = (None, "owl")
# The paper's hyper-parameters M and lambda: an outlier is this many times the mean, and no block's
# sparsity is further than this from the mean.
THRESHOLD, SPREAD = 5.0, 0.08


@contextmanager
def input_energies(linears: Mapping[str, Layer]) -> Iterator[dict[str, torch.Tensor]]:
    """While the `with` lasts, adds up the squares of each linear's inputs: full name -> (columns,)
    in the dict that it yields."""
    sums: dict[str, torch.Tensor] = {}

    def seen(name: str, x: torch.Tensor) -> None:
        energy = x.detach().float().reshape(-1, x.shape[-1]).square().sum(0)
        sums[name] = sums[name] + energy if name in sums else energy

    with watched(linears, seen):
        yield sums


def outlier_ratio(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]], *, threshold: float = THRESHOLD
) -> float:
    """Fraction of a block's |w_ij| * ||x_j|| that are above `threshold` times their mean.

    Args:
        layers: (weight (rows, columns), sum of x^2 (columns,)) of each linear of the block.
        threshold: what counts as an outlier.
    """
    check_positive("owl.outlier_ratio", threshold=threshold)
    if not layers:
        fail("owl.outlier_ratio", "layers", "at least one linear", "none")
    scores = [w.detach().abs().float() * energy.float().sqrt() for w, energy in layers]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def allocate(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, *, spread: float = SPREAD
) -> list[float]:
    """A sparsity for each block: linear in its outlier ratio, `sparsity` over all weights together.

    Args:
        ratios: `outlier_ratio` of each block.
        sizes: weights in each block.
        sparsity: of the whole, 0 <= s < 1.
        spread: half the distance between the least and the most pruned block, made smaller where
            a block would otherwise leave [0, 1).

    Source: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL)", section 3.2.
    """
    if len(ratios) != len(sizes) or not ratios:
        fail("owl.allocate", "ratios", f"one for each of {len(sizes)} blocks", len(ratios))
    if not 0 <= sparsity < 1:
        fail("owl.allocate", "sparsity", "at least 0 and below 1", sparsity)
    low, high = min(ratios), max(ratios)
    if high == low:
        return [float(sparsity)] * len(ratios)
    density = [2 * spread * (ratio - low) / (high - low) for ratio in ratios]
    mean = sum(d * n for d, n in zip(density, sizes, strict=True)) / sum(sizes)
    offsets = [mean - d for d in density]
    room = min((0.999 - sparsity) / max(offsets), sparsity / -min(offsets), 1.0)
    return [sparsity + max(room, 0.0) * offset for offset in offsets]


def sparsities(
    model: Any,
    recipe: Any,
    hidden: MutableSequence[torch.Tensor],
    kwargs: list[list[dict]],
    progress: Callable[[int, int, str], None],
) -> list[float]:
    """The sparsity of each block of a `BlockModel`, from one pass of its dense weights.

    Args:
        model: where blocks come from.
        recipe: the `Recipe`, whose pruner has the sparsity of the whole and which skips layers.
        hidden: inputs of block 0; afterwards inputs of the last block.
        kwargs: `kwargs[i][b]`, the other arguments of block i for batch b.
        progress: called with (0, blocks in all, what runs now).
    """
    ratios, sizes, total = [], [], len(model.blocks)
    for i, (prefix, _) in enumerate(model.blocks):
        progress(0, total, f"outliers of {prefix}")
        model.load_block(i)
        linears = {n: m for n, m in model.linears(i).items() if not recipe.skips(n)}
        with input_energies(linears) as energies:
            for b, call in enumerate(kwargs[i]):
                output = model.forward_block(i, hidden[b], call)
                if i + 1 < total:
                    hidden[b] = output
        layers = [(model.get_weight(linears[name]), energy) for name, energy in energies.items()]
        ratios.append(outlier_ratio(layers) if layers else 0.0)
        sizes.append(sum(weight.numel() for weight, _ in layers))
        model.free_block(i)
    return allocate(ratios, sizes, recipe.pruner.sparsity)
