"""nn.MultiheadAttention against torch's: outputs, gradients, masks, state."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from genai_perf.nn import MultiheadAttention, multihead

N, L, S, E, H = 3, 5, 7, 16, 4
CONSTRUCTORS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both_more": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim_vdim": {"kdim": 12, "vdim": 10},
}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(**options):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(E, H, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = MultiheadAttention(E, H, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def run(layer, inputs, **options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out, weights = layer(*inputs, **options)
    wanted = [*inputs, *layer.parameters()]
    grads = torch.autograd.grad(out, wanted, normal(*out.shape, seed=9), allow_unused=True)
    return out, weights, grads


def check(theirs, ours, inputs, **options):
    want, got = (run(layer, inputs, **options) for layer in (theirs, ours))
    torch.testing.assert_close(got[0], want[0], atol=1e-12, rtol=1e-12)
    assert (got[1] is None) == (want[1] is None)
    for a, b in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    return got


@pytest.fixture
def calls(monkeypatch):
    made, plain = [], multihead.attention
    monkeypatch.setattr(multihead, "attention", lambda *a, **k: made.append(k) or plain(*a, **k))
    return made


def masks(kind: str) -> dict:
    """key_padding_mask and attn_mask in the ways that torch takes them."""
    hidden = torch.zeros(N, S, dtype=torch.bool)
    hidden[0, 5:], hidden[2, :2] = True, True
    each = normal(N * H, L, S) > 0.5
    each[..., 3] = False
    return {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "padding_added": {"key_padding_mask": normal(N, S)},
        "square": {"attn_mask": each[0]},
        "square_added": {"attn_mask": normal(L, S)},
        "by_head": {"attn_mask": each},
        "both": {"key_padding_mask": hidden, "attn_mask": each},
        "both_added": {"key_padding_mask": normal(N, S, seed=1), "attn_mask": normal(L, S)},
        "padding_and_added": {"key_padding_mask": torch.where(hidden, -torch.inf, 0.0).double(),
                              "attn_mask": normal(N * H, L, S)},
    }[kind]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "both", "both_added"])
@pytest.mark.parametrize("options", CONSTRUCTORS)
def test_against_torch(options, kind, batch_first, calls):
    options = {**CONSTRUCTORS[options], "batch_first": batch_first}
    inputs = [normal(N, L, E), normal(N, S, options.get("kdim", E), seed=1),
              normal(N, S, options.get("vdim", E), seed=2)]  # fmt: skip
    if not batch_first:
        inputs = [x.transpose(0, 1).contiguous() for x in inputs]
    check(*pair(**options), inputs, need_weights=False, **masks(kind))
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "kind", ["padding_added", "square", "square_added", "by_head", "padding_and_added"]
)
def test_every_mask(kind):
    inputs = [normal(L, N, E), normal(S, N, E, seed=1), normal(S, N, E, seed=2)]
    check(*pair(), inputs, need_weights=False, **masks(kind))


@pytest.mark.parametrize("seqlen_k", [L, S, 3])
def test_causal_hint(seqlen_k, calls):
    inputs = [normal(L, N, E), normal(seqlen_k, N, E, seed=1), normal(seqlen_k, N, E, seed=2)]
    hint = {"attn_mask": torch.ones(L, seqlen_k).triu(1).bool(), "is_causal": True}
    theirs, ours = pair()
    out = check(theirs, ours, inputs, need_weights=False, **hint)[0]
    assert calls[0]["attn_bias"] is None, "the hint is taken"
    alone = ours(*inputs, need_weights=False, is_causal=True)[0]
    assert torch.equal(alone, out)
    hidden = torch.zeros(N, seqlen_k, dtype=torch.bool)
    hidden[0, -1] = True
    check(theirs, ours, inputs, need_weights=False, key_padding_mask=hidden, **hint)


def test_self_attention_unbatched_and_with_weights():
    theirs, ours = pair(batch_first=True)
    x = normal(N, L, E)
    for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        want, got = theirs(x, x, x, **options), ours(x, x, x, **options)
        torch.testing.assert_close(got, want)
    hidden = torch.zeros(L, dtype=torch.bool)
    hidden[2] = True
    want = theirs(x[0], x[0], x[0], need_weights=False, key_padding_mask=hidden)
    torch.testing.assert_close(
        ours(x[0], x[0], x[0], need_weights=False, key_padding_mask=hidden), want
    )


def test_float32_by_the_kernels():
    theirs, ours = (layer.float() for layer in pair(batch_first=True))
    x = normal(N, L, E).float()
    want, got = theirs(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_it_is_one_of_torch():
    theirs, ours = pair(add_bias_kv=True)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for method in ("__init__", "forward"):
        want = inspect.signature(getattr(torch.nn.MultiheadAttention, method)).parameters
        got = inspect.signature(getattr(MultiheadAttention, method)).parameters
        assert [(p.name, p.default) for p in got.values()] == [
            (p.name, p.default) for p in want.values()
        ]
    want = inspect.signature(F.multi_head_attention_forward).parameters
    got = inspect.signature(multihead.multi_head_attention_forward).parameters
    assert [(p.name, p.default) for p in got.values()] == [
        (p.name, p.default) for p in want.values()
    ]


def test_dropout_while_training():
    torch.manual_seed(0)
    layer, x = MultiheadAttention(E, H, dropout=0.5, batch_first=True), torch.randn(N, L, E)

    def call():
        return layer(x, x, x, need_weights=False)[0].detach()

    torch.manual_seed(3)
    first = call()
    torch.manual_seed(3)
    assert torch.equal(call(), first) and not torch.equal(call(), first)
    mean = sum(call() for _ in range(300)) / 300
    layer.eval()
    assert torch.equal(call(), call())
    assert (mean - call()).abs().mean() < 0.1 * call().abs().mean()


def test_refused():
    x = torch.randn(N, L, E)
    layer = MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(batch, seqlen_k\) \(3, 5\)"):
        layer(x, x, x, need_weights=False, key_padding_mask=torch.zeros(3, 4).bool())
    with pytest.raises(ValueError, match=r"attn_mask must be \(5, 5\) or \(12, 5, 5\)"):
        layer(x, x, x, need_weights=False, attn_mask=torch.zeros(3, 5).bool())


def test_a_query_without_keys_gives_the_projection_of_nothing():
    layer = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(N, L, E)
    hidden = torch.zeros(N, L, dtype=torch.bool)
    hidden[1] = True
    out = layer(x, x, x, need_weights=False, key_padding_mask=hidden)[0]
    assert torch.equal(out[1], layer.out_proj.bias.expand(L, E))
