"""nn.GroupedQueryAttention against torch's SDPA and a rotation of complex numbers."""

import pytest
import torch
import torch.nn.functional as F

from genai_perf.nn import GroupedQueryAttention

N, L, E = 2, 9, 24


def turned(x, positions, base, dim, interleaved):
    """Rotary as products of complex numbers; x: (..., seqlen, heads, head_dim)."""
    part, rest = x[..., :dim], x[..., dim:]
    pairs = part.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.mT
    frequency = base ** (-torch.arange(0, dim, 2).double() / dim)
    angle = positions.double()[..., None, None] * frequency
    spun = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle)
    spun = torch.view_as_real(spun)
    return torch.cat(((spun if interleaved else spun.mT).flatten(-2), rest), -1)


def expected(layer, x, positions=None):
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in
               (layer.q_proj, layer.k_proj, layer.v_proj))  # fmt: skip
    if layer.rotary_base is not None:
        positions = torch.arange(x.shape[1]) if positions is None else positions
        how = (positions, layer.rotary_base, layer.rotary_dim, layer.rotary_interleaved)
        q, k = turned(q, *how), turned(k, *how)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=layer.causal, enable_gqa=True)
    return layer.o_proj(out.transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        dict(num_heads=4, num_kv_heads=2),
        dict(num_heads=3, causal=False, bias=True),
        dict(num_heads=4, num_kv_heads=1, head_dim=8, rotary_base=100.0),
        dict(num_heads=2, rotary_base=100.0, rotary_interleaved=True),
        dict(num_heads=2, num_kv_heads=1, rotary_base=100.0, rotary_dim=6),
        dict(num_heads=2, rotary_base=100.0, rotary_dim=6, rotary_interleaved=True),
    ],
    ids=lambda o: "-".join(map(str, o)),
)
def test_against_torch(options):
    torch.manual_seed(0)
    layer = GroupedQueryAttention(E, **options, dtype=torch.float64)
    x = torch.randn(N, L, E, dtype=torch.float64, requires_grad=True)
    wanted = [x, *layer.parameters()]
    positions = torch.stack((torch.arange(L) + 3, torch.arange(L)))
    for places in (None, positions):
        got, want = layer(x, positions=places), expected(layer, x, places)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        dout = torch.randn_like(got)
        for a, b in zip(torch.autograd.grad(got, wanted, dout),
                        torch.autograd.grad(want, wanted, dout), strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_packed_sequences_are_their_own():
    torch.manual_seed(0)
    layer = GroupedQueryAttention(E, 4, 2, rotary_base=100.0)
    parts = [torch.randn(n, E) for n in (4, 7, 1)]
    cu_seqlens = torch.tensor([0, 4, 11, 11, 12], dtype=torch.int32)  # the third one is empty
    got = layer(torch.cat(parts), cu_seqlens=cu_seqlens, max_seqlen=7)
    want = torch.cat([layer(part[None])[0] for part in parts])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_window_softcap_and_bias_arrive():
    torch.manual_seed(0)
    x = torch.randn(N, L, E)
    layer = GroupedQueryAttention(E, 4, window_size=(2, None), softcap=1.0)
    plain = layer(x)
    far = x.clone()
    far[:, 0] += 1.0
    assert torch.equal(layer(far)[:, 3:], plain[:, 3:])
    assert not torch.equal(layer(far)[:, 2], plain[:, 2])
    assert not torch.equal(layer(x, attn_bias=torch.randn(L, L)), plain)
    layer.softcap, before = 0.0, plain
    plain = layer(x)
    assert not torch.equal(plain, before)
    layer.dropout = 0.5
    assert not torch.equal(layer(x), plain) and torch.equal(layer.eval()(x), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_heads=4, num_kv_heads=3), r"num_heads must be a multiple of num_kv_heads \(3\)"),
        (dict(num_heads=5), r"embed_dim must be a multiple of num_heads \(5\)"),
        (dict(num_heads=4, rotary_base=1e4, rotary_dim=3), "rotary_dim must be even"),
        (dict(num_heads=4, rotary_base=-1.0), "rotary_base must be positive"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GroupedQueryAttention(E, **options)


def test_refused_inputs():
    layer = GroupedQueryAttention(E, 4, rotary_base=1e4)
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(L, E))
    with pytest.raises(ValueError, match=r"positions must be of shape \(2, 9\)"):
        layer(torch.randn(N, L, E), positions=torch.arange(4))
