"""Stacked experts through gp.compress: each one calibrated on the tokens routed to it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import genai_perf as gp
from genai_perf import CheckpointError
from genai_perf.compression import GPTQ, RTN, Magnitude, SparseGPT, Wanda, gptq, sparsegpt
from genai_perf.compression.experts import has_calibrated_sibling
from genai_perf.compression.fallback import without_calibration
from genai_perf.compression.recipe import Recipe
from genai_perf.integrations.checkpoint_model import CheckpointModel
from genai_perf.io import Checkpoint
from genai_perf.io.dialects import quantized_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer calibration tokens:UserWarning")
IDS = torch.randint(1, 96, (20, 16), generator=torch.Generator().manual_seed(0))
STACKS = ("gate_up_proj", "down_proj")
WHERE = {"mixtral": "mlp", "qwen3-moe": "mlp", "gpt-oss": "mlp", "llama4": "feed_forward"}


def stored(folder):
    return load_file(folder / "model.safetensors")


def stacks_of(folder, family):
    """(name, stack as (experts, out, in)) of every stack of the saved model."""
    model = CheckpointModel(folder)
    for i, (prefix, _) in enumerate(model.blocks):
        model.load_block(i)
        tensors = model.block_tensors(i)
        for part in STACKS:
            name = f"{prefix}.{WHERE[family]}.experts.{part}"
            stack = tensors[name]
            yield name, stack.transpose(1, 2) if family in ("gpt-oss", "llama4") else stack


@pytest.mark.parametrize("family", WHERE)
@pytest.mark.parametrize("recipe", ["sparsegpt-2:4", "ria-0.5", "magnitude-2:4"])
def test_every_expert_is_pruned_and_the_model_loads(saved, tmp_path, family, recipe):
    from transformers import AutoModelForCausalLM

    calibration = None if recipe.startswith("magnitude") else IDS
    report = gp.compress(saved(family), tmp_path / "out", recipe, calibration=calibration)
    layers = {layer.name: layer for layer in report.layers}
    for name, stack in stacks_of(tmp_path / "out", family):
        above, part = name.rsplit(".", 1)
        for e, rows in enumerate(stack):
            layer = layers[f"{above}.{e}.{part}"]
            assert layer.shape == tuple(rows.shape)
            zeros = (rows == 0).unflatten(1, (-1, 4)).sum(2)
            assert (zeros == 2).all() if recipe.endswith("2:4") else zeros.float().mean() == 2
            assert calibration is None or layer.recipe.startswith(recipe[:3]) or not layer.tokens
    assert not [note for note in report.notes if "left dense" in note and "experts" in note]
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(IDS).logits
    assert torch.isfinite(logits).all()


def test_an_expert_is_solved_on_exactly_its_tokens(saved, tmp_path):
    """Against the routing and the feed-forward written out."""
    src = saved("mixtral")
    report = gp.compress(src, tmp_path / "out", "sparsegpt-2:4", calibration=IDS)
    model = CheckpointModel(src)
    inputs = model.block_inputs([IDS])
    block, seen = model.load_block(0), []
    experts = block.mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    ((hidden, index, _),) = seen
    pruned = dict(stacks_of(tmp_path / "out", "mixtral"))
    for e in range(4):
        x = hidden[(index == e).any(1)]
        gate, up = F.linear(x, experts.gate_up_proj[e]).chunk(2, -1)
        for part, given in (("gate_up_proj", x), ("down_proj", F.silu(gate) * up)):
            want = sparsegpt.solve(getattr(experts, part)[e].detach(), given.T @ given,
                                   pattern="2:4")  # fmt: skip
            name = f"model.layers.0.mlp.experts.{e}.{part}"
            layer = next(layer for layer in report.layers if layer.name == name)
            assert layer.tokens == len(x)
            assert layer.error == pytest.approx(want.error, rel=0.02)
            got = pruned[f"model.layers.0.mlp.experts.{part}"][e]
            assert ((got != 0) == want.mask).float().mean() > 0.995


@pytest.fixture
def unrouted(saved, tmp_path):
    """GPT-OSS whose routers never choose expert 3."""
    src = tmp_path / "src"
    src.mkdir()
    for file in saved("gpt-oss").iterdir():
        (src / file.name).write_bytes(file.read_bytes())
    tensors = stored(src)
    for name in tensors:
        if name.endswith("router.bias"):
            tensors[name][3] = -1e4
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    return src


@pytest.mark.parametrize("recipe", ["sparsegpt-2:4", "wanda-0.5"])
def test_an_expert_without_tokens_falls_back_by_name(unrouted, tmp_path, recipe):
    report = gp.compress(unrouted, tmp_path / "out", recipe, calibration=IDS)
    amount = recipe.split("-")[1]
    alone = gp.compress(unrouted, tmp_path / "magnitude", f"magnitude-{amount}")
    assert all(layer.recipe == f"magnitude-{amount}" for layer in alone.layers)
    fell = [layer for layer in report.layers if ".experts.3." in layer.name]
    note = (f"no calibration token was routed to it: magnitude-{amount} in place of {recipe}",)
    assert len(fell) == 6
    assert all(layer.recipe == f"magnitude-{amount}" and layer.notes == note for layer in fell)
    assert f"{fell[0].name} and 5 more: {note[0]}" in str(report)
    others = [layer for layer in report.layers if layer not in fell]
    assert all(layer.recipe == recipe and layer.tokens for layer in others)
    pairs = zip(stacks_of(tmp_path / "out", "gpt-oss"),
                stacks_of(tmp_path / "magnitude", "gpt-oss"), strict=True)  # fmt: skip
    for (_, got), (_, want) in pairs:
        assert torch.equal(got[3], want[3])


def test_what_stands_in():
    def names(*steps):
        return without_calibration(Recipe(steps)).name

    assert names(SparseGPT(pattern="4:8"), GPTQ(group_size=32)) == "magnitude-4:8+int4-rtn-mse"
    assert names(Wanda(sparsity=0.6, allocation="owl")) == "magnitude-0.6"
    rtn = without_calibration(Recipe((GPTQ(bits=8, group_size=-1),))).quantizer
    assert (rtn.format, rtn.group_size) == ("int8", None)
    plain = without_calibration(Recipe((GPTQ(search=False),))).quantizer
    assert plain.search is None
    rtn = without_calibration(Recipe((GPTQ(group_size=32, symmetric=False),))).quantizer
    assert (rtn.format, rtn.group_size, rtn.symmetric) == ("int4", 32, False)


def test_only_experts_beside_calibrated_ones_fall_back():
    seen = {"m.experts.0.w1", "m.q_proj"}
    assert has_calibrated_sibling("m.experts.3.w1", seen)
    assert not has_calibrated_sibling("m.experts.3.w2", seen)
    assert not has_calibrated_sibling("n.experts.3.w1", seen)
    assert not has_calibrated_sibling("m.k_proj", seen)


@pytest.mark.parametrize("family, recipe, why", [
    ("gpt-oss", Recipe((RTN("nf4"),)), "hold experts in int2 to int4"),
    ("qwen3-moe", Recipe((Magnitude(pattern="2:4"), RTN("nf4"))), "hold experts in int2 to int4"),
])  # fmt: skip
def test_a_quantizer_leaves_experts_and_says_so(saved, tmp_path, family, recipe, why):
    report = gp.compress(saved(family), tmp_path / "out", recipe, calibration=IDS)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 3 * 2 * (4 if family == "gpt-oss" else 8)
    treated = "magnitude" if recipe.pruner else "dense"
    assert all(layer.recipe.startswith(treated) and layer.format == "dense" for layer in experts)
    assert all("not quantized to" in layer.notes[0] for layer in experts)
    assert all(why in layer.notes[0] for layer in experts)
    assert any("left dense" in note for note in report.notes)
    assert all(layer.format != "dense" for layer in report.layers if layer not in experts)


def apart(stack, part, family):
    """{linear: (experts, out, ...)} of a stack with outputs in dimension 1: gate and up one below
    the other, in GPT-OSS in turns."""
    if part == "down_proj":
        return {part: stack}
    gate, up = (stack[:, ::2], stack[:, 1::2]) if family == "gpt-oss" else stack.chunk(2, 1)
    return {"gate_proj": gate, "up_proj": up}


@pytest.mark.parametrize("family, recipe", [
    ("gpt-oss", "int4-rtn"), ("gpt-oss", "int2-gptq"), ("gpt-oss", "int8-rtn"),
    ("gpt-oss", "fp8-rtn"), ("llama4", "int4-gptq"), ("llama4", "fp8-rtn"),
])  # fmt: skip
def test_stacks_are_taken_apart_as_llm_compressor_does(saved, tmp_path, family, recipe):
    """Every stored expert against the source's matrix, by the compressed-tensors library's names:
    gate and up in turns in GPT-OSS, one below the other in Llama 4; and what loads it."""
    from transformers import AutoModelForCausalLM

    src = saved(family)
    report = gp.compress(src, tmp_path / "out", recipe, calibration=IDS, heldout=IDS[:2])
    assert all(layer.format != "dense" for layer in report.layers)
    got, was = stored(tmp_path / "out"), stored(src)
    layers = quantized_layers(Checkpoint(tmp_path / "out"))
    for name, stack in stacks_of(src, family):
        above, part = name.rsplit(".", 1)
        assert name not in got
        for linear, want in apart(stack, part, family).items():
            for e in range(4):
                weight = layers[f"{above}.{e}.{linear}"].read(Checkpoint(tmp_path / "out"))
                far = (weight.dequantize() - want[e]).norm() / want[e].norm()
                assert 0 < far < {"int8": 0.02, "fp8-": 0.05, "int4": 0.3, "int2": 0.9}[recipe[:4]]
        if family == "gpt-oss":
            assert f"{name}_bias" not in got
            for linear, want in apart(was[f"{name}_bias"], part, family).items():
                bias = torch.stack([got[f"{above}.{e}.{linear}.bias"] for e in range(4)])
                assert torch.equal(bias, want)
    ours = gp.load_compressed(tmp_path / "out")
    assert any(isinstance(module, gp.nn.QuantizedStack) for module in ours.modules())
    dense = AutoModelForCausalLM.from_pretrained(src).eval()
    with torch.no_grad():
        want = dense(IDS).logits
        for (prefix, _), dense_block in zip(CheckpointModel(src).blocks, dense.model.layers,
                                            strict=True):  # fmt: skip
            mixture = ours.get_submodule(prefix).get_submodule(WHERE[family])
            for part in STACKS:
                packed = getattr(mixture.experts, part).dequantize()
                getattr(dense_block.get_submodule(WHERE[family]).experts, part).copy_(packed)
        for name, module in ours.named_modules():
            if isinstance(module, gp.QuantLinear):
                dense.get_submodule(name).weight.copy_(module.weight.tensor().dequantize())
        torch.testing.assert_close(ours(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        assert (want - dense(IDS).logits).norm() > 1e-3 * want.norm()
    # What the held-out text was run through is what a reader runs.
    ids = IDS[:2]
    with torch.no_grad():
        logp, logq = (AutoModelForCausalLM.from_pretrained(src).eval()(ids).logits.log_softmax(-1),
                      ours(ids).logits.log_softmax(-1))  # fmt: skip
    kl = F.kl_div(logq, logp, log_target=True, reduction="sum") / ids.numel()
    assert report.quality["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    unread = [note for note in report.notes if "transformers" in note and "does not load" in note]
    checked = gp.io.validate(tmp_path / "out", "transformers")
    if family == "gpt-oss":
        assert len(unread) == 1 and "genai_perf.load_compressed does" in unread[0]
        assert not checked.ok and "no quantized experts of gpt_oss" in str(checked)
        assert not gp.io.validate(tmp_path / "out", "vllm").ok
        return
    assert not unread and checked.ok
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_each_stacked_expert_has_a_hessian_of_its_own(saved, tmp_path, family):
    """GPTQ of one expert alone on the tokens that it was given."""
    src = saved(family)
    report = gp.compress(src, tmp_path / "out", "int4-gptq", calibration=IDS)
    model = CheckpointModel(src)
    inputs = model.block_inputs([IDS])
    block, seen = model.load_block(0), []
    experts = block.get_submodule(WHERE[family]).experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.forward_block(0, inputs.hidden[0], inputs.kwargs[0][0])
    got, checkpoint = quantized_layers(Checkpoint(tmp_path / "out")), Checkpoint(tmp_path / "out")
    for e in range(4):
        if family == "gpt-oss":
            x = seen[0][0][(seen[0][1] == e).any(1)]
        else:
            x = seen[0][0].view(4, -1, 64)[e]
            x = x[x.any(-1)]
        stack = experts.gate_up_proj.detach()[e].T
        want = gptq.solve(stack.contiguous(), x.T @ x, group_size=64, act_order=True,
                          scale_dtype=torch.float32)  # fmt: skip
        name = f"model.layers.0.{WHERE[family]}.experts.{e}"
        layer = next(one for one in report.layers if one.name == f"{name}.gate_up_proj")
        assert layer.tokens == len(x) > 0
        assert layer.error == pytest.approx(want.error, rel=0.05)
        for linear, rows in apart(want.weight[None], "gate_up_proj", family).items():
            mine = got[f"{name}.{linear}"].read(checkpoint).dequantize()
            assert (mine == rows[0]).float().mean() > 0.97


def test_an_unrouted_stacked_expert_is_rounded_to_nearest(unrouted, tmp_path):
    report = gp.compress(unrouted, tmp_path / "out", "int4-gptq", calibration=IDS)
    fell = [layer for layer in report.layers if ".experts.3." in layer.name]
    assert len(fell) == 6 and all(layer.recipe == "int4-rtn-mse" for layer in fell)
    assert "no calibration token was routed to it: int4-rtn-mse in place" in str(report)
    gp.compress(unrouted, tmp_path / "rtn", "int4-rtn-mse")
    got, want = stored(tmp_path / "out"), stored(tmp_path / "rtn")
    names = [name for name in got if ".experts.3." in name]
    assert len(names) == 3 * 3 * 4 and all(torch.equal(got[n], want[n]) for n in names)


def test_llama4_experts_that_get_no_token_fall_back(saved, tmp_path):
    """Its experts are given all tokens, those of others as zeros."""
    report = gp.compress(saved("llama4"), tmp_path / "out", "int4-gptq", calibration=IDS[:1, :2])
    fell = [layer for layer in report.layers if not layer.tokens]
    assert len(fell) >= 3 * 2 * 2
    assert all(".experts." in x.name and x.recipe == "int4-rtn-mse" for x in fell)


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "llama4"])
def test_eight_bit_activations_of_experts(saved, tmp_path, family):
    """What vLLM reads, and transformers does not."""
    from transformers import AutoModelForCausalLM

    report = gp.compress(saved(family), tmp_path / "out", "w8a8", calibration=IDS)
    assert all(layer.format == "int8" for layer in report.layers)
    config = Checkpoint(tmp_path / "out").quantization
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized"]
    expert = "block_sparse_moe.experts.0.w1" if family == "mixtral" else ".experts.0.gate_proj"
    name = next(name for name in stored(tmp_path / "out") if name.endswith(f"{expert}.weight"))
    assert stored(tmp_path / "out")[name].dtype == torch.int8
    assert gp.io.validate(tmp_path / "out", "vllm").ok == (family != "gpt-oss")
    assert gp.io.validate(tmp_path / "out", "transformers").ok == (family == "llama4")
    assert bool([n for n in report.notes if "does not load" in n]) == (family != "llama4")
    dense = AutoModelForCausalLM.from_pretrained(saved(family)).eval()
    with torch.no_grad():
        want, got = dense(IDS).logits, gp.load_compressed(tmp_path / "out")(IDS).logits
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("recipe", ["int4-rtn", "wanda-0.5", "w8a8"])
def test_a_mixture_keeps_the_names_of_its_files(saved, tmp_path, recipe):
    """vLLM knows Mixtral's router as block_sparse_moe.gate, transformers as mlp.gate."""
    gp.compress(saved("mixtral"), tmp_path / "out", recipe, calibration=IDS)
    was, got = stored(saved("mixtral")), stored(tmp_path / "out")

    def layers(tensors):
        return {name.rpartition(".")[0] for name in tensors}

    assert layers(got) == layers(was)
    router = "model.layers.0.block_sparse_moe.gate"
    assert torch.equal(got[f"{router}.weight"], was[f"{router}.weight"])
    if recipe != "wanda-0.5":
        assert router in Checkpoint(tmp_path / "out").quantization["ignore"]
        assert gp.io.validate(tmp_path / "out", "vllm").ok


