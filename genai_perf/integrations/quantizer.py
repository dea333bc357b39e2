"""transformers' `quantization_config=GenaiPerfConfig("nf4")`: weights quantized as they are read.

Registered under the name "genai_perf" when `genai_perf.integrations.transformers` is imported. A
saved model carries no such name: it is written as bitsandbytes (nf4, fp4) or compressed-tensors
(int2 to int4, int8, fp8), which transformers and vLLM load without this package.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from ..compression import rtn
from ..formats import QuantizedTensor
from ..io import bitsandbytes, compressed_tensors
from ..nn import QuantConfig, QuantizationRecord, QuantizedStack, QuantizedWeight, QuantLinear
from ..nn.experts import Stack, find_stacks, put
from ..nn.linear import dense_weight
from ..nn.model import DEFAULT_SKIP, matches, three_dimensional
from ..ops.quantize import dequantize
from .expert_parts import stored_parts

NAME = "genai_perf"
STORED = ("nf4", "fp4", "int4", "int3", "int2", "int8", "fp8")


class LoadingQuantizer:
    """What the class of transformers asks: which layers, each as it comes, and what is saved."""

    def __init__(self, config: QuantConfig, skip: tuple[str, ...]):
        self.config, self.skip = config, skip
        self.record = QuantizationRecord()
        self.wanted: set[str] = set()
        self.stacks: dict[str, Stack] = {}

    def choose(self, model: nn.Module, others: list[str]) -> None:
        """Settles which linear layers and stacks of experts of a model without weights are
        quantized; `others` are left dense too."""
        linears = {n: m for n, m in model.named_modules() if dense_weight(m) is not None}
        self.stacks = find_stacks(model)
        linears |= self.stacks
        for entry in self.skip:
            if entry not in DEFAULT_SKIP and not any(matches(entry, name) for name in linears):
                raise ValueError(f"GenaiPerfConfig: skip entry {entry!r} matches no linear layer "
                                 f"of {type(model).__name__}")  # fmt: skip
        for name in linears:
            asked = next((e for e in self.skip if matches(e, name)), None)
            if asked is not None:
                self.record.skipped[name] = f"asked for by skip={asked!r}"
            elif any(matches(entry, name) for entry in others):
                self.record.skipped[name] = "transformers keeps it: tied, a head, or float32"
            else:
                self.wanted.add(name)
        if not self.wanted:
            raise ValueError(f"GenaiPerfConfig: {type(model).__name__} has no linear layer to "
                             f"quantize ({len(self.record.skipped)} are skipped)")  # fmt: skip
        experts = {n: w for n, w in three_dimensional(model).items() if n not in linears}
        self.record.skipped.update(experts)
        if experts:
            warnings.warn("GenaiPerfConfig leaves dense: " + "; ".join(
                f"{name} ({why})" for name, why in experts.items()), stacklevel=2)  # fmt: skip

    def place(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """The quantized layer, in the place of the linear one or the stack `name`."""
        stack = self.stacks.get(name)
        if stack is not None:
            experts = [self._quantize(name, m.T.contiguous() if stack.transposed else m)
                       for m in weight]  # fmt: skip
            made = QuantizedStack(experts, transposed=stack.transposed,
                                  activations=self.config.activations,
                                  threshold=self.config.threshold)  # fmt: skip
            put(stack, made)
        else:
            linear = model.get_submodule(name)
            weight = weight if isinstance(linear, nn.Linear) else weight.T.contiguous()
            n, k = weight.shape
            made = QuantLinear(k, n, self._quantize(name, weight), linear.bias,
                               activations=self.config.activations,
                               threshold=self.config.threshold)  # fmt: skip
            model.set_submodule(name, made.train(linear.training))
        for buffer in made.buffers():
            buffer._is_hf_initialized = True
        self.record.quantized[name] = self.config.format

    def _quantize(self, name: str, weight: torch.Tensor) -> QuantizedTensor:
        config = self.config
        if config.search:
            try:
                return replace(config, scale_dtype=weight.dtype).quantize(weight)
            except ValueError as error:
                raise ValueError(f"GenaiPerfConfig: {name}: {error}") from error
        qweight = rtn.solve(
            weight, None, format=config.format, group_size=config.group_size,
            symmetric=config.symmetric, double_quant=config.double_quant,
            granularity=config.granularity, scale_dtype=weight.dtype,
            allow_nonfinite=config.allow_nonfinite, name=name,
        ).qweight  # fmt: skip
        return replace(qweight, dtype=weight.dtype)

    def stored(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
        """The state dict of a checkpoint that others read, and its `quantization_config`."""
        state, layers = quantized_parts(model)
        dense = dense_names(model)
        if self.config.format in bitsandbytes.BOOKS:
            return state | in_bitsandbytes(layers), bitsandbytes.quantization_config(
                dtype=model.dtype,
                skip=dense,
                format=self.config.format,
                double_quant=self.config.double_quant,
            )
        rounds = self.config.activations is not None
        tensors, config = in_compressed_tensors(layers, dense, lambda name: rounds)
        return state | tensors, config


Layers = list[tuple[str, QuantizedTensor]]


def quantized_parts(model: nn.Module) -> tuple[dict[str, torch.Tensor], Layers]:
    """The state dict without quantized weights, and those, each expert by itself, by the names that
    a checkpoint gives them."""
    state, layers = model.state_dict(), []
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            layers.append((name, module.weight.tensor()))
        elif isinstance(module, QuantizedStack):
            layers += stored_parts(model, name, module)
        if isinstance(module, QuantizedWeight):
            for key in module.tensor().state_dict(f"{name}."):
                del state[key]
    return state, layers


def dense_names(model: nn.Module) -> list[str]:
    """The linear layers that are not quantized."""
    return [n for n, m in model.named_modules() if dense_weight(m) is not None]


def in_bitsandbytes(layers: Layers) -> dict[str, torch.Tensor]:
    """The tensors of a bitsandbytes checkpoint."""
    encoded = {k: t for layer in layers for k, t in bitsandbytes.encode(*layer).items()}
    # The maps are the same tensor for all layers, which save_pretrained refuses.
    return {k: t.clone() if "quant_map" in k else t for k, t in encoded.items()}


def in_compressed_tensors(layers: Layers, dense: list[str],
                          rounds: Callable[[str], bool]) -> tuple[dict, dict]:  # fmt: skip
    """The tensors of a compressed-tensors checkpoint, and its `quantization_config`; `rounds`:
    whether a server is to round the inputs of a layer to 8 bits."""
    schemes = {name: compressed_tensors.scheme(qweight)._replace(activations=rounds(name))
               for name, qweight in layers}  # fmt: skip
    tensors = {k: t for layer in layers for k, t in compressed_tensors.encode(*layer).items()}
    return tensors, compressed_tensors.quantization_config(schemes, dense)


def dense_again(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """Every QuantLinear as an nn.Linear of what it stands for, every stack of experts as its
    parameter, in place."""
    if isinstance(dtype, str):  # what save_pretrained leaves in the config
        dtype = getattr(torch, dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(dequantize(layer.weight.tensor(), dtype))
            linear.bias = layer.bias
            model.set_submodule(name, linear.train(layer.training))
        elif isinstance(layer, QuantizedStack):
            above, _, leaf = name.rpartition(".")
            owner = model.get_submodule(above)
            delattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(layer.dequantize(dtype)))
    return model


@cache
def base_quantizer() -> type:
    """What the quantizers here have in common, a class for transformers: quantized layers can be
    trained through, compiled, and made dense again."""
    from transformers.quantizers import HfQuantizer

    class BaseQuantizer(HfQuantizer):
        def _dequantize(self, model, dtype=None):
            return dense_again(model, dtype)

        @property
        def is_trainable(self) -> bool:
            return True

        @property
        def is_compileable(self) -> bool:
            return True

    return BaseQuantizer


@cache
def register() -> type:
    """Makes the name known to transformers; gives GenaiPerfConfig."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(NAME)
    class GenaiPerfConfig(QuantizationConfigMixin):
        """`from_pretrained(..., quantization_config=GenaiPerfConfig("nf4"))`.

        Args:
            format: one of "nf4", "fp4", "int4", "int3", "int2", "int8", "fp8", or another of
                `genai_perf.formats.FORMATS`, which no checkpoint holds.
            skip: layers to leave dense, as `genai_perf.quantize_model` takes them.
            group_size, double_quant, symmetric, granularity, activations, threshold, search,
                allow_nonfinite: as QuantConfig.

        Raises:
            ValueError: an option that the format does not have.
            RuntimeError: while loading; transformers' report names the weight that has an infinity
                or NaN (fp8 with `allow_nonfinite` keeps NaN, and infinities saturate).
        """

        def __init__(self, format: str = "nf4", *, skip: tuple[str, ...] = DEFAULT_SKIP,
                     group_size: int | None = None, double_quant: bool = False,
                     symmetric: bool = True, granularity: str | None = None,
                     activations: str | None = None, threshold: float = 0.0,
                     search: bool = False, allow_nonfinite: bool = False):  # fmt: skip
            self.quant_method = NAME
            self.skip = (skip,) if isinstance(skip, str) else tuple(skip)
            self.options = QuantConfig(format, group_size, double_quant, symmetric, granularity,
                                       activations=activations, threshold=threshold,
                                       search=search,
                                       allow_nonfinite=allow_nonfinite)  # fmt: skip
            self.stored: dict | None = None  # what a saved checkpoint says instead

        def to_dict(self) -> dict:
            if self.stored is not None:
                return self.stored
            return {"quant_method": NAME, "format": self.options.format, "skip": list(self.skip)}

    class Quantize(ConversionOps):
        def __init__(self, quantizer):
            self.quantizer = quantizer

        def convert(self, input_dict, model=None, missing_keys=None, **rest):
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                self.quantizer.loading.place(model, name.removesuffix(".weight"), weight)
                missing_keys.discard(name)
            return {}

    @register_quantizer(NAME)
    class GenaiPerfQuantizer(base_quantizer()):
        def __init__(self, quantization_config, **rest):
            super().__init__(quantization_config, **rest)
            self.loading = LoadingQuantizer(quantization_config.options, quantization_config.skip)

        def validate_environment(self, *args, device_map=None, **rest):
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise ValueError("GenaiPerfConfig: quantized layers cannot be left on the disk; "
                                 "give a device_map without 'disk'")  # fmt: skip

        def _process_model_before_weight_loading(self, model, **rest):
            kept = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            self.loading.choose(model, kept)

        def param_needs_quantization(self, model, param_name: str, **rest) -> bool:
            return param_name.removesuffix(".weight") in self.loading.wanted

        def get_quantize_ops(self):
            return Quantize(self)

        def _process_model_after_weight_loading(self, model, **rest):
            model.quantization_record = self.loading.record
            return model

        def get_state_dict_and_metadata(self, model):
            state, self.quantization_config.stored = self.loading.stored(model)
            return state, {}

        def is_serializable(self) -> bool:
            return self.quantization_config.options.format in STORED

    return GenaiPerfConfig
