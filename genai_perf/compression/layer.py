"""One linear layer through a recipe."""

from dataclasses import dataclass

import torch

from ..formats import QuantizedTensor
from ..ops.quantize.grid import GroupGrid, IntGrid
from . import gptq, magnitude, ria, rtn, sparsegpt, wanda
from .float_grid import Fp8Grid, Nf4Grid
from .hessian import Inputs, relative_error
from .recipe import Recipe
from .steps import GPTQ, RIA, RTN, Magnitude, SparseGPT, Wanda


@dataclass(frozen=True)
class LayerResult:
    """A compressed layer.

    Attributes:
        weight: (out_features, in_features), what the stored tensors stand for, in their dtype.
        qweight: the packed weight, None where the recipe only prunes.
        error: || (W - weight) X ||^2 / || W X ||^2, or that of the weights without a Hessian.
        notes: what is not as the recipe says, and why.
    """

    weight: torch.Tensor
    qweight: QuantizedTensor | None
    error: float
    notes: tuple[str, ...] = ()


def compress(
    weight: torch.Tensor, inputs: Inputs | None, recipe: Recipe, *, name: str
) -> LayerResult:
    """Applies the recipe's steps to one weight.

    Args:
        weight: (out_features, in_features), in the dtype that the checkpoint stores.
        inputs: the Hessian of its inputs, or None where no step needs it.
        name: the layer, for messages.

    The group size of int4, int3 and int2 is the recipe's where it divides in_features, which the
    checkpoint format needs; else `fitting_group_size`, with a note. Scales of integers and fp8 have
    values that the weight's dtype holds, because transformers keeps them in it. nf4 leaves sizes
    dense that bitsandbytes 0.50 refuses to multiply on processors with AVX512-BF16.
    """
    pruner, quantizer = recipe.pruner, recipe.quantizer
    notes: tuple[str, ...] = ()
    group_size = None
    if quantizer and quantizer.grouped:
        asked = 128 if quantizer.group_size is None else quantizer.group_size
        group_size = fitting_group_size(weight.shape[1], asked)
        if group_size != asked:
            notes = (_group_note(weight.shape[1], asked, group_size),)
    if quantizer and quantizer.format == "nf4" and (weight.shape[0] % 32 or weight.shape[1] % 64):
        quantizer = None
        notes = (
            f"left unquantized: bitsandbytes runs nf4 of {weight.shape[0]} outputs and "
            f"{weight.shape[1]} inputs on some processors only (32 must divide the outputs, "
            f"64 the inputs)",
        )
    refined = isinstance(pruner, SparseGPT) and pruner.refine is not None
    if isinstance(pruner, SparseGPT) and isinstance(quantizer, GPTQ) and not refined:
        return _joint(weight, inputs, pruner, quantizer, group_size, name, notes)
    hessian = None if inputs is None else inputs.hessian
    new, mask, qweight, error = weight, None, None, 0.0
    if pruner:
        pruned = _prune(weight, inputs, pruner, name)
        new, mask, error = pruned.weight, pruned.mask, pruned.error
    if isinstance(quantizer, GPTQ):
        # A whole row has its one scale before the sweep.
        scales = quantizer.scales if group_size and group_size > 0 else "static"
        act_order = scales == "static" if quantizer.act_order is None else quantizer.act_order
        result = gptq.solve(
            new if refined else weight, hessian, mask=mask, scales=scales,
            group_size=group_size or -1, act_order=act_order,
            factor=inputs.factor(quantizer.damp_frac, by_diagonal=act_order),
            block_size=quantizer.block_size,
            grid=_grid(quantizer, group_size, weight.dtype, refit=scales == "sweep"), name=name,
        )  # fmt: skip
        new, qweight = result.weight, result.qweight
        error = relative_error(weight, new, hessian) if refined else result.error
    elif isinstance(quantizer, RTN):
        options = quantizer.options() | ({"group_size": group_size} if group_size else {})
        if quantizer.search:
            options["grid"] = _grid(quantizer, group_size, weight.dtype)
        if quantizer.search == "importance":
            options["importance"] = hessian.diagonal()
        result = rtn.solve(new, format=quantizer.format, name=name, **options,
                           scale_dtype=weight.dtype)  # fmt: skip
        new, qweight = result.weight, result.qweight
        error = relative_error(weight, new, hessian)
    return LayerResult(new, qweight, error, notes)


def _grid(
    quantizer: RTN | GPTQ, group_size: int | None, dtype: torch.dtype, *, refit: bool = False
) -> GroupGrid:
    """What a quantizer rounds to, with scales that dtype holds."""
    search = bool(quantizer.search)
    match quantizer.format:
        case "nf4":
            return Nf4Grid(double_quant=quantizer.double_quant, search=search)
        case "fp8":
            return Fp8Grid(scale_dtype=dtype, search=search)
    return IntGrid(
        bits=int(quantizer.format.removeprefix("int")), group_size=group_size or -1,
        symmetric=quantizer.symmetric, scale_dtype=dtype, search=search, refit=refit,
    )  # fmt: skip


def fitting_group_size(columns: int, group_size: int) -> int:
    """`group_size` where it divides columns, else the largest power of two from 32 that does and is
    smaller, else -1: one scale for the row."""
    if group_size == -1 or columns % group_size == 0:
        return group_size
    powers = [1 << p for p in range(5, 16) if 1 << p <= group_size and columns % (1 << p) == 0]
    return max(powers, default=-1)


def _group_note(columns: int, asked: int, used: int) -> str:
    instead = f"groups of {used}" if used > 0 else "one scale a row"
    return f"group size {asked} does not divide {columns} inputs: {instead} instead"


def _prune(weight, inputs, pruner, name) -> sparsegpt.SparseResult:
    amount = {"sparsity": pruner.sparsity, "pattern": pruner.pattern, "name": name}
    hessian = None if inputs is None else inputs.hessian
    match pruner:
        case SparseGPT():
            return sparsegpt.solve(
                weight, hessian, refine=pruner.refine, search=pruner.search,
                factor=inputs.factor(pruner.damp_frac), block_size=pruner.block_size, **amount,
            )  # fmt: skip
        case Wanda():
            return wanda.solve(weight, hessian, **amount)
        case RIA():
            return ria.solve(weight, hessian, power=pruner.power, **amount)
        case Magnitude():
            return magnitude.solve(weight, hessian, **amount)


def _joint(weight, inputs, pruner, quantizer, group_size, name, notes) -> LayerResult:
    """SparseGPT whose kept weights are rounded to GPTQ's grid in the same sweep."""
    grid = _grid(quantizer, group_size, weight.dtype)
    result = sparsegpt.solve(
        weight, inputs.hessian, sparsity=pruner.sparsity, pattern=pruner.pattern, quantizer=grid,
        refine=None,
        factor=inputs.factor(pruner.damp_frac), block_size=pruner.block_size, name=name,
    )  # fmt: skip
    qweight = grid.pack(result.weight.to(torch.float32), weight.dtype)
    return LayerResult(qweight.dequantize(), qweight, result.error, notes)
