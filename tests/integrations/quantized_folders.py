"""Folders quantized by the reference codecs, through the pieces that compression uses."""

from pathlib import Path

import torch

from genai_perf import formats
from genai_perf.integrations.transformers import CheckpointModel
from genai_perf.io import ShardWriter, bitsandbytes, compressed_tensors

# case -> (dialect, format, options)
CASES = {
    "int4": ("ct", "int4", dict(group_size=32)),
    "int4-asymmetric": ("ct", "int4", dict(group_size=32, symmetric=False)),
    "int4-channel": ("ct", "int4", dict(group_size=-1)),
    "int8": ("ct", "int8", {}),
    "int8-packed": ("ct", "int8", {}),
    "fp8": ("ct", "fp8", {}),
    "fp8-tensor": ("ct", "fp8", dict(granularity="tensor")),
    "mixed": ("ct", None, {}),
    "nf4": ("bnb", "nf4", {}),
    "nf4-double": ("bnb", "nf4", dict(double_quant=True)),
}


def write(case: str, source: Path, dst: Path, max_shard_size: int | str = "5GB") -> dict:
    """Writes the folder and returns {layer: QuantizedTensor}. `mixed` alternates int4 and int8."""
    dialect, name, options = CASES[case]
    model = CheckpointModel(source)
    layers, schemes, skip = {}, {}, ["lm_head"]
    int8 = "pack-quantized" if case == "int8-packed" else "int-quantized"
    with ShardWriter(dst, source=source, max_shard_size=max_shard_size) as writer:
        for i in range(len(model.blocks)):
            model.load_block(i)
            tensors = model.block_tensors(i)
            for n, (layer, linear) in enumerate(model.linears(i).items()):
                weight = tensors.pop(f"{layer}.weight")
                weight = model.get_weight(linear).to(weight.dtype).contiguous()
                if case == "mixed":
                    name, options = (("int4", dict(group_size=32)), ("int8", {}))[n % 2]
                given = dict(options)
                if name == "int4":
                    given["scale_dtype"] = weight.dtype
                qt = layers[layer] = formats.get(name).quantize(weight, **given)
                if dialect == "bnb":
                    tensors |= bitsandbytes.encode(layer, qt)
                else:
                    tensors |= compressed_tensors.encode(layer, qt, int8=int8)
                    schemes[layer] = compressed_tensors.scheme(qt, int8=int8)
            writer.write(tensors)
            model.free_block(i)
        writer.write(dict(model.other_tensors()))
        if dialect == "bnb":
            config = bitsandbytes.quantization_config(
                double_quant=bool(options), dtype=model.dtype, skip=skip)  # fmt: skip
        else:
            config = compressed_tensors.quantization_config(schemes, skip)
        writer.commit({**model.checkpoint.config, "quantization_config": config})
    return layers


def dense_twin(source: Path, layers: dict, dtype: torch.dtype | None = None):
    """The dense transformers model with the dequantized weights in place."""
    import transformers
    from transformers.pytorch_utils import Conv1D

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto").eval()
    for layer, qt in layers.items():
        module = model.get_submodule(layer)
        weight = qt.dequantize(module.weight.dtype)
        module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
    return model
