"""load_compressed: the model that transformers decompresses, run from the packed bytes."""

import json
import shutil

import pytest
import torch
from quantized_folders import CASES, dense_twin, write
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf import CheckpointError
from genai_perf.io import Checkpoint, ShardWriter, bitsandbytes, gptq
from genai_perf.nn import QuantLinear

IDS = torch.arange(1, 25).reshape(2, 12)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def quant_linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def close(model, dense):
    """Equal to rounding: the kernel sums in another order than BLAS."""
    expected = logits(dense)
    eps = torch.finfo(next(dense.parameters()).dtype).eps
    assert (logits(model) - expected).abs().max() <= 32 * eps * expected.abs().max()


@pytest.mark.parametrize("family, case", [
    *(("llama", case) for case in CASES), ("llama-tied", "int4"), ("gpt2", "nf4"), ("opt", "int8"),
    ("opt", "nf4-double"), ("gemma2", "int4"),
])  # fmt: skip
def test_logits_are_those_of_the_dequantized_model(saved, tmp_path, case, family):
    layers = write(case, saved(family), tmp_path / "dst")
    model = gp.load_compressed(tmp_path / "dst")
    assert quant_linears(model).keys() == layers.keys()
    close(model, dense_twin(saved(family), layers))


@pytest.mark.parametrize("case", ["int4", "mixed"])
def test_logits_are_those_of_transformers(saved, tmp_path, case):
    import transformers

    write(case, saved("qwen3"), tmp_path / "dst", max_shard_size="30KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst").eval()
    close(gp.load_compressed(tmp_path / "dst"), theirs)


@pytest.mark.parametrize("dtype, case", [
    (torch.bfloat16, "int4"), (torch.bfloat16, "nf4-double"), (torch.float16, "fp8"),
])  # fmt: skip
def test_half_precision(saved, tmp_path, case, dtype):
    source = saved("llama-tied", dtype)
    layers = write(case, source, tmp_path / "dst")
    model = gp.load_compressed(tmp_path / "dst")
    assert model.dtype == dtype and model(IDS).logits.dtype == dtype
    close(model, dense_twin(source, layers))
    wide = gp.load_compressed(tmp_path / "dst", dtype=torch.float32)
    assert wide(IDS).logits.dtype == torch.float32
    close(wide, dense_twin(source, layers, dtype=torch.float32))


def test_generates_what_the_dense_model_generates(saved, tmp_path):
    layers = write("int4", saved("llama"), tmp_path / "dst")
    model, dense = gp.load_compressed(tmp_path / "dst"), dense_twin(saved("llama"), layers)
    found = [m.generate(IDS, max_new_tokens=12, do_sample=False) for m in (model, dense)]
    assert found[0].shape == (2, 24) and torch.equal(*found)


def test_weights_are_never_dense(saved, tmp_path, monkeypatch):
    def refuse(self, dtype=None):
        raise AssertionError("a dense copy")

    write("int4", saved("llama"), tmp_path / "dst")
    monkeypatch.setattr("genai_perf.formats.QuantizedTensor.dequantize", refuse)
    model = gp.load_compressed(tmp_path / "dst")
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held <= 1.1 * Checkpoint(tmp_path / "dst").nbytes
    assert model(IDS).logits.isfinite().all()
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_the_files_may_go(saved, tmp_path):
    write("int4", saved("llama"), tmp_path / "dst")
    model = gp.load_compressed(tmp_path / "dst")
    expected = logits(model)
    for file in (tmp_path / "dst").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))  # in place: a mapped page would change
    assert torch.equal(logits(model), expected)


def test_backend(saved, tmp_path):
    layers = write("int8", saved("llama"), tmp_path / "dst")
    model = gp.load_compressed(tmp_path / "dst", backend="reference")
    assert {m.backend for m in quant_linears(model).values()} == {"reference"}
    close(model, dense_twin(saved("llama"), layers))
    with pytest.raises(ValueError, match="backend"):
        gp.load_compressed(tmp_path / "dst", backend="warp")(IDS)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dense_folder(saved, family):
    import transformers

    model = gp.load_compressed(saved(family))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(family)).eval()
    assert torch.equal(logits(model), logits(theirs))
    ours, expected = model.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def rewrite(source, dst, encode, quantization):
    """Another dialect of a folder that `write` made, without what has no place in it."""
    checkpoint = Checkpoint(source)
    from genai_perf.io.dialects import quantized_layers

    layers = quantized_layers(checkpoint)
    taken = {key for stored in layers.values() for key in stored.keys}
    with ShardWriter(dst, source=source) as writer:
        for name, stored in layers.items():
            writer.write(encode(name, stored.read(checkpoint)))
        for name in checkpoint.names():
            if name not in taken:
                writer.write({name: checkpoint.tensor(name)})
        writer.commit({**checkpoint.config, "quantization_config": quantization})