def test_experts_taken_apart_stay_quantized(saved, tmp_path):
    from transformers import AutoModelForCausalLM

    from genai_perf.integrations.transformers import read_compressed

    gp.compress(saved("gpt-oss"), tmp_path / "out", "int4-rtn")
    with pytest.raises(CheckpointError, match="gpt_oss hold experts in stacks"):
        gp.io.convert(tmp_path / "out", tmp_path / "dense", "dense")
    assert not (tmp_path / "dense").exists()
    with read_compressed(), pytest.raises(CheckpointError, match="in parts.*use load_compressed"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
@pytest.mark.parametrize("recipe", ["int4-gptq", "int8-rtn", "fp8-rtn", "sparsegpt-2:4+int4-gptq"])
def test_quantized_experts_are_read_by_transformers(saved, tmp_path, family, recipe):
    from transformers import AutoModelForCausalLM

    report = gp.compress(saved(family), tmp_path / "out", recipe, calibration=IDS)
    assert all(layer.format != "dense" for layer in report.layers)
    ours, model = gp.load_compressed(tmp_path / "out"), CheckpointModel(saved(family))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        # Ours multiplies by the packed bytes: the same weights, summed in another order.
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)
    for i, (prefix, block) in enumerate(model.blocks):
        model.load_block(i)
        was = block.mlp.experts.down_proj
        now = theirs.get_submodule(prefix).mlp.experts.down_proj
        packed = ours.get_submodule(prefix).mlp.experts.down_proj
        assert isinstance(packed, gp.nn.QuantizedStack) and torch.equal(packed.dequantize(), now)
        found = {layer.name: layer for layer in report.layers}
        for e in range(len(was)):
            layer = found[f"{prefix}.mlp.experts.{e}.down_proj"]
            if layer.recipe == "int8-rtn":
                want = gp.quantize(was[e].detach(), "int8").dequantize()
                assert torch.allclose(now[e], want, rtol=1e-6, atol=0)
            assert (
                0 < (now[e] - was[e]).norm() / was[e].norm() < (0.7 if "sparse" in recipe else 0.3)
            )


