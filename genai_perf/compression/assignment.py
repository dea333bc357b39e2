"""Which recipe each layer gets, and what the checkpoint formats cannot hold."""

from collections.abc import Collection
from dataclasses import replace

from torch import nn

from .. import formats
from .._errors import CalibrationError, CheckpointError
from ..io import compressed_tensors
from .capture import Layer
from .experts import Expert, has_calibrated_sibling
from .fallback import without_calibration
from .layer import fitting_group_size
from .recipe import Recipe
from .rules import check_fused
from .steps import GPTQ, RTN


def check_holdable(model, recipe: Recipe) -> None:
    """Refuses, before any work, what the checkpoint format or a server cannot hold.

    Raises:
        CheckpointError: a layer that the format cannot hold.
        ValueError: layers that need one scheme and have several.
    """
    quantizers, experts = {}, {}
    for i in range(len(model.blocks)):
        for name, linear in model.linears(i).items():
            one = recipe.for_layer(name)
            quantizer = quantizers[name] = None if recipe.skips(name) else one.quantizer
            if isinstance(linear, Expert):
                if not _stays_dense(model, name, linear, one):
                    experts[name] = quantizer
                continue
            if quantizer is None or quantizer.format == "nf4":
                continue
            form = quantizer.format
            if form not in compressed_tensors.BITS:
                valid = ", ".join((*compressed_tensors.BITS, "nf4"))
                raise CheckpointError(f"recipe {one.name}: no checkpoint format holds {form}; "
                                      f"use one of {valid}")  # fmt: skip
            if not isinstance(linear, nn.Linear):
                raise CheckpointError(
                    f"{name}: is a {type(linear).__name__}, and compressed-tensors holds {form} "
                    f"for nn.Linear only: use nf4, prune, or skip it"
                )
    check_fused(quantizers)
    for name, quantizer in experts.items():
        first, other = next(iter(experts.items()))
        if quantizer != other:
            raise ValueError(f"Recipe: {first} and {name} are experts, which loaders read under "
                             f"one scheme: name all or none")  # fmt: skip


def recipe_of(
    model, name: str, layer: Layer, recipe: Recipe, calibrated: Collection[str]
) -> tuple[Recipe | None, tuple[str, ...]]:
    """What to do to one layer, None where it stays dense, and what is not as the recipe says."""
    if recipe.skips(name):
        return None, ()
    one, notes = recipe.for_layer(name), ()
    if isinstance(layer, Expert) and one.quantizer:
        if why := _stays_dense(model, name, layer, one):
            notes = (f"not quantized to {one.quantizer.format}: {why}",)
            if one.pruner is None:
                return None, notes
            one = replace(one, steps=(one.pruner,))
        else:
            one, notes = _one_group_size(one, layer)
    if name not in calibrated and one.needs_calibration:
        if not has_calibrated_sibling(name, calibrated):
            raise CalibrationError(f"{name}: no calibration token reached this layer")
        instead = without_calibration(one)
        notes += (f"no calibration token was routed to it: {instead.name} in place of {one.name}",)
        one = instead
    return one, notes


def _stays_dense(model, name: str, layer: Expert, recipe: Recipe) -> str:
    """Why an expert is not quantized; "" where it is, or is not asked to be."""
    quantizer = recipe.quantizer
    if quantizer is None:
        return ""
    rows = quantizer.format in ("int8", "fp8") and _by_row(quantizer)
    if not quantizer.grouped and not rows:
        return "checkpoint formats hold experts in int2 to int4, or in int8 and fp8 by rows"
    return ""


def _by_row(quantizer: RTN | GPTQ) -> bool:
    if isinstance(quantizer, GPTQ):
        return True
    return formats.get(quantizer.format).spec(**quantizer.options()).group_size == -1


def _one_group_size(recipe: Recipe, expert: Expert) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with a group size that divides the inputs of all matrices of an expert: loaders
    read experts under one scheme."""
    quantizer = recipe.quantizer
    if not quantizer.grouped:
        return recipe, ()
    asked = size = 128 if quantizer.group_size is None else quantizer.group_size
    for columns in sorted(expert.widths, reverse=True):
        size = size if size == -1 else fitting_group_size(columns, size)
    if size == asked:
        return recipe, ()
    used = f"groups of {size}" if size > 0 else "one scale a row"
    note = f"group size {asked} does not divide the inputs of all experts: {used} instead"
    steps = (replace(s, group_size=size) if s is quantizer else s for s in recipe.steps)
    return replace(recipe, steps=tuple(steps)), (note,)
