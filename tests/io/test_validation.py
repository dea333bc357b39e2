"""Each rule stops the file that breaks it, and a good file passes; transformers is the witness."""

import json
import re

import pytest
import torch

from genai_perf import CheckpointError, formats
from genai_perf.io import ShardWriter, awq, bitsandbytes, compressed_tensors, gptq, validate

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def layers(name="int4", n=128, k=256, dtype=torch.float16, **options):
    torch.manual_seed(0)
    codec = formats.get(name)
    if name == "int4":
        options = {"group_size": 128, "scale_dtype": dtype, **options}
    weights = {f"model.layers.0.{leaf}": torch.randn(n, k).to(dtype) for leaf in NAMES}
    return {layer: codec.quantize(weight, **options) for layer, weight in weights.items()}


def folder(path, quantized, *, method="ct", int8="pack-quantized", change=None, dense="lm_head",
           lacks="?", **config):  # fmt: skip
    qt = next(iter(quantized.values()))
    if method == "ct":
        schemes = {n: compressed_tensors.scheme(t, int8=int8) for n, t in quantized.items()}
        found = compressed_tensors.quantization_config(schemes, ["lm_head"])
        parts = [compressed_tensors.encode(n, t, int8=int8) for n, t in quantized.items()]
    elif method == "gptq":
        found = gptq.quantization_config(bits=4, group_size=qt.group_size)
        parts = [gptq.encode(n, t) for n, t in quantized.items()]
    elif method == "awq":
        found = awq.quantization_config(group_size=qt.group_size, skip=["lm_head"])
        parts = [awq.encode(n, t) for n, t in quantized.items()]
    else:
        found = bitsandbytes.quantization_config(format=qt.format, dtype=qt.dtype, skip=["lm_head"])
        parts = [bitsandbytes.encode(n, t) for n, t in quantized.items()]
    if change:
        change(found)
    with ShardWriter(path / "m") as writer:
        for part in parts:
            writer.write({name: t for name, t in part.items() if not name.endswith(lacks)})
        writer.write({"model.embed_tokens.weight": torch.ones(8, 256).half(),
                      f"{dense}.weight": torch.ones(8, 256).half()})  # fmt: skip
        writer.commit({"model_type": "llama", "dtype": str(qt.dtype).removeprefix("torch."),
                       **config, "quantization_config": found})  # fmt: skip
    return path / "m"


@pytest.mark.parametrize("target", ["vllm", "transformers"])
@pytest.mark.parametrize("quantized, options", [
    (lambda: layers(), {}),
    (lambda: layers(), {"method": "gptq"}),
    (lambda: layers("fp8"), {}),
    (lambda: layers("fp8", granularity="block"), {}),
    (lambda: layers("int8"), {}),
    (lambda: layers("nf4"), {"method": "bnb"}),
    (lambda: layers(symmetric=False), {"method": "awq"}),
])  # fmt: skip
def test_good_files_pass(tmp_path, target, quantized, options):
    found = validate(folder(tmp_path, quantized(), **options), target)
    assert found.ok and found.layers == 4, str(found)
    assert str(found).startswith(f"4 quantized layers for {target}, tensor parallel 1: ok")


def mixed():
    return layers() | {"model.layers.0.k_proj": layers("int8")["model.layers.0.k_proj"]}


def without(name):
    return {key: qt for key, qt in layers().items() if key != name}


