"""Block by block is the full model to the last bit, for every family, with no code for any."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES

from genai_perf import CalibrationError, CheckpointError
from genai_perf.integrations.transformers import CheckpointModel
from genai_perf.io import Checkpoint, ShardWriter


def reference(path):
    import transformers

    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(path).eval()
    model.set_experts_implementation("eager")  # the others round otherwise
    for parameter in model.parameters():  # out of the mapped file: BLAS rounds by alignment
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def batches(*shapes):
    torch.manual_seed(1)
    return [torch.randint(1, 96, shape) for shape in shapes]


def run(model: CheckpointModel, ids):
    """Hidden states before each block and after the last: [block][batch]."""
    inputs = model.block_inputs(ids)
    states = [inputs.hidden]
    for i in range(len(model.blocks)):
        model.load_block(i)
        calls = zip(states[-1], inputs.kwargs[i], strict=True)
        states.append([model.forward_block(i, hidden, call) for hidden, call in calls])
        model.free_block(i)
    return states


@pytest.mark.parametrize("family, dtype", [
    *((family, torch.float32) for family in FAMILIES),
    ("llama", torch.bfloat16), ("gemma2", torch.bfloat16), ("gpt2", torch.float16),
])  # fmt: skip
def test_block_by_block_is_the_full_model(saved, family, dtype):
    path = saved(family, dtype)
    model, full = CheckpointModel(path), reference(path)
    ids = batches((2, 13), (1, 9), (2, 13))
    states = run(model, ids)
    assert model.dtype == dtype and len(model.blocks) == 3
    for b, batch in enumerate(ids):
        with torch.no_grad():
            expected = full(input_ids=batch, output_hidden_states=True, use_cache=False)
        for i in range(len(model.blocks)):
            assert torch.equal(states[i][b], expected.hidden_states[i]), (i, b)
        assert torch.equal(model.logits(batch, states[-1][b]), expected.logits)


def test_masks_differ_by_layer_and_equal_ones_are_one_object(saved):
    inputs = CheckpointModel(saved("gemma2")).block_inputs(batches((2, 13), (2, 13), (2, 13)))
    masks = [calls[0]["attention_mask"] for calls in inputs.kwargs]
    assert masks[0] is None or not torch.equal(masks[0], masks[1])  # sliding, full, sliding
    assert all(call is calls[0] for calls in inputs.kwargs for call in calls)


def test_nothing_stays_loaded(saved):
    model = CheckpointModel(saved("llama-tied"))
    run(model, batches((1, 5)))
    assert all(p.device.type == "meta" for p in model.model.parameters())
    model.load_block(1)
    loaded = [name for name, p in model.model.named_parameters() if p.device.type != "meta"]
    assert loaded and all(name.startswith("model.layers.1.") for name in loaded)
    assert all(b.device.type != "meta" for b in model.model.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_written_again_it_is_the_same_model(saved, tmp_path, family):
    path = saved(family)
    model = CheckpointModel(path)
    with ShardWriter(tmp_path / "out", source=path, max_shard_size="40KB") as writer:
        for i in range(len(model.blocks)):
            model.load_block(i)
            writer.write(model.block_tensors(i))
            model.free_block(i)
        for name, tensor in model.other_tensors():
            writer.write({name: tensor})
        writer.commit(model.checkpoint.config)
    assert not model.unused
    before, after = reference(path).state_dict(), reference(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = batches((1, 7))[0]
    with torch.no_grad():
        assert torch.equal(reference(tmp_path / "out")(ids).logits, reference(path)(ids).logits)


def test_dtype_of_computation_and_of_storage(saved):
    model = CheckpointModel(saved("llama", torch.bfloat16), dtype=torch.float32)
    block = model.load_block(0)
    assert {p.dtype for p in block.parameters()} == {torch.float32}
    assert {t.dtype for t in model.block_tensors(0).values()} == {torch.bfloat16}
    assert model.block_inputs(batches((1, 4))).hidden[0].dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_linears_and_their_weights(saved, family):
    model = CheckpointModel(saved(family))
    model.load_block(2)
    linears = model.linears(2)
    assert all(name.startswith(f"{model.blocks[2][0]}.") for name in linears)
    name = next(n for n in linears if n.endswith(("mlp.gate_proj", "mlp.c_fc")))
    weight = model.get_weight(linears[name])
    out_features = 128 if family == "llama" else 256
    assert weight.shape == (out_features, 64)  # (out, in), also for Conv1D
    x = torch.randn(3, 64)
    model.set_weight(linears[name], 2 * weight)
    bias = linears[name].bias if linears[name].bias is not None else 0
    torch.testing.assert_close(linears[name](x), 2 * x @ weight.T + bias)
    changed = model.block_tensors(2)[f"{name}.weight"]
    assert torch.equal(changed, 2 * Checkpoint(saved(family)).tensor(f"{name}.weight"))


def test_other_tensors_stores_a_tied_one_once(saved):
    names = [name for name, _ in CheckpointModel(saved("llama-tied")).other_tensors()]
    assert sorted(names) == ["model.embed_tokens.weight", "model.norm.weight"]
    names = [name for name, _ in CheckpointModel(saved("llama")).other_tensors()]
    assert "lm_head.weight" in names


def test_names_without_the_base_prefix(saved, tmp_path):
    """GPT-2's original files say h.0.attn for what the model calls transformer.h.0.attn."""
    path = shutil.copytree(saved("gpt2"), tmp_path / "gpt2")
    stored = load_file(path / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    short["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a buffer of old versions
    save_file(short, path / "model.safetensors", metadata={"format": "pt"})
    model = CheckpointModel(path)
    assert model.unused == ["h.0.attn.bias"]
    ids = batches((1, 6))
    states = run(model, ids)
    with torch.no_grad():
        assert torch.equal(model.logits(ids[0], states[-1][0]), reference(path)(ids[0]).logits)


# --- bad input: one sentence that names the thing -----------------------------------------------


@pytest.fixture
def llama(saved, tmp_path):
    return shutil.copytree(saved("llama"), tmp_path / "llama")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path, change):
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        CheckpointModel(path)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["NoSuchForCausalLM"]}, ("NoSuchForCausalLM", "never run")),
    ({"architectures": ["NoSuch"], "auto_map": {"AutoModel": "modeling_x.X"}}, ("NoSuch",)),
    ({"architectures": None}, ("config.json", "None")),
    ({"architectures": [["x"]]}, ("config.json",)),
    ({"model_type": "no_such_type"}, ("no_such_type",)),
    ({"hidden_size": "wide"}, ("config.json", "refuses")),
    ({"quantization_config": {"quant_method": "gptq"}}, ("quantized already", "gptq")),
    ({"intermediate_size": 80}, ("gate_proj", "[80, 64]", "[128, 64]")),
    ({"num_hidden_layers": 4}, ("model.layers.3.", "missing")),
])  # fmt: skip
def test_bad_config(llama, changes, words):
    edit_config(llama, **changes)
    refused(llama, *words)


