"""Structured pruning: what is taken away is what counts least, and the rest is a plain model."""

import pytest
import torch

import genai_perf as gp
from genai_perf.compression import structured

IDS = torch.randint(1, 96, (6, 16), generator=torch.Generator().manual_seed(0))


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3", "gemma2", "mistral"])
def test_all_at_once_reloads(saved, tmp_path, family):
    src, dst = saved(family), tmp_path / "out"
    before = load(src)
    made = gp.prune_structured(src, dst, calibration=IDS, blocks=2, neurons=96, kv_heads=1)
    model = load(dst)
    config = model.config
    assert (config.num_hidden_layers, config.intermediate_size) == (2, 96)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.head_dim == 16 and len(made.blocks) == 2
    assert made.parameters_after == sum(p.numel() for p in model.parameters())
    assert made.parameters_after < made.parameters_before
    assert model(IDS).logits.shape == before(IDS).logits.shape
    first = made.blocks[0]
    kept = structured.best(made.scores.neurons[first], 96)
    theirs = before.model.layers[first].mlp.up_proj.weight[kept]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, theirs)


def test_what_adds_nothing_goes_and_nothing_changes(saved, tmp_path):
    """Neurons and heads whose output is zero, and a block that passes its input on."""
    model = load(saved("llama"))
    layers = model.model.layers
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.mlp.down_proj.weight[:, i % 2 :: 2] = 0
            heads = slice(0, 32) if i % 2 else slice(32, 64)
            layer.self_attn.o_proj.weight[:, heads] = 0
        layers[1].mlp.down_proj.weight.zero_()
        layers[1].self_attn.o_proj.weight.zero_()
        want = model(IDS).logits
    model.save_pretrained(tmp_path / "src")
    made = gp.prune_structured(tmp_path / "src", tmp_path / "out", calibration=IDS,
                               blocks=len(layers) - 1, neurons=64, kv_heads=1)  # fmt: skip
    assert 1 not in made.blocks
    torch.testing.assert_close(load(tmp_path / "out")(IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_experts(saved, tmp_path):
    src = saved("mixtral")
    model = load(src)
    made = gp.prune_structured(src, tmp_path / "out", calibration=IDS, experts=3)
    smaller = load(tmp_path / "out")
    assert smaller.config.num_local_experts == 3 and len(made.scores.experts[0]) == 4
    kept = structured.best(made.scores.experts[0], 3)
    block, whole = smaller.model.layers[0].mlp, model.model.layers[0].mlp
    assert torch.equal(block.experts.down_proj, whole.experts.down_proj[kept])
    assert torch.equal(block.gate.weight, whole.gate.weight[kept])
    assert torch.isfinite(smaller(IDS).logits).all()
    same = gp.prune_structured(src, tmp_path / "same", calibration=IDS, experts=4)
    assert same.parameters_after == same.parameters_before
    torch.testing.assert_close(load(tmp_path / "same")(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="experts must be at least 2"):
        gp.prune_structured(src, tmp_path / "x", calibration=IDS, experts=1)


def test_group_energy_is_what_the_group_adds():
    torch.manual_seed(0)
    x, weight = torch.randn(200, 32), torch.randn(8, 32)
    want = [((x[:, a : a + 16] @ weight[:, a : a + 16].T) ** 2).sum() for a in (0, 16)]
    torch.testing.assert_close(structured.group_energy(weight, x.T @ x, 2), torch.stack(want))


@pytest.mark.parametrize("options, words", [
    ({}, "give at least one of blocks"),
    ({"blocks": 0}, "blocks must be from 1 to"),
    ({"neurons": 129}, "neurons must be from 1 to 128, got 129"),
    ({"kv_heads": 3}, "kv_heads must be from 1 to 2, got 3"),
    ({"experts": 1}, "experts must be from 1 to 0"),
])  # fmt: skip
def test_bad_input(saved, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        gp.prune_structured(saved("llama"), tmp_path / "out", calibration=IDS, **options)
    assert not (tmp_path / "out").exists()


def test_a_structure_that_is_not_known_is_named(saved, tmp_path):
    with pytest.raises(gp.CheckpointError, match="h.0: has no mlp.down_proj"):
        gp.prune_structured(saved("gpt2"), tmp_path / "out", calibration=IDS, neurons=64)
    with pytest.raises(gp.CheckpointError, match="exists"):
        gp.prune_structured(saved("llama"), saved("llama"), calibration=IDS, blocks=1)
