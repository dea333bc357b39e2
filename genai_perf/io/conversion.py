"""A quantized checkpoint in another dialect, layer by layer, without loss or not at all."""

from functools import partial
from pathlib import Path

import torch

from .._checks import check_choice
from .._errors import CheckpointError
from ..formats import QuantizedTensor
from . import awq, bitsandbytes, compressed_tensors, gptq
from .checkpoints import CONFIG, Checkpoint, check_finite
from .dialects import quantized_layers
from .writer import ShardWriter

GPTQ_V2 = "gptq_v2"
TARGETS = (compressed_tensors.METHOD, gptq.METHOD, GPTQ_V2, awq.METHOD, bitsandbytes.METHOD,
           "dense")  # fmt: skip
# Models whose linear layers are Conv1D: their dense weight is stored transposed.
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Families whose dense experts are stored in stacks, by transformers 5.23's table of conversions.
STACKED_MODELS = (
    "aria", "diffusion_gemma", "dots3_note", "gemma4", "gpt_oss", "granitemoe", "granitemoehybrid",
    "granitemoeshared", "granitemoe_swa", "hy_v4", "inkling", "inkling2", "llama4", "mistral4",
    "mistral_large4", "muse_spark", "openai_privacy_filter", "qwen3_5_moe", "qwen3_vl_moe",
    "qwen4_exp", "step3p7", "unlimited_ocr", "zaya",
)  # fmt: skip
_BATCH = 256 << 20  # bytes of tensors that wait to be written as one part


def convert(src: str | Path, dst: str | Path, to: str, *, int8: str = "int-quantized",
            max_shard_size: int | str = "5GB") -> Path:  # fmt: skip
    """Writes the quantized checkpoint `src` in the dialect `to`; one layer in memory at a time.

    The codes and scales stay what they are: int4 goes between compressed-tensors, GPTQ (version 1
    only symmetric) and AWQ, int8 between compressed-tensors, GPTQ and bitsandbytes, nf4 and fp4 are
    bitsandbytes' own. "dense" writes the
    dequantized weights, rounded once to the dtype of the model.

    Args:
        src: quantized checkpoint folder.
        dst: folder to create.
        to: "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes" or "dense".
        int8: layout of int8 weights in compressed-tensors, see `compressed_tensors.scheme`.
        max_shard_size: see `ShardWriter`.

    Returns:
        Path: `dst`.

    Raises:
        CheckpointError: `src` is damaged or dense, or holds what `to` cannot, named by layer;
            nothing is left of `dst` then.
    """
    check_choice("convert", "to", to, TARGETS)
    checkpoint = Checkpoint(src)
    layers = quantized_layers(checkpoint)
    if not layers:
        raise CheckpointError(f"{checkpoint.path}: is dense: there is nothing to convert")
    kind = str(checkpoint.config.get("model_type"))
    apart = next((name for name in layers if compressed_tensors.EXPERT.search(name)), None)
    if to == "dense" and apart and kind.removesuffix("_text") in STACKED_MODELS:
        raise CheckpointError(f"{apart}: dense checkpoints of {kind} hold experts in stacks, which "
                              f"convert does not put together")  # fmt: skip
    taken = {key for stored in layers.values() for key in stored.keys}
    others = [name for name in checkpoint.names() if name not in taken]
    dtype = model_dtype(checkpoint)
    target = _Target(to, int8, dtype, kind in CONV1D_MODELS)
    with ShardWriter(dst, source=checkpoint.path, max_shard_size=max_shard_size) as writer:
        batch = _Batch(writer)
        for name, stored in layers.items():
            batch.add(target.encode(name, stored.read(checkpoint, dtype)))
        for name in others:
            tensor = checkpoint.tensor(name)
            check_finite(name, tensor)
            batch.add({name: tensor})
        batch.flush()
        config = {key: value for key, value in checkpoint.config.items()
                  if key != "quantization_config"}  # fmt: skip
        if to != "dense":
            config["quantization_config"] = target.config(dense_linears(checkpoint, others))
        if to in (gptq.METHOD, GPTQ_V2):
            writer.write_json(gptq.QUANTIZE_CONFIG, config["quantization_config"])
        return writer.commit(config)


class _Target:
    """One dialect: encodes layers, remembers what they were, and writes the config of them all."""

    def __init__(self, to: str, int8: str, dtype: torch.dtype, transposed: bool):
        self.to, self.int8, self.dtype, self.transposed = to, int8, dtype, transposed
        self.schemes: dict[str, compressed_tensors.Scheme] = {}
        self.common: tuple | None = None

    def encode(self, name: str, qt: QuantizedTensor) -> dict[str, torch.Tensor]:
        if self.to == "dense":
            weight = qt.dequantize()
            return {f"{name}.weight": weight.T.contiguous() if self.transposed else weight}
        if self.to == compressed_tensors.METHOD:
            if self.transposed:
                raise CheckpointError(f"{name}: {self.to} has no layout for Conv1D layers")
            self.schemes[name] = compressed_tensors.scheme(qt, int8=self.int8)
            return compressed_tensors.encode(name, qt, int8=self.int8)
        encoders = {gptq.METHOD: gptq.encode, GPTQ_V2: partial(gptq.encode, version=2),
                    awq.METHOD: awq.encode, bitsandbytes.METHOD: bitsandbytes.encode}  # fmt: skip
        tensors = encoders[self.to](name, qt)
        size = -1 if qt.group_size == qt.shape[1] else qt.group_size
        options = (qt.format, size, qt.nested_scale is not None)
        if options != (self.common or options):
            raise CheckpointError(f"{name}: {self.to} has one scheme for all layers, this is "
                                  f"{options[:2]} after {self.common[:2]}")  # fmt: skip
        self.common = options
        return tensors

    def config(self, skip: list[str]) -> dict:
        if self.to == compressed_tensors.METHOD:
            return compressed_tensors.quantization_config(self.schemes, skip)
        form, group_size, nested = self.common
        if self.to == awq.METHOD:
            return awq.quantization_config(group_size=group_size, skip=skip)
        if self.to in (gptq.METHOD, GPTQ_V2):
            inside = [name for name in skip if name != "lm_head"]
            return gptq.quantization_config(bits=4 if form == "int4" else 8,
                                            group_size=group_size, skip=inside,
                                            version=1 + (self.to == GPTQ_V2))  # fmt: skip
        return bitsandbytes.quantization_config(format=form, dtype=self.dtype, skip=skip,
                                                double_quant=nested)  # fmt: skip


class _Batch:
    """Collects small tensors into parts of a few hundred megabytes."""

    def __init__(self, writer: ShardWriter):
        self.writer, self.tensors, self.nbytes = writer, {}, 0

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors |= tensors
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.nbytes >= _BATCH:
            self.flush()

    def flush(self) -> None:
        self.writer.write(self.tensors)
        self.tensors, self.nbytes = {}, 0


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that config.json gives the model; fp32 where it says none."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    dtypes = {str(d).removeprefix("torch."): d
              for d in (torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip
    if name not in dtypes:
        raise CheckpointError(f"{checkpoint.path / CONFIG}: dtype must be one of "
                              f"{', '.join(dtypes)}, got {name!r}")  # fmt: skip
    return dtypes[name]


def dense_linears(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """Modules among `names` that may be linear layers, by their 2-d weights; lm_head always."""
    found = {name.removesuffix(".weight") for name in names
             if name.endswith(".weight") and len(checkpoint.info(name).shape) == 2}  # fmt: skip
    return sorted({*found, "lm_head"})
