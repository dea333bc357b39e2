"""Rotations and scales folded into weights: the model stays the same, and rounds better."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import genai_perf as gp
from genai_perf.compression import AWQ, GPTQ, RTN, Hadamard, Recipe, SmoothQuant
from genai_perf.compression.capture import inputs_of
from genai_perf.compression.folding import Folds
from genai_perf.compression.rotation import Rotation
from genai_perf.integrations.transformers import CheckpointModel
from genai_perf.models import stdlib_text, tiny_python_lm

IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))
EVERYTHING = ("re:.*",)


def logits(path):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(IDS[:3]).logits


@pytest.mark.parametrize("size", [1, 2, 64, 24, 40, 7])
def test_a_rotation_is_orthogonal_and_mixes(size):
    q = Rotation(size, seed=3)(torch.eye(size))
    torch.testing.assert_close(q @ q.T, torch.eye(size), atol=1e-5, rtol=0)
    assert torch.equal(q, Rotation(size, seed=3)(torch.eye(size)))
    power = size & -size
    assert (q.abs() > 1e-6).sum(1).min() >= power  # each input reaches that many outputs
    matrix = torch.randn(size, 5)
    torch.testing.assert_close(Rotation(size, seed=3).rows(matrix), q.T @ matrix)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "mistral", "phi3",
                                    "gemma"])  # fmt: skip
def test_a_rotated_model_gives_the_same_logits(saved, tmp_path, family):
    src, dst = saved(family), tmp_path / "out"
    report = gp.compress(src, dst, Recipe((Hadamard(), RTN("int8")), skip=EVERYTHING))
    before, after = load_file(src / "model.safetensors"), load_file(dst / "model.safetensors")
    same = [name for name in before if torch.equal(before[name], after[name])]
    moved = [name for name in same if "norm" not in name]
    keys = {"k_proj.bias", "q_proj.bias"}  # before the rotary embedding: not on the stream
    assert all(name.split(".", 4)[-1] in keys for name in moved)
    assert torch.allclose(logits(dst), logits(src), atol=2e-4 * logits(src).abs().max())
    assert ("values are not rotated" in str(report)) == (family == "phi3")
    assert json.loads((dst / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in after


@pytest.mark.parametrize("family, words", [
    ("gpt2", "one RMSNorm outside"), ("opt", "one RMSNorm outside"), ("bert", "rotation needs"),
    ("mixtral", "stacked experts"), ("gemma2", "rotation changes its output"),
    ("gpt-neox", "one RMSNorm outside"),
])  # fmt: skip
def test_models_that_do_not_turn_are_refused(saved, tmp_path, family, words):
    with pytest.raises(gp.CheckpointError, match=words):
        gp.compress(saved(family), tmp_path / "out", Recipe((Hadamard(), RTN("nf4"))))
    assert not list(tmp_path.iterdir())


MIXTURES = ["mixtral", "qwen3-moe", "gpt-oss", "llama4"]  # in bf16, rounding may route otherwise


@pytest.mark.parametrize("dtype, family", [
    *((d, f) for d in (torch.float32, torch.bfloat16)
      for f in ("llama", "qwen2", "gpt2", "opt", "gemma", "gpt-neox")),
    *((torch.float32, f) for f in MIXTURES),
])  # fmt: skip
@pytest.mark.parametrize("step", [SmoothQuant(alpha=0.7), AWQ(steps=4)], ids=["smooth", "awq"])
def test_scaled_channels_give_the_same_outputs(saved, family, step, dtype):
    model = CheckpointModel(saved(family, dtype), dtype=torch.float32)
    recipe = Recipe((step, RTN("nf4" if family == "gpt2" else "int4", group_size=64)))
    folds, inputs = Folds(model, recipe), model.block_inputs([IDS])
    model.load_block(0)
    before = model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    old = {name: tensor.clone() for name, tensor in model.block_tensors(0).items()}
    with inputs_of(model.linears(0)) as hessians:
        model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    folds.after_calibration(0, recipe, hessians)
    after = model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    with inputs_of(model.linears(0)) as again:
        model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    tolerance = 1e-4 if dtype is torch.float32 else 0.03  # the scaled weights are rounded to it
    torch.testing.assert_close(after, before, rtol=0, atol=tolerance * float(before.abs().max()))
    changed = {name for name, tensor in model.block_tensors(0).items()
               if not torch.equal(tensor, old[name])}  # fmt: skip
    assert any("norm" in name or "ln_" in name for name in changed)
    if family in MIXTURES:  # what feeds the mixture, its router and every expert
        parts = ("post_attention_layernorm", "gate.weight|router.weight", "gate_up_proj$")
        assert all(any(re.search(part, name) for name in changed) for part in parts)
    for name, hessian in hessians.items():  # changed with the inputs, not collected again
        wanted = again[name].matrix()
        close = {"rtol": 1e-3 if dtype is torch.float32 else 0.1,
                 "atol": tolerance * float(wanted.abs().max())}  # fmt: skip
        torch.testing.assert_close(hessian.matrix(), wanted, **close)
        torch.testing.assert_close(hessian.peak, again[name].peak, rtol=0.1, atol=0.1)


def test_smoothquant_levels_activations(saved):
    model = CheckpointModel(saved("llama"))
    folds, inputs = Folds(model, recipe := Recipe((SmoothQuant(alpha=1.0), RTN("int8")))), None
    inputs = model.block_inputs([IDS])
    model.load_block(0)
    with inputs_of(model.linears(0)) as hessians:
        model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    folds.after_calibration(0, recipe, hessians)
    peaks = hessians["model.layers.0.mlp.up_proj"].peak  # all differences are in the weights now
    assert float(peaks.max() / peaks.min()) < 1.01


def test_folded_runs_resume_to_the_same_bytes(saved, tmp_path):
    recipe = Recipe((Hadamard(), SmoothQuant(), GPTQ(group_size=32)))
    src = saved("llama", torch.bfloat16)
    gp.compress(src, tmp_path / "whole", recipe, calibration=IDS)

    def stop(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gp.compress(src, tmp_path / "broken", recipe, calibration=IDS, progress=stop)
    gp.compress(src, tmp_path / "broken", recipe, calibration=IDS)
    whole, broken = (load_file(tmp_path / name / "model.safetensors")
                     for name in ("whole", "broken"))  # fmt: skip
    assert whole.keys() == broken.keys() and all(torch.equal(whole[k], broken[k]) for k in whole)


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_smoothed_mixtures_load(saved, tmp_path, family):
    """The router takes back what its normalization lost, and is written so."""
    report = gp.compress(saved(family), tmp_path / "out", "smoothquant+w8a8", calibration=IDS)
    assert not [note for note in report.notes if "not scaled" in note]
    plain = gp.compress(saved(family), tmp_path / "plain", "w8a8", calibration=IDS)
    assert (
        {layer.format for layer in report.layers}
        == {"int8"}
        == {layer.format for layer in plain.layers}
    )
    got, was = (load_file(folder / "model.safetensors") for folder in
                (tmp_path / "out", saved(family)))  # fmt: skip
    router = next(name for name in was if re.search(r"layers.0.*(gate|router).weight$", name))
    assert router in got and not torch.equal(got[router], was[router])
    ours = gp.load_compressed(tmp_path / "out")(IDS).logits
    want = transformers.AutoModelForCausalLM.from_pretrained(saved(family)).eval()(IDS).logits
    assert (ours - want).norm() < 0.05 * want.norm()


def test_w8a8_says_so_to_servers(saved, tmp_path):
    gp.compress(saved("llama"), tmp_path / "out", "smoothquant+w8a8", calibration=IDS)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["format"] == "int-quantized" and group["weights"]["num_bits"] == 8
    inputs = group["input_activations"]
    assert inputs["strategy"] == "token" and inputs["dynamic"] and inputs["num_bits"] == 8
    assert gp.io.validate(tmp_path / "out", "vllm").ok
    found, dense = logits(tmp_path / "out"), logits(saved("llama"))
    assert float((found - dense).norm() / dense.norm()) < 0.05


def test_w8a8_rounds_activations_in_transformers(saved, tmp_path):
    """compressed-tensors' own formula: a scale a token of absmax / 127.5, 256 codes."""
    from transformers import AutoModelForCausalLM

    gp.compress(saved("llama"), tmp_path / "out", "w8a8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    seen = {}
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    with torch.no_grad():
        model(IDS)
    x, weight = seen["x"], layer.weight.detach()
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    rounded = (x / scale).round().clamp(-128, 127) * scale @ weight.T
    size = float(rounded.norm())
    assert float((seen["y"] - rounded).norm()) < 1e-5 * size
    assert float((seen["y"] - x @ weight.T).norm()) > 1e-3 * size


@pytest.fixture
def with_outliers(tmp_path):
    """The embedded model with a tenth of the channels that its normalizations give made 16 times
    smaller, and what reads them as much larger: the same function, and outliers in every row."""
    src = tmp_path / "outliers"
    shutil.copytree(tiny_python_lm(), src)
    tensors = load_file(src / "model.safetensors")
    loud = torch.ones(256)
    loud[torch.randperm(256, generator=torch.Generator().manual_seed(0))[:24]] = 16
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name] = (tensors[name] / loud).to(tensors[name].dtype)
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                            "up_proj.weight")):  # fmt: skip
            tensors[name] = (tensors[name] * loud).to(tensors[name].dtype)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    return src


