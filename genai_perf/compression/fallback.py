"""What stands in for a recipe on a layer that no calibration token reached."""

from dataclasses import replace

from .recipe import Recipe
from .steps import GPTQ, RTN, Magnitude


def without_calibration(recipe: Recipe) -> Recipe:
    """The recipe with steps that need no calibration: every pruner is Magnitude at the same
    sparsity or pattern, GPTQ is RTN to the same format, and searched scales have the least squared
    error of the weights.

    Args:
        recipe: of one layer, without rules.
    """
    steps = []
    if (pruner := recipe.pruner) is not None:
        steps.append(Magnitude(sparsity=pruner.sparsity, pattern=pruner.pattern))
    quantizer = recipe.quantizer
    if isinstance(quantizer, GPTQ):
        whole_row = quantizer.bits == 8  # int8 and fp8 have a scale for each row
        quantizer = RTN(quantizer.format, symmetric=quantizer.symmetric,
                        group_size=None if whole_row else quantizer.group_size,
                        double_quant=quantizer.double_quant,
                        search="mse" if quantizer.search else None)  # fmt: skip
    elif isinstance(quantizer, RTN) and quantizer.search == "importance":
        quantizer = replace(quantizer, search="mse")
    if quantizer is not None:
        steps.append(quantizer)
    return Recipe(tuple(steps), recipe.skip)
