"""Which layers of a block are calibrated together, and running the block for them."""

from collections.abc import Callable, Mapping, MutableSequence

import torch

from .capture import Layer, inputs_of, watched
from .hessian import Hessian
from .ranks import Ranks
from .recipe import Recipe


def calibrate(
    model,
    i: int,
    layers: Mapping[str, Layer],
    hidden: MutableSequence[torch.Tensor],
    kwargs: list[dict],
) -> dict[str, Hessian]:
    """The Hessians of some layers of block i, loaded, for its inputs, on all ranks."""
    with inputs_of(layers) as hessians:
        for batch, call in zip(hidden, kwargs, strict=True):
            model.forward_block(i, batch, call)
    return Ranks().summed(hessians)


def stages_of(
    model,
    i: int,
    linears: Mapping[str, Layer],
    recipe: Recipe,
    hidden: MutableSequence[torch.Tensor],
    kwargs: list[dict],
) -> list[Mapping[str, Layer]]:
    """The layers that are calibrated together: all of them, or, where GPTQ is to be true to the
    sequence, those that share an input, in the order in which the block runs them."""
    quantizers = [recipe.for_layer(name).quantizer for name in linears]
    if not hidden or not any(getattr(q, "true_sequential", False) for q in quantizers):
        return [linears]
    by_input = call_order(linears, lambda: model.forward_block(i, hidden[0], kwargs[0]))
    unseen = {name: linears[name] for name in linears.keys() - set().union(*by_input)}
    return [{name: linears[name] for name in stage} for stage in by_input] + [unseen] * bool(unseen)


def call_order(layers: Mapping[str, Layer], run: Callable[[], object]) -> list[list[str]]:
    """The names of `layers` that `run` calls, in its order; those with the same input stand
    together, and so do those with the same last part of their names, such as all experts' down."""
    stages: list[list[str]] = []
    by_leaf: dict[str, list[str]] = {}
    last: list[torch.Tensor] = []

    def seen(name: str, x: torch.Tensor) -> None:
        leaf = name.rpartition(".")[2]
        if leaf not in by_leaf:
            if not last or last[0] is not x:
                stages.append([])
            by_leaf[leaf] = stages[-1]
        if name not in by_leaf[leaf]:
            by_leaf[leaf].append(name)
        last[:] = [x]

    with watched(layers, seen):
        run()
    return stages