def test_gptq_folder(saved, tmp_path):
    layers = write("int4", saved("llama", torch.float16), tmp_path / "ct")
    config = gptq.quantization_config(bits=4, group_size=32)
    rewrite(tmp_path / "ct", tmp_path / "gptq", gptq.encode, config)
    model = gp.load_compressed(tmp_path / "gptq")
    assert quant_linears(model).keys() == layers.keys()
    assert torch.equal(logits(model), logits(gp.load_compressed(tmp_path / "ct")))


def test_bitsandbytes_int8_folder(saved, tmp_path):
    import transformers

    write("int8", saved("llama"), tmp_path / "ct")
    config = bitsandbytes.quantization_config(format="int8", dtype=torch.float32, skip=["lm_head"])
    rewrite(tmp_path / "ct", tmp_path / "bnb", bitsandbytes.encode, config)
    model = gp.load_compressed(tmp_path / "bnb")
    assert torch.equal(logits(model), logits(gp.load_compressed(tmp_path / "ct")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bnb").eval()
    expected = logits(model)  # LLM.int8 rounds the activations too
    assert (logits(theirs) - expected).abs().max() <= 0.05 * expected.abs().max()


def test_names_without_the_base_prefix(saved, tmp_path):
    write("nf4", saved("gpt2"), tmp_path / "dst")
    expected = logits(gp.load_compressed(tmp_path / "dst"))
    stored = load_file(tmp_path / "dst" / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(short, tmp_path / "dst" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(gp.load_compressed(tmp_path / "dst")), expected)


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def folder(saved, tmp_path):
    write("int4", saved("llama"), tmp_path / "dst")
    return tmp_path / "dst"


def edit(path, config=None, **tensors):
    stored = load_file(path / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            del stored[name]
        else:
            stored[name] = value
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    if config:
        found = json.loads((path / "config.json").read_text())
        config(found["quantization_config"])
        (path / "config.json").write_text(json.dumps(found))


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("config, tensors, words", [
    (lambda c: c.update(quant_method="magic"), {}, ("config.json", "'magic'", "gptq")),
    (lambda c: c.pop("config_groups"), {}, ("config.json", "config_groups")),
    (lambda c: c.update(ignore=["lm_head", UP]), {}, ("config.json", UP)),
    (None, {f"{UP}.weight_packed": None}, (f"{UP}.weight_packed", "missing")),
    (None, {f"{UP}.weight_scale": torch.full((128, 2), torch.nan)}, (UP, "nan", "[0, 0]")),
    (None, {f"{UP}.weight_packed": torch.zeros(128, 9, dtype=torch.int32)}, (UP, "[128, 8]")),
    (None, {f"{UP}.weight_shape": torch.tensor([64, 64])}, (UP, "[64, 8]")),
    (None, {f"{UP}.weight_shape": torch.tensor([-64, 64])}, (UP,)),
    (None, {f"{UP}.weight_shape": torch.tensor([1.0])}, (UP, "weight_shape")),
    (None, {"model.norm.weight": torch.full((64,), torch.inf)}, ("model.norm.weight", "inf")),
    (None, {"model.norm.weight": None}, ("model.norm.weight", "missing")),
    (None, {"extra.weight_scale": torch.ones(2, 2)}, ("extra",)),
])  # fmt: skip
def test_bad_folder(folder, config, tensors, words):
    edit(folder, config, **tensors)
    with pytest.raises(CheckpointError) as error:
        gp.load_compressed(folder)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_weight_of_another_shape_than_the_config_says(folder):
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight: .*\[96, 64\].*\[128, 64\]"):
        gp.load_compressed(folder)


def test_a_quantized_layer_that_the_model_does_not_have(folder):
    stored = load_file(folder / "model.safetensors")
    more = {name.replace("layers.1", "layers.9"): t for name, t in stored.items() if UP in name}
    edit(folder, **more)
    with pytest.raises(CheckpointError, match="layers.9.mlp.up_proj.*no linear layer"):
        gp.load_compressed(folder)


def test_truncated(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        gp.load_compressed(tmp_path / "copy")
