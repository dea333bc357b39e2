"""torch's scaled_dot_product_attention by this package: routed in a context, or registered."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import genai_perf as gp
from genai_perf.integrations import sdpa
from genai_perf.nn import multihead
from genai_perf.testing.numerics import assert_close_to_oracle

REGISTRY = torch.nn.attention
HAS_REGISTRY = hasattr(REGISTRY, "activate_flash_attention_impl")


@contextlib.contextmanager
def activated():
    if not HAS_REGISTRY:
        pytest.skip("this torch has no register_flash_attention_impl")
    REGISTRY.activate_flash_attention_impl("genai_perf")
    try:
        yield
    finally:
        REGISTRY.restore_flash_attention_impl()


@pytest.fixture
def calls(monkeypatch):
    """How often each way in was used."""
    counts = {"route": 0, "registered": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(sdpa, "attention", counted("route", sdpa.attention))
    monkeypatch.setattr(sdpa, "FORWARD", counted("registered", sdpa.FORWARD))
    return counts


def results(seqlen_q, seqlen_k, heads_k, kind, dtype, judge=torch.float32) -> list[torch.Tensor]:
    """out and gradients; `judge` is the dtype to compute in, from the same values."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k))
    leaves = [torch.randn(2, h, s, 16, generator=generator).to(dtype) for h, s in sizes]
    mask = None
    if kind == "bool":
        mask = torch.rand(seqlen_q, seqlen_k, generator=generator) > 0.3
        mask[:, 0] = True
    elif kind == "added":
        mask = torch.randn(2, 1, seqlen_q, seqlen_k, generator=generator).to(dtype).to(judge)
    leaves = [x.to(judge).requires_grad_() for x in leaves]
    out = F.scaled_dot_product_attention(
        *leaves, attn_mask=mask, is_causal=kind == "causal", enable_gqa=heads_k != 4
    )
    dout = torch.randn(out.shape, generator=generator).to(dtype).to(judge)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", ["full", "causal", "bool", "added"])
@pytest.mark.parametrize("way", ["route", "registered"])
def test_both_ways_give_what_torch_gives(way, kind, dtype, calls):
    context = gp.route_sdpa if way == "route" else activated
    for seqlen_q, seqlen_k, heads_k in ((7, 7, 4), (5, 9, 2), (9, 5, 1)):
        arguments = (seqlen_q, seqlen_k, heads_k, kind, dtype)
        exact, same = results(*arguments, torch.float64), results(*arguments, dtype)
        with context():
            got = results(*arguments, dtype)
        for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, exact, same, strict=True):
            assert_close_to_oracle(a, b, c, 2 if name == "out" else 3, name)
    assert calls == {"route": 0, "registered": 0} | {way: 3}
    results(7, 7, 4, "full", torch.float32)
    assert calls[way] == 3, "outside of the context torch's own kernel runs"


def test_any_leading_dimensions():
    for shape in ((4, 6, 8), (2, 3, 4, 6, 8)):
        q, k, v = torch.randn(3, *shape, dtype=torch.float64).unbind()
        mask = torch.rand(*shape[:-1], 6) > 0.2
        mask[..., 0] = True
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        got = sdpa.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(got, want)


def test_a_layer_of_torch_runs_here(monkeypatch):
    calls, plain = [], multihead.attention
    monkeypatch.setattr(multihead, "attention", lambda *a, **k: calls.append(1) or plain(*a, **k))
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    want, _ = layer(x, x, x, need_weights=False)
    with gp.route_sdpa():
        got, _ = layer(x, x, x, need_weights=False)
    assert calls
    torch.testing.assert_close(got, want)


def test_what_cannot_be_honoured_raises():
    q = torch.randn(1, 4, 3, 8)
    with gp.route_sdpa():
        with pytest.raises(ValueError, match="dropout_p must be in"):
            F.scaled_dot_product_attention(q, q, q, dropout_p=1.0)
        with pytest.raises(ValueError, match="attn_mask must be None with is_causal"):
            F.scaled_dot_product_attention(q, q, q, torch.ones(3, 3) > 0, is_causal=True)
        with pytest.raises(ValueError, match="nheads of key must be 4, or enable_gqa=True"):
            F.scaled_dot_product_attention(q, q[:, :2], q[:, :2])


@pytest.mark.skipif(not HAS_REGISTRY, reason="this torch has no register_flash_attention_impl")
def test_the_registry_knows_the_name():
    assert "genai_perf" in REGISTRY.list_flash_attention_impls()
    assert REGISTRY.current_flash_attention_impl() is None
    with activated():
        assert REGISTRY.current_flash_attention_impl() == "genai_perf"
    assert REGISTRY.current_flash_attention_impl() is None