def test_experts_without_tokens_are_rounded_to_nearest(saved, tmp_path):
    """Two tokens reach at most four of eight experts."""
    src = saved("qwen3-moe")
    report = gp.compress(src, tmp_path / "out", "int4-gptq", calibration=IDS[:1, :2])
    fell = [layer for layer in report.layers if not layer.tokens]
    assert len(fell) >= 3 * 2 * 4
    for layer in fell:
        assert layer.recipe == "int4-rtn-mse" and ".experts." in layer.name
        assert layer.notes[-1].endswith("int4-rtn-mse in place of int4-gptq")
    plain = gp.compress(src, tmp_path / "rtn", "int4-rtn-mse")
    got, want = stored(tmp_path / "out"), stored(tmp_path / "rtn")
    alike = {layer.name for layer in plain.layers if ".experts." in layer.name}
    assert {layer.name for layer in fell} <= alike
    name = next(layer.name for layer in fell if layer.name.endswith("down_proj"))
    for part in ("weight_packed", "weight_scale"):
        assert torch.equal(got[f"{name}.{part}"], want[f"{name}.{part}"])


@pytest.mark.parametrize("family, recipe", [
    ("mixtral", "int4-gptq"), ("gpt-oss", "int4-gptq"), ("mixtral", "wanda-0.5"),
])  # fmt: skip
def test_quantized_experts_survive_an_interruption(saved, tmp_path, family, recipe):
    class Killed(Exception):
        pass

    def stop(done, total, what):
        if done == 2:
            raise Killed

    src = saved(family)
    gp.compress(src, tmp_path / "whole", recipe, calibration=IDS)
    with pytest.raises(Killed):
        gp.compress(src, tmp_path / "out", recipe, calibration=IDS, progress=stop)
    gp.compress(src, tmp_path / "out", recipe, calibration=IDS)
    got, want = stored(tmp_path / "out"), stored(tmp_path / "whole")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_experts_need_one_scheme(saved, tmp_path):
    recipe = Recipe((RTN("int4"),), skip=(r"re:.*experts\.1\.",))
    with pytest.raises(ValueError, match=r"experts.0.gate_up_proj and .*experts.1.gate_up_proj"):
        gp.compress(saved("qwen3-moe"), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_skipped_experts_stay_as_they_are(saved, tmp_path):
    recipe = Recipe((SparseGPT(pattern="2:4"),), skip=(r"re:.*\.experts\.",))
    report = gp.compress(saved("qwen3-moe"), tmp_path / "out", recipe, calibration=IDS)
    pairs = zip(stacks_of(tmp_path / "out", "qwen3-moe"),
                stacks_of(saved("qwen3-moe"), "qwen3-moe"), strict=True)  # fmt: skip
    assert all(torch.equal(got, was) for (_, got), (_, was) in pairs)
    assert report.sparsity < 0.25


def test_experts_share_out_owls_sparsity(saved, tmp_path):
    report = gp.compress(saved("mixtral"), tmp_path / "out", "wanda-0.7-owl", calibration=IDS)
    assert report.sparsity == pytest.approx(0.7, abs=0.003)