def test_rotation_takes_outliers_away(with_outliers, tmp_path):
    """int4 with one scale a row, with rotation and without: KL to the original, and what it adds to
    the perplexity."""
    texts = {split: [text[:20_000] for _, text in stdlib_text(split)][:12]
             for split in ("calibration", "heldout")}  # fmt: skip
    found = []
    for steps in ((GPTQ(group_size=-1),), (Hadamard(), GPTQ(group_size=-1))):
        report = gp.compress(with_outliers, tmp_path / f"out{len(steps)}", Recipe(steps),
                             calibration=texts["calibration"], heldout=texts["heldout"],
                             n_samples=16, max_seqlen=256, n_heldout=16)  # fmt: skip
        found.append(report.quality)
    plain, rotated = found
    assert rotated["kl"] < 0.5 * plain["kl"]
    excess = [q["perplexity"] - q["perplexity_before"] for q in found]
    assert excess[1] < 0.5 * excess[0]


@pytest.mark.parametrize("steps, words", [
    ((RTN(), Hadamard()), "each fold once, before"), ((SmoothQuant(), Hadamard(), RTN()), "first"),
    ((Hadamard(),), "one pruner, one quantizer"), ((AWQ(), AWQ(), RTN()), "each fold once"),
])  # fmt: skip
def test_folds_out_of_order_are_refused(steps, words):
    with pytest.raises(ValueError, match=words):
        Recipe(steps)