def test_code_of_a_checkpoint_is_not_run(llama):
    (llama / "modeling_x.py").write_text("raise SystemExit('ran')")
    (llama / "configuration_x.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}
    edit_config(llama, auto_map=auto_map)
    assert type(CheckpointModel(llama).model).__module__.startswith("transformers.models.llama")


def test_missing_tensor(llama):
    edit_weights(llama, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    refused(llama, "'model.layers.1.mlp.up_proj.weight'", "missing")


def test_integer_weight(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(llama, lambda w: w.update({name: w[name].to(torch.int8)}))
    refused(llama, name, "floating point", "int8")


def test_nan_is_named_when_its_block_is_loaded(llama):
    def poison(weights):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        weights["model.norm.weight"][5] = float("inf")

    edit_weights(llama, poison)
    model = CheckpointModel(llama)
    model.load_block(0)
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' .* \[3, 4\]"):
        model.load_block(1)
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds inf at \[5\]"):
        list(model.other_tensors())


@pytest.mark.parametrize("token", [-1, 96, 1000])
def test_a_token_that_the_model_does_not_have(llama, token):
    ids = batches((2, 5))
    ids[0][1, 3] = token
    with pytest.raises(CalibrationError, match=f"0..95, got .*{token}.*tokenizer"):
        CheckpointModel(llama).block_inputs(ids)


def test_no_tokenizer_is_none_and_a_broken_one_is_named(llama):
    assert CheckpointModel(llama).tokenizer is None
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        _ = CheckpointModel(llama).tokenizer
