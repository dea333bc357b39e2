"""Stacked experts through gp.compress: each one calibrated on the tokens routed to it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import genai_perf as gp
from genai_perf.compression import GPTQ, Magnitude, SparseGPT, Wanda, sparsegpt
from genai_perf.compression.experts import has_calibrated_sibling
from genai_perf.compression.fallback import without_calibration
from genai_perf.compression.recipe import Recipe
from genai_perf.integrations.checkpoint_model import CheckpointModel

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


@pytest.mark.parametrize("recipe, treated", [
    ("int8-rtn", "dense"), (Recipe((Magnitude(pattern="2:4"), GPTQ(group_size=32))), "magnitude"),
])  # fmt: skip
def test_a_quantizer_leaves_experts_and_says_so(saved, tmp_path, recipe, treated):
    report = gp.compress(saved("qwen3-moe"), tmp_path / "out", recipe, calibration=IDS)
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) == 3 * 8 * 2
    assert all(layer.recipe.startswith(treated) and layer.format == "dense" for layer in experts)
    assert all("not quantized to int" in layer.notes[0] for layer in experts)
    assert any("mlp.gate.weight: left dense" in note for note in report.notes)
    assert all(layer.format != "dense" for layer in report.layers if layer not in experts)


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
