"""gp.compress on tiny models of several families: what is written, said and refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf.compression import GPTQ, RTN, Magnitude, Recipe, SparseGPT, gptq, sparsegpt
from genai_perf.compression import layer as one_layer
from genai_perf.compression.hessian import Hessian
from genai_perf.compression.report import Report
from genai_perf.compression.stages import call_order
from genai_perf.integrations import pipeline

torch.manual_seed(0)
IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "qwen3", "gemma2", "opt"])
def test_pruned_checkpoints_load_with_their_zeros(saved, tmp_path, family):
    src, dst = saved(family), tmp_path / "out"
    report = gp.compress(src, dst, "sparsegpt-2:4", calibration=IDS)
    assert json.loads((dst / "config.json").read_text()) == json.loads(
        (src / "config.json").read_text()
    )
    before, after = weights(src), weights(dst)
    assert before.keys() == after.keys()
    model = load(dst)
    assert len(report.layers) >= 3 * 4
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        weight = weight.T if family == "gpt2" else weight
        assert tuple(weight.shape) == layer.shape
        zeros = (weight.detach().reshape(layer.shape[0], -1, 4) == 0).sum(2)
        if family == "opt":  # whose ReLU leaves some inputs dead, which are pruned beside
            assert (zeros >= 2).all()
        else:
            assert (zeros == 2).all() and layer.sparsity == 0.5
        del before[f"{layer.name}.weight"], after[f"{layer.name}.weight"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt",
                                    "gpt-neox", "bert"])  # fmt: skip
def test_quantized_checkpoints_of_every_family_load(saved, tmp_path, family):
    """transformers, through compressed-tensors, computes what our own loader does."""
    import transformers

    dst = tmp_path / "out"
    report = gp.compress(saved(family), dst, Recipe((GPTQ(group_size=32),)), calibration=IDS)
    kind = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
    theirs, ours = getattr(transformers, kind).from_pretrained(dst).eval(), gp.load_compressed(dst)
    quantized = [m for m in ours.modules() if isinstance(m, gp.nn.QuantLinear)]
    assert len(quantized) == len(report.layers) >= 3 * 4
    with torch.no_grad():
        found, wanted = ours(IDS).logits, theirs(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


RECIPES = {
    "int8": Recipe.named("int8-rtn"),
    "fp8": Recipe.named("fp8-rtn"),
    "fp8-block": Recipe((RTN("fp8", granularity="block"),)),
    "int4": Recipe((RTN("int4", group_size=32),)),
    "gptq": Recipe((GPTQ(group_size=32),)),
    "gptq3": Recipe((GPTQ(bits=3, group_size=32),)),
    "gptq2": Recipe((GPTQ(bits=2, group_size=32),)),
    "int3": Recipe((RTN("int3", group_size=32, search="mse"),)),
    "gptq8": Recipe.named("int8-gptq"),
    "joint": Recipe((SparseGPT(sparsity=0.5, refine=None), GPTQ(group_size=32))),
    "refined-gptq": Recipe((SparseGPT(pattern="2:4"), GPTQ(group_size=32))),
    "magnitude-int8": Recipe((Magnitude(pattern="2:4"), RTN("int8"))),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_loads_is_what_was_computed(saved, tmp_path, recipe, dtype):
    src, dst = saved("llama", dtype), tmp_path / "out"
    evaluated = {}

    def keep(weight, *rest, name, **options):
        result = compress_one(weight, *rest, name=name, **options)
        evaluated[name] = result.weight
        return result

    compress_one = one_layer.compress
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_layer, "compress", keep)
        report = gp.compress(src, dst, recipe, calibration=IDS)
    model = load(dst)
    model(IDS)  # compressed-tensors decompresses on the first call
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        wanted = evaluated[layer.name].float()
        assert torch.equal(weight.float(), wanted), layer.name
        assert layer.format in ("int2", "int3", "int4", "int8", "fp8")
        assert 0 < layer.error < 0.6
    assert report.nbytes_after < report.nbytes_before


def test_nf4_loads_in_bitsandbytes(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=100, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    report = gp.compress(tmp_path / "src", tmp_path / "out", "nf4-rtn")
    for layer in report.layers:
        fits = "mlp" not in layer.name  # bitsandbytes refuses 100 on some processors
        assert (layer.format == "nf4") == fits == (not layer.notes)
    assert "left unquantized: bitsandbytes" in str(report)
    logits = load(tmp_path / "out")(IDS).logits
    assert (logits - load(tmp_path / "src")(IDS).logits).abs().max() < 0.2


def test_compressed_outputs_feed_forward(saved, tmp_path):
    """Block 1 is solved on what block 0 gives once pruned, by plain hooks on the full model."""
    src, dst = saved("llama"), tmp_path / "out"
    gp.compress(src, dst, "sparsegpt-0.5-faithful", calibration=IDS)
    after = weights(dst)
    model = load(src)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.0."):
                parameter.copy_(after[name])
    name = "model.layers.1.mlp.down_proj"
    linear, hessian = model.get_submodule(name), Hessian(128)
    linear.register_forward_pre_hook(lambda module, args: hessian.add(args[0]))
    with torch.no_grad():
        model(IDS)
    options = {"sparsity": 0.5, "refine": None}
    wanted = sparsegpt.solve(linear.weight.detach(), hessian.matrix(), **options).weight
    torch.testing.assert_close(after[f"{name}.weight"], wanted, rtol=1e-3, atol=1e-4)
    dense_input = Hessian(128)
    model = load(src)
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: dense_input.add(args[0]))
    with torch.no_grad():
        model(IDS)
    other = sparsegpt.solve(linear.weight.detach(), dense_input.matrix(), **options).weight
    assert (after[f"{name}.weight"] - other).abs().max() > 0.01


def test_true_to_the_sequence(saved, tmp_path):
    """down_proj is solved on what the layers before it give once they are quantized."""
    src, dst = saved("llama"), tmp_path / "out"
    recipe = Recipe((GPTQ(group_size=32, true_sequential=True),))
    gp.compress(src, dst, recipe, calibration=IDS)
    model, after = load(src), load(dst)
    after(IDS)  # compressed-tensors decompresses on the first call
    name = "model.layers.0.mlp.down_proj"
    dense = model.get_submodule(name).weight.detach().clone()
    with torch.no_grad():
        for other, parameter in model.named_parameters():
            if other.startswith("model.layers.0.") and name not in other:
                parameter.copy_(after.get_parameter(other))
    hessian = Hessian(128)
    model.get_submodule(name).register_forward_pre_hook(lambda m, args: hessian.add(args[0]))
    with torch.no_grad():
        model(IDS)
    wanted = gptq.solve(dense, hessian.matrix(), group_size=32, act_order=True)
    found = after.get_submodule(name).weight
    # A value within rounding of the middle of two grid points may go either way, with its row.
    same = (found - wanted.weight).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.8
    gp.compress(src, tmp_path / "at once", Recipe((GPTQ(group_size=32),)), calibration=IDS)
    other = load(tmp_path / "at once")
    other(IDS)
    assert (found - other.get_submodule(name).weight).abs().amax(1).gt(1e-5).float().mean() > 0.5


def test_stages_follow_the_call_order(saved):
    model = pipeline.CheckpointModel(saved("llama"))
    inputs = model.block_inputs([IDS])
    model.load_block(0)
    run = lambda: model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])  # noqa: E731
    order = call_order(model.linears(0), run)
    assert [[name.rpartition(".")[2] for name in stage] for stage in order] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "ria", "magnitude"])
def test_owl_gives_each_block_its_own_sparsity(saved, tmp_path, method):
    src, dst = saved("llama"), tmp_path / "out"
    report = gp.compress(src, dst, f"{method}-0.7-owl", calibration=IDS,
                         activations="disk" if method == "ria" else "memory")  # fmt: skip
    found = {}
    for layer in report.layers:
        found.setdefault(layer.name.split(".")[2], set()).add(round(layer.sparsity, 2))
    assert all(max(values) - min(values) <= 0.011 for values in found.values())
    amounts = [max(values) for values in found.values()]
    assert max(amounts) - min(amounts) == pytest.approx(0.16, abs=0.02)
    assert report.sparsity == pytest.approx(0.7, abs=0.005)
    assert "model.layers.0: owl gives it a sparsity of 0." in str(report)


def test_one_block_at_a_time(saved, tmp_path, monkeypatch):
    models, seen = [], []

    class Watched(pipeline.CheckpointModel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            models.append(self)

        def forward_block(self, i, hidden, kwargs):
            loaded = [any(p.device.type != "meta" for p in block.parameters())
                      for _, block in self.blocks]  # fmt: skip
            seen.append((i, loaded))
            return super().forward_block(i, hidden, kwargs)

    monkeypatch.setattr(pipeline, "CheckpointModel", Watched)
    gp.compress(saved("llama"), tmp_path / "out", "int4-gptq", calibration=IDS)
    assert {i for i, _ in seen} == {0, 1, 2}
    assert all(loaded == [j == i for j in range(3)] for i, loaded in seen)


def test_report_and_progress(saved, tmp_path):
    src, dst, calls = saved("qwen2"), tmp_path / "out", []
    recipe = Recipe((GPTQ(group_size=128),), skip=("re:.*layers\\.1\\.mlp", "o_proj"))
    report = gp.compress(src, dst, recipe, calibration=IDS, progress=lambda *a: calls.append(a))
    assert calls == [(0, 3, "embedding"), (0, 3, "model.layers.0"), (1, 3, "model.layers.1"),
                     (2, 3, "model.layers.2"), (3, 3, "done")]  # fmt: skip
    assert Report.read(dst) == report
    assert report.recipe == recipe.to_dict() and report.name == "int4-gptq"
    assert report.calibration["windows"] == 20 and report.calibration["max_seqlen"] == 16
    assert len(report.source_hash) == len(report.calibration["sha256"]) == 64
    assert set(report.versions) == {"python", "genai_perf", "torch", "transformers"}
    by_name = {layer.name: layer for layer in report.layers}
    assert len(by_name) == 3 * 7
    for name, layer in by_name.items():
        skipped = "layers.1.mlp" in name or name.endswith("o_proj")
        assert (layer.recipe == layer.format == "dense") == skipped
        assert layer.tokens == 20 * 16
        if not skipped and layer.shape[1] == 64:
            assert layer.group_size == 64
            assert layer.notes == (
                "group size 128 does not divide 64 inputs: groups of 64 instead",
            )
    total = sum(t.nbytes for t in weights(dst).values())
    assert report.nbytes_after == total
    config = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"] and "model.layers.1.mlp.up_proj" in config["ignore"]
    load(dst)(IDS)


def test_runs_repeat_to_the_bit(saved, tmp_path):
    for name in ("a", "b"):
        gp.compress(saved("llama"), tmp_path / name, "int4-gptq", calibration=IDS)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_without_calibration_errors_are_of_weights(saved, tmp_path):
    report = gp.compress(saved("llama"), tmp_path / "out", "magnitude-0.5")
    assert report.calibration is None and all(layer.tokens == 0 for layer in report.layers)
    before, after = weights(saved("llama")), weights(tmp_path / "out")
    layer = report.layers[0]
    name = f"{layer.name}.weight"
    lost = (before[name] - after[name]).square().sum() / before[name].square().sum()
    assert layer.error == pytest.approx(float(lost), rel=1e-4)


def test_few_tokens_are_warned_of(saved, tmp_path):
    with pytest.warns(UserWarning, match=r"21 layers saw fewer.*24 tokens for 64"):
        gp.compress(saved("llama"), tmp_path / "out", "int4-gptq", calibration=IDS[:3, :8])


def damaged(saved, tmp_path, name, value):
    import shutil

    src = tmp_path / "src"
    shutil.copytree(saved("llama"), src)
    tensors = weights(src)
    tensors[name].view(-1)[5] = value
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    return src


def test_bad_input_is_refused_by_name(saved, tmp_path):
    src, dst = saved("llama"), tmp_path / "out"

    def refused(error, words, *args, **options):
        with pytest.raises(error, match=words):
            gp.compress(*args, **options)
        assert not dst.exists() and not list(tmp_path.glob(".*"))

    refused(gp.CheckpointError, "does not exist", tmp_path / "nowhere", dst, "int8-rtn")
    refused(gp.CheckpointError, f"destination {tmp_path} exists", src, tmp_path, "int8-rtn")
    refused(ValueError, "did you mean 'int8-rtn'", src, dst, "int8-rnt")
    refused(
        gp.CalibrationError, "int4-gptq needs calibration text, got none", src, dst, "int4-gptq"
    )
    refused(gp.CheckpointError, "no tokenizer", src, dst, "int4-gptq", calibration=["text"])
    refused(gp.CalibrationError, "nowhere.txt", src, dst, "int8-rtn", calibration="nowhere.txt")
    refused(gp.CalibrationError, "from 0 to 95, got 0 to 96", src, dst, "int8-rtn",
            calibration=torch.tensor([[0, 96]]))  # fmt: skip
    refused(gp.CalibrationError, r"int64 \(windows, seqlen\)", src, dst, "int8-rtn",
            calibration=torch.ones(2, 2))  # fmt: skip
    refused(gp.CheckpointError, "no checkpoint format holds fp8_e5m2", src, dst, "fp8_e5m2-rtn")
    refused(gp.CheckpointError, r"c_attn: is a Conv1D.*use nf4, prune, or skip",
            saved("gpt2"), dst, "int4-rtn")  # fmt: skip
    gp.compress(src, tmp_path / "done", "int8-rtn")
    refused(gp.CheckpointError, "quantized already", tmp_path / "done", dst, "int8-rtn")


def test_nan_weights_are_named(saved, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    src = damaged(saved, tmp_path, name, torch.nan)
    with pytest.raises(gp.CheckpointError, match=name):
        gp.compress(src, tmp_path / "out", "int8-rtn", calibration=IDS)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_activations_that_overflow_are_named(saved, tmp_path):
    src = damaged(saved, tmp_path, "model.layers.1.mlp.up_proj.weight", 3e38)
    with pytest.raises(gp.CalibrationError, match=r"model\.layers\.1"):
        gp.compress(src, tmp_path / "out", "int8-rtn", calibration=IDS)


def test_a_mixed_recipe_loads_everywhere(saved, tmp_path):
    recipe = Recipe((GPTQ(group_size=32),), rules=(
        ("re:.*layers.0.mlp", (RTN("int8"),)), ("down_proj", (RTN("fp8"),)),
    ))  # fmt: skip
    report = gp.compress(saved("llama"), tmp_path / "out", recipe, calibration=IDS)
    by_format = {layer.name: (layer.recipe, layer.format) for layer in report.layers}
    assert by_format["model.layers.0.mlp.down_proj"] == ("int8-rtn", "int8")
    assert by_format["model.layers.2.mlp.down_proj"] == ("fp8-rtn", "fp8")
    assert by_format["model.layers.2.mlp.up_proj"] == ("int4-gptq", "int4")
    with torch.no_grad():
        theirs = load(tmp_path / "out")(IDS).logits
        ours = gp.load_compressed(tmp_path / "out")(IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max())


@pytest.mark.parametrize("layers", ["k_proj", "re:.*gate_proj"])
def test_layers_that_servers_fuse_are_treated_alike(saved, tmp_path, layers):
    recipe = Recipe((RTN("int8"),), rules=((layers, (RTN("fp8"),)),))
    with pytest.raises(ValueError, match="one layer to a server"):
        gp.compress(saved("llama"), tmp_path / "out", recipe)
    with pytest.raises(ValueError, match="one layer to a server"):
        gp.compress(saved("llama"), tmp_path / "out", Recipe((RTN("int8"),), skip=(layers,)))
    assert not list(tmp_path.iterdir())