@pytest.mark.parametrize("target, quantized, options, words", [
    ("vllm", lambda: layers(), {"tp": 4}, "model.layers.0.o_proj: groups of 128 .* K / tp = 64"),
    ("vllm", lambda: layers(), {"tp": 3}, "o_proj: K = 256 does not divide by 3"),
    ("vllm", mixed, {}, "model.layers.0: layers that are fused .* k_proj int8"),
    ("vllm", lambda: layers("int8"), {"int8": "int-quantized"}, "int-quantized without"),
    ("vllm", lambda: layers(group_size=16), {"method": "gptq"}, "must be -1, 32, 64 or 128"),
    ("vllm", lambda: layers("nf4"), {"method": "bnb", "tp": 2}, "cannot be split over 2"),
    ("vllm", lambda: layers(), {"method": "awq", "tp": 4}, "groups of 128 .* K / tp = 64"),
    ("vllm", lambda: layers(group_size=16, dtype=torch.bfloat16), {"method": "awq"},
     "groups of 16 have the slow kernel, which takes float16 alone"),
    ("transformers", lambda: layers(), {"method": "awq", "dense": "model.layers.0.up_proj"},
     "up_proj: is dense: list it in modules_to_not_convert"),
    ("transformers", lambda: layers(), {"method": "awq", "lacks": ".qzeros"}, "has no qzeros"),
    ("vllm", lambda: layers(), {"method": "awq", "change": lambda c: c.update(version="gemv")},
     "version 'gemv' is not supported"),
    ("vllm", lambda: layers("fp8", granularity="block"), {"tp": 4}, "groups of 128"),
    ("vllm", lambda: layers("fp8", k=192, granularity="block"), {}, "blocks of 128 .* K = 192"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(sparsity_config={"format": "dense"})},
     "sparsity_config"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(ignore=["lm_head", "model.gone"])},
     "'model.gone', which is not in"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(ignore=["lm_head", "model.layers.0"])},
     "'model.layers.0', which is no leaf"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(ignore=[])}, "lm_head: is dense"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(config_groups={
        "g": c["config_groups"]["group_0"] | {"targets": ["re:.*proj", "model.layers.7.q_proj"]}})},
     "'model.layers.7.q_proj', which is not quantized"),
    ("vllm", lambda: layers(), {"change": lambda c: c.update(quant_method="exl2")}, "'exl2'"),
    ("vllm", lambda: layers("nf4"), {"method": "bnb",
     "change": lambda c: c.update(llm_int8_skip_modules=[])}, "lm_head: is dense"),
    ("transformers", lambda: layers(symmetric=False), {}, "q_proj.*: packed zero points"),
    ("transformers", lambda: layers(), {"model_type": "gpt2"}, "Conv1D"),
])  # fmt: skip
def test_each_error(tmp_path, target, quantized, options, words):
    options = dict(options)
    tp = options.pop("tp", 1)
    found = validate(folder(tmp_path, quantized(), **options), target, tp=tp)
    assert not found.ok
    assert any(re.search(words, error) for error in found.errors), str(found)
    assert "error:" in str(found)


@pytest.mark.parametrize("target, quantized, options, words", [
    ("vllm", lambda: layers(n=96), {}, "q_proj and 3 more: 96 x 256 a rank is not a multiple"),
    ("vllm", lambda: layers("int8"), {}, "fp32 scales are rounded to torch.float16"),
    ("transformers", lambda: layers("fp8"), {}, "fp32 scales are rounded"),
    ("transformers", lambda: layers("nf4", k=96), {"method": "bnb"}, "no multiple of 64"),
    ("transformers", lambda: layers(), {"method": "gptq"}, "gptqmodel"),
    ("transformers", lambda: layers(), {"method": "awq"}, "gptqmodel"),
    ("transformers", lambda: layers(dtype=torch.bfloat16), {"method": "awq"}, "in float16 on"),
    ("vllm", lambda: layers(n=96), {"method": "awq"}, "96 x 256 a rank is not a multiple"),
    ("vllm", lambda: layers(), {"method": "awq", "change": lambda c: c.update(zero_point=False)},
     "zero_point is False"),
    ("vllm", lambda: layers(), {"method": "gptq", "change": lambda c: c.update(sym=False)}, "sym"),
])  # fmt: skip
def test_each_note(tmp_path, target, quantized, options, words):
    found = validate(folder(tmp_path, quantized(), **options), target)
    assert found.ok and any(words in note for note in found.notes), str(found)


def test_a_damaged_folder_raises_and_a_dense_one_passes(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        validate(tmp_path / "none", "vllm")
    path = folder(tmp_path, layers())
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    assert validate(path, "vllm").ok
    with pytest.raises(ValueError, match="target must be one of 'vllm', 'transformers'"):
        validate(path, "sglang")
    with pytest.raises(ValueError, match="tp must be positive"):
        validate(path, "vllm", tp=0)
