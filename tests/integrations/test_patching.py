"""gp.patch: what it changes, says, refuses and takes back."""

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

import genai_perf as gp

IDS = torch.tensor([[5, 7, 11, 13, 17]])


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_one_line_and_back():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    want = logits(model)
    assert gp.patch(model) is model
    assert model.config._attn_implementation == "genai_perf"
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=1e-5)
    assert str(model.genai_perf_patch).splitlines() == [
        f"attention of the model: {before} -> genai_perf", "  3 x LlamaAttention",
        "linears: unchanged",
    ]  # fmt: skip
    first = model.genai_perf_patch
    assert gp.patch(model).genai_perf_patch == first
    gp.unpatch(model)
    assert model.config._attn_implementation == before and not hasattr(model, "genai_perf_patch")
    assert torch.equal(logits(model), want)
    with pytest.raises(ValueError, match="unpatch: model must be one that was patched"):
        gp.unpatch(model)


def test_attention_really_runs_here(monkeypatch):
    from genai_perf.integrations import attention

    called = []
    plain = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a, **k: called.append(k) or plain(*a, **k))
    model = gp.patch(tiny_model("mistral"))
    logits(model)
    assert len(called) == 3


def test_a_model_inside_a_module():
    inner = tiny_model("gpt2")
    outer = nn.ModuleDict({"body": inner, "head": nn.Linear(4, 4)})
    gp.patch(outer)
    assert outer.genai_perf_patch.attention.keys() == {"body"}
    assert outer.genai_perf_patch.modules == {"GPT2Attention": 3}
    assert inner.config._attn_implementation == "genai_perf"


def test_linears_when_asked_for():
    model = gp.patch(tiny_model("qwen2"), linear="int8")
    patch = model.genai_perf_patch
    assert len(patch.linears.quantized) == 21 and "lm_head" in patch.linears.skipped
    assert "quantized 21 layers" in str(patch)
    assert isinstance(model.model.layers[0].mlp.up_proj, gp.QuantLinear)
    with pytest.raises(ValueError, match="21 quantized layers, whose dense weights are gone"):
        gp.unpatch(model)
    with pytest.raises(ValueError, match="the linears are patched already"):
        gp.patch(model, linear="int8")


def test_refused_and_left_as_it_was(monkeypatch):
    with pytest.raises(ValueError, match="patch: model must be a transformers model, got Linear"):
        gp.patch(nn.Linear(2, 2))
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="matches no layer"):
        gp.patch(model, linear="int8", skip=("nothing.of.the.kind",))
    assert model.config._attn_implementation == before
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(ValueError, match="LlamaForCausalLM at the top"):
        gp.patch(model)
    assert model.config._attn_implementation == before
