"""Checkpoints that others quantized, through transformers' own `from_pretrained`, run compressed.

transformers picks a quantizer by the method that config.json names, and offers no choice to the
call; inside `read_compressed` it picks the one below.
"""

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from .._checks import check_choice
from .._errors import CheckpointError
from ..io import awq, bitsandbytes, compressed_tensors, gptq
from ..io.checkpoints import Checkpoint
from ..io.dialects import quantized_layers
from ..nn import QuantizedWeight
from .expert_parts import stacked_biases
from .loading import place_quantized
from .quantizer import (
    Layers,
    base_quantizer,
    dense_names,
    in_bitsandbytes,
    in_compressed_tensors,
    quantized_parts,
)

NAME = "genai_perf_stored"
# Under which names transformers looks for the quantizers of each dialect.
_NAMES = {
    awq.METHOD: ("awq",),
    gptq.METHOD: ("gptq",),
    compressed_tensors.METHOD: ("compressed-tensors",),
    bitsandbytes.METHOD: ("bitsandbytes_4bit", "bitsandbytes_8bit"),
}


@contextmanager
def read_compressed(methods: Collection[str] = tuple(_NAMES)) -> Iterator[None]:
    """Inside, `from_pretrained` of a quantized checkpoint gives a model that runs from its bytes.

    Its linear layers are `genai_perf.nn.QuantLinear`, stacked experts `QuantizedStack`, on one
    device; nothing that transformers would import for the method is needed. `save_pretrained` of
    such a model, also outside, writes the dialect that was read (asymmetric GPTQ as version 2).
    `load_compressed` does the same without transformers' loader, for a folder.

    Args:
        methods: which `quant_method`s: of "awq", "gptq", "compressed-tensors", "bitsandbytes".

    Raises:
        ValueError: another method, or, from the call inside, more than one device.
        CheckpointError: from the call inside: see `load_compressed`.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known

    for method in methods:
        check_choice("read_compressed", "methods", method, tuple(_NAMES))
    mine = {name: _stored_config() for method in methods for name in _NAMES[method]}
    before = {name: known[name] for name in mine}
    known.update(mine)
    try:
        yield
    finally:
        known.update(before)


class _Hidden:
    """The quantized weights of a model, out of it while transformers loads the rest: it would take
    their tensors for missing ones, and make new ones."""

    def __init__(self, model: nn.Module):
        self.weights = [(module, name, child) for module in model.modules()
                        for name, child in module.named_children()
                        if isinstance(child, QuantizedWeight)]  # fmt: skip
        for module, name, _ in self.weights:
            module._modules[name] = nn.Module()

    def put_back(self, device: torch.device) -> None:
        for module, name, weight in self.weights:
            module._modules[name] = weight.to(device)
            for buffer in weight.buffers():
                buffer._is_hf_initialized = True


def _encoded(config: dict, layers: Layers, dense: list[str]) -> tuple[dict, dict]:
    """The tensors of the layers in the dialect of a `quantization_config`, and the one that goes
    with them."""
    match config["quant_method"]:
        case compressed_tensors.METHOD:
            groups = compressed_tensors.Groups(config, "quantization_config")
            return in_compressed_tensors(layers, dense, lambda n: groups.scheme(n).activations)
        case bitsandbytes.METHOD:
            return in_bitsandbytes(layers), config
        case awq.METHOD:
            encode = awq.encode
        case gptq.METHOD:
            asymmetric = any(qweight.zero_point is not None for _, qweight in layers)
            second = asymmetric or config.get("checkpoint_format") == "gptq_v2"
            encode = partial(gptq.encode, version=1 + second)
            config = config | {"checkpoint_format": "gptq_v2" if second else "gptq"}
    return {key: t for layer in layers for key, t in encode(*layer).items()}, config


@cache
def _stored_config() -> type:
    """The classes for transformers, made once: its own are known by then."""
    from transformers.quantizers.auto import register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class StoredConfig(QuantizationConfigMixin):
        """What config.json says, kept as it is."""

        def __init__(self, stored: dict):
            self.quant_method, self.stored = NAME, stored

        @classmethod
        def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
            config = cls(dict(config_dict))
            return (config, kwargs) if return_unused_kwargs else config

        def to_dict(self) -> dict:
            return dict(self.stored)

    @register_quantizer(NAME)
    class StoredQuantizer(base_quantizer()):
        def validate_environment(self, *args, device_map=None, **rest):
            if isinstance(device_map, dict) and len(set(device_map.values())) > 1:
                raise ValueError(f"read_compressed: device_map must name one device, "
                                 f"got {device_map}")  # fmt: skip

        def _process_model_before_weight_loading(self, model, checkpoint_files=None, **rest):
            if not checkpoint_files:
                raise CheckpointError("read_compressed: from_pretrained was given no checkpoint "
                                      "files: it needs a folder or repository")  # fmt: skip
            checkpoint = Checkpoint(Path(checkpoint_files[0]).parent)
            keys = [k for stored in quantized_layers(checkpoint).values() for k in stored.keys]
            if biases := stacked_biases(checkpoint, model):
                raise CheckpointError(f"{checkpoint.path}: {next(iter(biases))!r} is in parts, "
                                      f"which transformers' loader does not put together: use "
                                      f"load_compressed")  # fmt: skip
            with torch.device("cpu"):  # in place of transformers' meta device
                left = place_quantized(checkpoint, model, None)
            if left:
                raise CheckpointError(f"{checkpoint.path}: {next(iter(left))!r} is no linear layer "
                                      f"that transformers' loader can be spared: use "
                                      f"load_compressed")  # fmt: skip
            self.hidden = _Hidden(model)
            taken = "|".join(map(re.escape, keys))
            ignored = set(model._keys_to_ignore_on_load_unexpected or ())
            model._keys_to_ignore_on_load_unexpected = ignored | {f"^({taken})$"}

        def _process_model_after_weight_loading(self, model, **rest):
            self.hidden.put_back(model.device)
            del self.hidden
            return model

        def get_state_dict_and_metadata(self, model):
            state, layers = quantized_parts(model)
            config = self.quantization_config
            tensors, config.stored = _encoded(config.stored, layers, dense_names(model))
            return state | tensors, {}

        def is_serializable(self) -> bool:
            return True

    return StoredConfig
