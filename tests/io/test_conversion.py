"""Between dialects without loss: the codes and scales of every layer survive, or it is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from genai_perf import CheckpointError, formats
from genai_perf.io import (
    Checkpoint,
    ShardWriter,
    bitsandbytes,
    compressed_tensors,
    convert,
    gptq,
)
from genai_perf.io.dialects import quantized_layers

LAYERS = ("model.layers.0.q_proj", "model.layers.0.k_proj", "model.layers.1.q_proj")


def quantize(name, **options):
    torch.manual_seed(0)
    weights = [(torch.randn(16, 64) * 0.05).half() for _ in LAYERS]
    codec = formats.get(name)
    return {layer: codec.quantize(w, **options) for layer, w in zip(LAYERS, weights, strict=True)}


def int4(**options):
    return quantize("int4", group_size=32, scale_dtype=torch.float16, **options)


def exact_int8():
    """int8 with scales that fp16 has, so that GPTQ can hold them."""
    layers = quantize("int8")
    for qt in layers.values():
        qt.scale = qt.scale.half().float()
    return layers


def folder(path, method, layers):
    dense = {"model.embed_tokens.weight": torch.randn(8, 64).half(),
             "model.layers.0.gate.weight": torch.randn(4, 64).half(),
             "model.norm.weight": torch.ones(64).half()}  # fmt: skip
    skip = ["lm_head", "model.layers.0.gate"]
    qt = next(iter(layers.values()))
    if method == "compressed-tensors":
        encode = compressed_tensors.encode
        schemes = {name: compressed_tensors.scheme(qt) for name, qt in layers.items()}
        config = compressed_tensors.quantization_config(schemes, skip)
    elif method == "gptq":
        encode = gptq.encode
        config = gptq.quantization_config(bits=4 if qt.format == "int4" else 8,
                                          group_size=qt.group_size)  # fmt: skip
    else:
        encode = bitsandbytes.encode
        config = bitsandbytes.quantization_config(
            format=qt.format, dtype=torch.float16, skip=skip,
            double_quant=qt.nested_scale is not None)  # fmt: skip
    with ShardWriter(path) as writer:
        for name, qt in layers.items():
            writer.write(encode(name, qt))
        writer.write(dense)
        writer.write_json("tokenizer.json", {"a": 1})
        writer.commit({"model_type": "llama", "dtype": "float16", "quantization_config": config})
    return dense


def same_layers(path, layers):
    checkpoint = Checkpoint(path)
    found = quantized_layers(checkpoint)
    assert found.keys() == layers.keys()
    for name, qt in layers.items():
        back = found[name].read(checkpoint)
        assert back.format == qt.format and back.group_size == qt.group_size
        assert back.components().keys() == qt.components().keys()
        for part, tensor in qt.components().items():
            other = getattr(back, part)
            if tensor.dtype == torch.float8_e4m3fn:
                other, tensor = other.view(torch.uint8), tensor.view(torch.uint8)
            assert torch.equal(other, tensor), (name, part)
            assert other.stride() == tensor.stride(), (name, part)


@pytest.mark.parametrize("source, to, layers", [
    ("compressed-tensors", "gptq", int4),
    ("gptq", "compressed-tensors", int4),
    ("compressed-tensors", "gptq", exact_int8),
    ("compressed-tensors", "bitsandbytes", lambda: quantize("int8")),
    ("bitsandbytes", "compressed-tensors", lambda: quantize("int8")),
    ("compressed-tensors", "compressed-tensors", lambda: quantize("fp8")),
    ("bitsandbytes", "bitsandbytes", lambda: quantize("nf4", double_quant=True)),
])  # fmt: skip
def test_round_trip(tmp_path, source, to, layers):
    layers = layers()
    dense = folder(tmp_path / "a", source, layers)
    assert convert(tmp_path / "a", tmp_path / "b", to, max_shard_size="4KB") == tmp_path / "b"
    same_layers(tmp_path / "b", layers)
    checkpoint = Checkpoint(tmp_path / "b")
    for name, tensor in dense.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.quantization["quant_method"] == to
    assert (tmp_path / "b" / "tokenizer.json").exists()
    convert(tmp_path / "b", tmp_path / "c", source)
    same_layers(tmp_path / "c", layers)


def test_int8_layouts_of_compressed_tensors(tmp_path):
    layers = quantize("int8")
    folder(tmp_path / "a", "compressed-tensors", layers)
    convert(tmp_path / "a", tmp_path / "b", "compressed-tensors", int8="pack-quantized")
    assert Checkpoint(tmp_path / "b").quantization["format"] == "pack-quantized"
    same_layers(tmp_path / "b", layers)


def test_dense(tmp_path):
    layers = int4()
    dense = folder(tmp_path / "a", "gptq", layers)
    convert(tmp_path / "a", tmp_path / "b", "dense")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert stored.keys() == dense.keys() | {f"{name}.weight" for name in layers}
    for name, qt in layers.items():
        assert torch.equal(stored[f"{name}.weight"], qt.dequantize(torch.float16))
    assert "quantization_config" not in Checkpoint(tmp_path / "b").config
    with pytest.raises(CheckpointError, match="is dense: there is nothing to convert"):
        convert(tmp_path / "b", tmp_path / "c", "gptq")


def test_configs_name_what_is_not_quantized(tmp_path):
    folder(tmp_path / "a", "compressed-tensors", int4())
    convert(tmp_path / "a", tmp_path / "b", "gptq")
    config = json.loads((tmp_path / "b" / "quantize_config.json").read_text())
    assert config == Checkpoint(tmp_path / "b").quantization
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert r"-:^model\.layers\.0\.gate$" in config["dynamic"]
    convert(tmp_path / "b", tmp_path / "c", "compressed-tensors")
    assert {"lm_head", "model.layers.0.gate"} <= {
        *Checkpoint(tmp_path / "c").quantization["ignore"]
    }


@pytest.mark.parametrize("layers, to, words", [
    (lambda: int4(), "bitsandbytes", "holds nf4, fp4 and int8, got int4"),
    (lambda: int4(symmetric=False), "gptq", "asymmetric int4"),
    (lambda: quantize("fp8"), "gptq", "got fp8"),
    (lambda: quantize("int8"), "gptq", "scales as fp16 or bf16"),
    (lambda: int4() | {LAYERS[1]: quantize("int8")[LAYERS[1]]}, "bitsandbytes", "got int4"),
    (lambda: int4() | {LAYERS[1]: exact_int8()[LAYERS[1]]}, "gptq", "one scheme"),
])  # fmt: skip
def test_what_cannot_be_held_is_refused_by_name(tmp_path, layers, to, words):
    folder(tmp_path / "a", "compressed-tensors", layers())
    with pytest.raises(CheckpointError, match=f"model.layers.[01].[qk]_proj: .*{words}"):
        convert(tmp_path / "a", tmp_path / "b", to)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a"]


def test_refused(tmp_path):
    folder(tmp_path / "a", "compressed-tensors", int4())
    with pytest.raises(ValueError, match="convert: to must be one of .*'gptq'.*, got 'exl2'"):
        convert(tmp_path / "a", tmp_path / "b", "exl2")
    with pytest.raises(CheckpointError, match="exists"):
        convert(tmp_path / "a", tmp_path / "a", "gptq")
