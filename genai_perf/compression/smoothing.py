"""Scales of channels moved between a layer and what feeds it: SmoothQuant and AWQ.

A layer x W^T is also (x / s) (W s)^T. Where x comes out of a normalization, or of a linear layer
that only a product follows, the division goes into that one's weights and nothing is left to run.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .capture import Layer
from .experts import Expert
from .hessian import Hessian, full_precision
from .layer import compress
from .recipe import Recipe
from .steps import AWQ, RTN, SmoothQuant
from .structure import Norm, Probe, check_same, gain_offset, norms, run

_ROWS = 128  # of each layer, that AWQ tries its scales on
_PAIRS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))  # feeds, layer


@dataclass(frozen=True)
class Group:
    """Layers with one input, and what feeds it: the input's channels can be scaled.

    Attributes:
        source: its name, for notes.
        layers: full name -> layer.
        routers: full name -> what reads the same input and is not quantized.
        divide: divides the input's channels by (channels,) numbers, in the weights of the source;
            returns the numbers as the stored dtype of those left them.
    """

    source: str
    layers: dict[str, Layer]
    routers: dict[str, nn.Module]
    divide: Callable[[torch.Tensor], torch.Tensor]


def groups(model, i: int, probe: Probe, *, linears: bool) -> Iterator[Group]:
    """The groups of block i, loaded; with `linears`, also those fed by linear layers: down_proj by
    up_proj, and o_proj by v_proj where it has as many heads."""
    found = model.linears(i)
    for norm in norms(model, i, probe):
        dtype = model.stored_dtype(f"{norm.name}.weight")
        yield Group(norm.name, norm.readers, norm.routers, partial(_divide_norm, norm, dtype))
    for feeds, fed in _PAIRS if linears else ():
        for name, layer in found.items():
            parent, _, leaf = name.rpartition(".")
            source = found.get(f"{parent}.{feeds}")
            if leaf != fed or source is None:
                continue
            if len(model.get_weight(source)) == model.get_weight(layer).shape[1]:
                divide = partial(_divide_linear, model, source)
                yield Group(f"{parent}.{feeds}", {name: layer}, {}, divide)


def _divide_norm(norm: Norm, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """The gain is rounded to dtype, and what that changes goes into the scale."""
    gain, bias = norm.gain, getattr(norm.module, "bias", None)
    offset = gain_offset(norm.module)
    wanted = (gain / scale - offset).to(dtype).to(gain.dtype) + offset
    norm.set_gain(wanted)
    scale = torch.where((gain != 0) & (wanted != 0), gain / wanted, scale)
    if bias is not None:
        norm.module.bias = nn.Parameter(bias.detach() / scale, requires_grad=False)
    return scale


def _divide_linear(model, layer: nn.Module, scale: torch.Tensor) -> torch.Tensor:
    model.set_weight(layer, model.get_weight(layer) / scale[:, None])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach() / scale, requires_grad=False)
    return scale


def smooth(
    model,
    i: int,
    step: SmoothQuant | AWQ,
    recipe: Recipe,
    hessians: Mapping[str, Hessian],
    probe: Probe,
) -> tuple[str, ...]:
    """Scales the channels of block i, which is loaded, and of its Hessians with them.

    Returns:
        notes: what was left alone, and why.

    Raises:
        CheckpointError: a block whose output would change.
    """
    prefix, notes = model.blocks[i][0], []
    before = run(model, i, probe)
    for group in groups(model, i, probe, linears=isinstance(step, AWQ)):
        weights = {name: model.get_weight(layer) for name, layer in group.layers.items()}
        inputs = _inputs(group, hessians)
        if not inputs:
            notes.append(f"{group.source}: not scaled: its layers were not calibrated together")
            continue
        if isinstance(step, SmoothQuant):
            peak = torch.stack([hessian.peak for hessian in inputs]).amax(0)
            scale = smoothquant_scale(peak, weights.values(), step.alpha)
        elif any(recipe.skips(name) or not recipe.for_layer(name).quantizer for name in weights):
            notes.append(f"{group.source}: not scaled: a layer that it feeds is not quantized")
            continue
        else:
            quantizer = recipe.for_layer(next(iter(weights))).quantizer
            tokens = sum(hessian.tokens for hessian in inputs)
            matrix = sum(hessian.matrix() * (hessian.tokens / tokens) for hessian in inputs)
            scale = awq_scale(matrix, weights.values(), quantizer, step.steps)
        scale = group.divide(scale)
        for name, layer in group.layers.items():
            model.set_weight(layer, weights[name] * scale)
        for router in group.routers.values():
            model.set_weight(router, model.get_weight(router) * scale)
        for hessian in inputs:
            hessian.rescale(scale)
    check_same(prefix, step.method, before, run(model, i, probe))
    return tuple(notes)


def _inputs(group: Group, hessians: Mapping[str, Hessian]) -> list[Hessian]:
    """The Hessians of a group's layers, each once: one, but for experts, each of which is given
    some of the tokens, or none. Empty where layers of one input were not calibrated together."""
    alone = [hessians.get(name) for name, layer in group.layers.items()
             if not isinstance(layer, Expert)]  # fmt: skip
    if alone and (alone[0] is None or any(one is not alone[0] for one in alone)):
        return []
    return list(dict.fromkeys(hessians[name] for name in group.layers if name in hessians))


def smoothquant_scale(peak: torch.Tensor, weights, alpha: float) -> torch.Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), over all weights that read x, 1 where either is
    zero; (channels,).

    Source: Xiao et al. 2022, "SmoothQuant", equation 4.
    """
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
    scale = peak.pow(alpha) / largest.pow(1 - alpha)
    usable = (peak > 0) & (largest > 0)
    return torch.where(usable, scale, 1.0).clamp_(1e-5, 1e5)


def awq_scale(hessian: torch.Tensor, weights, quantizer, steps: int) -> torch.Tensor:
    """s_j = rms(x_j)^r for the r of 0, 1/steps, ... with the least error of the outputs when the
    scaled weights are rounded to nearest; (channels,), geometric mean of extremes 1.

    The error of _ROWS evenly spaced rows of each weight stands for all.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", section 3.2.
    """
    rounding = Recipe((RTN(quantizer.format, **_options(quantizer)),))
    size = hessian.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, size[size > 0].min() if (size > 0).any() else 1.0)
    chosen = [w[torch.linspace(0, len(w) - 1, min(_ROWS, len(w))).long()].float() for w in weights]
    best, least = torch.ones_like(size), torch.inf
    for r in range(steps):
        scale = size.pow(r / steps)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = 0.0
        for weight in chosen:
            rounded = compress(weight * scale, None, rounding, name="awq").weight / scale - weight
            with full_precision():
                lost += float((rounded @ hessian).mul_(rounded).sum())
        if lost < least:
            best, least = scale, lost
    return best


def _options(quantizer) -> dict:
    if isinstance(quantizer, RTN):
        return quantizer.options()
    if not quantizer.grouped:
        return {}
    return {"group_size": quantizer.group_size, "symmetric": quantizer.symmetric}
