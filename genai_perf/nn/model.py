"""quantize_model: Linears and stacks of experts replaced, and a record of what was not and why."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .experts import QuantizedStack, Stack, find_stacks, put
from .explaining import explain_layer
from .linear import QuantConfig, QuantLinear, dense_weight

DEFAULT_SKIP = ("lm_head",)


@dataclass(frozen=True)
class QuantizationRecord:
    """What quantize_model did: `quantized` by layer name to format, `skipped` to the reason."""

    quantized: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"quantized {len(self.quantized)} layers, skipped {len(self.skipped)}"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.skipped.items()])


def quantize_model(model: nn.Module, config: str | QuantConfig, *,
                   skip: Collection[str] = DEFAULT_SKIP, strict: bool = False,
                   importance: Mapping[str, torch.Tensor] | None = None,
                   ) -> nn.Module:  # fmt: skip
    """Replaces the Linear and Conv1D layers of `model` by QuantLinear, in place, and the 3-D
    parameters of a mixture's experts (transformers' Mixtral, Qwen-MoE, GPT-OSS, ...) by
    QuantizedStack, each expert quantized by itself.

    Args:
        model: any module; a failure leaves it as it was.
        config: a format name, such as "nf4", or a QuantConfig.
        skip: layers to leave dense, each as a run of dotted name parts ("lm_head",
            "layers.0.mlp"); every entry other than the default must match a layer.
        strict: refuse a layer that no kernel runs where the model is: only the slow reference.
        importance: by layer name, what a squared error in each column of its weight costs,
            (in_features,); needs a config with `search`. See `genai_perf.quantize`.

    Returns:
        The model, with `model.quantization_record` (QuantizationRecord) naming every quantized
        layer, and every skipped one with its reason. What was skipped without being asked for is
        also said in one warning.

    Raises:
        ValueError: nothing to quantize, a `skip` or `importance` entry that matches nothing, or a
            weight with an infinity or NaN (named; fp8 with `allow_nonfinite` keeps NaN and
            saturates infinities), with `strict` a layer on the reference (named, with why).
    """
    config = QuantConfig.of(config)
    if isinstance(skip, str):
        skip = (skip,)
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False)
              if isinstance(module, nn.Linear) or dense_weight(module) is not None}  # fmt: skip
    layers |= find_stacks(model)
    for entry in skip:
        if entry not in DEFAULT_SKIP and not any(matches(entry, name) for name in layers):
            raise ValueError(f"quantize_model: skip entry {entry!r} matches no layer of the model")
    importance = importance or {}
    if unknown := importance.keys() - layers.keys():
        raise ValueError(f"quantize_model: importance names {min(unknown)!r}, which is no layer of "
                         f"the model")  # fmt: skip
    record = QuantizationRecord()
    unasked = {n: why for n, why in three_dimensional(model).items() if n not in layers}
    owners = _owners(model)
    made: dict[int, QuantLinear | QuantizedStack] = {}
    for name, module in layers.items():
        asked = next((entry for entry in skip if matches(entry, name)), None)
        if asked is not None:
            record.skipped[name] = f"asked for by skip={asked!r}"
        elif (reason := _why_not(module, owners)) is not None:
            unasked[name] = reason
        else:
            if id(module) not in made:
                made[id(module)] = _quantized(name, module, config, importance.get(name))
                if strict and (told := explain_layer(name, made[id(module)])).slow:
                    raise ValueError(f"quantize_model: strict, and {name or 'the model'} would run "
                                     f"the slow reference: {told.reason}")  # fmt: skip
            record.quantized[name] = config.format
    record.skipped.update(unasked)
    if not record.quantized:
        raise ValueError(f"quantize_model: nothing to quantize in {type(model).__name__} "
                         f"({len(record.skipped)} layers skipped): {record.skipped}")  # fmt: skip
    if unasked:
        warnings.warn("quantize_model leaves dense: " + "; ".join(
            f"{name} ({why})" for name, why in unasked.items()), stacklevel=2)  # fmt: skip
    if id(model) in made:
        model = made[id(model)]
    else:
        for name in record.quantized:
            _replace(model, name, layers[name], made[id(layers[name])])
    model.quantization_record = record
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module | Stack, quantized: nn.Module) -> None:
    if isinstance(layer, Stack):
        put(layer, quantized)
    else:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized)


def matches(entry: str, name: str) -> bool:
    return f".{entry}." in f".{name}."


def _quantized(name: str, module: nn.Module | Stack, config: QuantConfig,
               importance: torch.Tensor | None):  # fmt: skip
    try:
        if isinstance(module, Stack):
            return QuantizedStack.from_float(module.weight, config, transposed=module.transposed,
                                             importance=importance)  # fmt: skip
        made = QuantLinear.from_float(module, config, importance=importance)
    except ValueError as error:
        raise ValueError(f"quantize_model: {name or 'the model'}: {error}") from error
    return made.train(module.training)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The names under which each parameter stands in distinct modules."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{prefix}.{name}".lstrip("."))
    return owners


def _why_not(module: nn.Module | Stack, owners: dict[int, list[str]]) -> str | None:
    if not isinstance(module, Stack) and dense_weight(module) is None:
        return f"{type(module).__name__} is a subclass of Linear whose users may read its weight"
    if len(names := owners[id(module.weight)]) > 1:
        return f"its weight is shared: {', '.join(names)}"
    if module.weight.is_meta:
        return "its weight is on the meta device"
    return None


def three_dimensional(model: nn.Module) -> dict[str, str]:
    """Fused expert weights and the like: 3-D parameters of modules that torch does not define, also
    those that `find_stacks` knows."""
    return {
        f"{prefix}.{name}".lstrip(
            "."
        ): f"a parameter of shape {tuple(parameter.shape)}, not a layer"
        for prefix, module in model.named_modules()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
        and parameter.dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
