"""The Triton attention kernels against the float64 oracle; run by test_attention_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1), in tiles of 32 x 16.
"""

import attention_oracle as oracle
import pytest
import torch

import genai_perf as gp
from genai_perf.ops.attention.options import PLAIN
from genai_perf.ops.attention.triton import launch
from genai_perf.ops.attention.triton.problem import Problem
from genai_perf.testing.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(call: oracle.Call) -> Problem:
    def put(x):
        return None if x is None else x.detach().to(DEVICE)

    cu_q, cu_k = call.cu_seqlens_q, call.cu_seqlens_k
    left, right = (-1 if side is None else side for side in (call.left, call.right))
    options = PLAIN._replace(
        attn_bias=put(call.bias), sinks=put(call.sinks), alibi_slopes=put(call.slopes),
        cu_seqlens_q=put(cu_q), cu_seqlens_k=put(cu_k),
        max_seqlen_q=0 if cu_q is None else cu_q.diff().max().item(),
        max_seqlen_k=0 if cu_k is None else cu_k.diff().max().item(),
        window_left=left, window_right=right, softmax_scale=call.scale, softcap=call.softcap,
    )  # fmt: skip
    return Problem(put(call.q), put(call.k), put(call.v), options)


def run(call: oracle.Call, dout, dlse):
    p = problem(call)
    out, lse = launch.forward(p)
    dlse = None if dlse is None else dlse.to(DEVICE)
    dq, dk, dv, dbias, dsinks = launch.backward(p, dout.to(DEVICE), dlse, out, lse)
    grads = {"q": dq, "k": dk, "v": dv, "bias": dbias, "sinks": dsinks}
    return out, lse, {name: g for name, g in grads.items() if g is not None}


def check(call: oracle.Call, seed=1):
    generator = torch.Generator().manual_seed(seed)
    exact = oracle.cast(call, torch.float64)
    out64, lse64 = oracle.forward(exact)
    dout = torch.randn(out64.shape, generator=generator).to(call.q.dtype)
    dlse = torch.randn(lse64.shape, generator=generator)
    out64, lse64, grads64 = oracle.gradients(exact, dout, dlse)
    out_pt, lse_pt, grads_pt = oracle.gradients(oracle.cast(call, call.q.dtype), dout, dlse)
    out, lse, grads = run(call, dout, dlse)
    assert_close_to_oracle(out, out64, out_pt)
    assert_close_to_oracle(lse, lse64, lse_pt, name="lse")
    assert grads.keys() == grads64.keys()
    for name, got in grads.items():
        assert got.dtype == call.leaves()[name].dtype
        assert_close_to_oracle(got, grads64[name], grads_pt[name], factor=3, name=f"d{name}")
    return out, lse, grads


def make(
    sq, sk, heads=2, heads_k=1, dim=16, dim_v=None, dtype=torch.float32, batch=1, seed=0, **options
):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, sq, heads, dim), (batch, sk, heads_k, dim), (batch, sk, heads_k, dim_v or dim)
    q, k, v = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return oracle.Call(q, k, v, options.pop("scale", dim**-0.5), **options)


def randn(*shape, seed=7, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cu(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


SHAPES = [  # seqlen_q, seqlen_k, heads, heads_k, dim, dim_v
    (1, 1, 1, 1, 8, 8), (5, 7, 2, 1, 40, 40), (67, 50, 2, 2, 16, 16), (50, 67, 2, 1, 1, 3),
    (33, 40, 7, 1, 16, 8),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, causal):
    sq, sk, heads, heads_k, dim, dim_v = shape
    check(make(sq, sk, heads, heads_k, dim, dim_v, batch=2, right=0 if causal else None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(causal, dtype):
    check(make(50, 67, 2, 1, 24, 16, dtype, right=0 if causal else None))


@pytest.mark.parametrize("dim, dim_v", [(59, 59), (80, 96), (111, 128), (256, 64), (192, 128)])
def test_head_dimensions(dim, dim_v):
    check(make(20, 35, 1, 1, dim, dim_v, torch.bfloat16, right=0))


@pytest.mark.parametrize("sq, sk, left, right", [
    (70, 70, 0, 0), (40, 90, 5, 0), (90, 40, 20, 3), (70, 70, None, 4), (40, 90, 7, None),
    (90, 40, 40, 40), (40, 90, 30, 40), (70, 70, 1000, 1000),
])  # fmt: skip
def test_windows(sq, sk, left, right):
    check(make(sq, sk, left=left, right=right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype):
    check(make(40, 20, dtype=dtype, softcap=softcap, scale=1.0))


@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("right", [None, 0])
def test_alibi(by_batch, right):
    slopes = randn(2, 2).abs() if by_batch else randn(2).abs()
    check(make(40, 50, batch=2, slopes=slopes, right=right))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("right", [None, 0])
def test_sinks(right, dtype):
    check(make(50, 40, 4, 2, dtype=dtype, sinks=randn(4, dtype=dtype) * 2, left=20, right=right))


def test_a_sink_of_minus_infinity_is_no_sink():
    plain = make(20, 20)
    with_sink = make(20, 20, sinks=torch.full((2,), -torch.inf))
    for a, b in zip(
        launch.forward(problem(plain)), launch.forward(problem(with_sink)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(2, 2, 40, 30), (1, 2, 40, 30), (2, 1, 1, 30), (1, 2, 40, 1),
                                   (1, 1, 1, 1)], ids=str)  # fmt: skip
def test_additive_bias(shape):
    check(make(40, 30, batch=2, bias=randn(*shape), right=0))


def test_additive_bias_in_half_precision():
    bias = randn(2, 1, 40, 30, dtype=torch.bfloat16)
    check(make(40, 30, batch=2, dtype=torch.bfloat16, bias=bias))


def test_bias_with_everything():
    check(make(40, 50, batch=2, bias=randn(1, 2, 40, 50), right=3, left=20, softcap=5.0,
               slopes=randn(2).abs(), sinks=randn(2)))  # fmt: skip


@pytest.mark.parametrize("right", [None, 0])
@pytest.mark.parametrize("shape", [(2, 2, 40, 50), (2, 1, 1, 50)], ids=str)
def test_bool_mask_with_empty_rows(shape, right):
    mask = randn(*shape) > 0
    mask[..., -3:, :] = False
    check(make(40, 50, batch=2, bias=mask, right=right))


def test_bias_of_minus_infinity_in_whole_rows():
    bias = randn(1, 1, 40, 50)
    bias[..., 5, :] = -torch.inf
    out, lse, grads = run(make(40, 50, bias=bias), randn(1, 40, 2, 16), randn(1, 2, 40))
    assert (out[:, 5] == 0).all() and (lse[..., 5] == -torch.inf).all()
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert (grads["q"][:, 5] == 0).all() and (grads["bias"][..., 5, :] == 0).all()


@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 9, "right": 2}], ids=str)
def test_varlen(options):
    lengths_q, lengths_k = (0, 40, 1, 17, 5), (3, 33, 1, 0, 70)
    call = make(63, 107, 4, 2, dtype=torch.float32, **options)
    call.q, call.k, call.v = call.q[0], call.k[0], call.v[0]
    call.cu_seqlens_q, call.cu_seqlens_k = cu(*lengths_q), cu(*lengths_k)
    check(call)


def test_varlen_with_sinks_alibi_softcap():
    call = make(63, 107, 4, 2, sinks=randn(4), slopes=randn(5, 4).abs(), softcap=10.0, right=0)
    call.q, call.k, call.v = call.q[0], call.k[0], call.v[0]
    call.cu_seqlens_q, call.cu_seqlens_k = cu(0, 40, 1, 17, 5), cu(3, 33, 1, 0, 70)
    check(call)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scale_that_is_not_positive(scale):
    check(make(40, 50, scale=scale, right=0))


def test_rows_that_see_nothing():
    out, lse, grads = run(make(50, 20, right=0), randn(1, 50, 2, 16), randn(1, 2, 50))
    assert (out[:, :30] == 0).all() and (lse[..., :30] == -torch.inf).all()
    assert (grads["q"][:, :30] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads.values())


@pytest.mark.parametrize("sq, sk", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(sq, sk):
    out, lse, grads = run(make(sq, sk, sinks=torch.ones(2)), torch.ones(1, sq, 2, 16), None)
    assert (
        out.shape == (1, sq, 2, 16)
        and (out == 0).all()
        and torch.allclose(lse, torch.ones_like(lse))
    )
    assert all((g == 0).all() for g in grads.values())


def test_all_ones_with_scale_one():
    call = make(40, 40, right=0, scale=1.0)
    call.q, call.k, call.v = (torch.ones_like(x) for x in (call.q, call.k, call.v))
    out, lse, _ = check(call)
    assert torch.allclose(out, torch.ones_like(out), rtol=1e-6)
    want = 16 + torch.arange(1.0, 41).log()
    assert torch.allclose(lse[0, 0].cpu(), want, rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_ten_thousand(sign):
    call = make(40, 40, scale=1.0, right=0)
    call.q, call.k = call.q * 50, sign * call.k.abs() * 50
    out, lse, grads = run(call, randn(1, 40, 2, 16), randn(1, 2, 40))
    assert lse.abs().max() > 5e3
    assert all(torch.isfinite(x).all() for x in (out, lse, *grads.values()))
    call.q = call.q * 0.01
    check(call)


def test_poison_around_the_tensors_changes_nothing():
    call = make(37, 45, 2, 1, 12, 10, batch=2, right=0)
    clean = run(call, randn(2, 37, 2, 10), randn(2, 2, 37))

    def poisoned(x):
        guard = torch.full((x.shape[0], x.shape[1] + 40, x.shape[2] + 1, x.shape[3] + 9), torch.nan)
        inside = guard[:, 3 : 3 + x.shape[1], 1:, 4 : 4 + x.shape[3]]
        inside.copy_(x)
        return inside

    call.q, call.k, call.v = poisoned(call.q), poisoned(call.k), poisoned(call.v)
    dirty = run(call, poisoned(randn(2, 37, 2, 10)), randn(2, 2, 37))
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert all(torch.equal(clean[2][name], dirty[2][name]) for name in clean[2])


def test_poison_in_other_sequences_changes_nothing():
    def varlen(fill):
        call = make(90, 90, right=0)
        call.q, call.k, call.v = call.q[0], call.k[0], call.v[0]
        for x in (call.q, call.k, call.v):
            x[:30], x[60:] = fill, fill
        call.cu_seqlens_q = call.cu_seqlens_k = cu(30, 30, 30)
        out, lse, grads = run(call, randn(90, 2, 16), randn(2, 90))
        return out[30:60], lse[:, 30:60], *(g[30:60] for g in grads.values())

    for a, b in zip(varlen(0.0), varlen(torch.nan), strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, b)


def test_layouts_agree_bitwise():
    call = make(40, 45, 4, 2, batch=2, right=0)
    dout, dlse = randn(2, 40, 4, 16), randn(2, 4, 40)
    want = run(call, dout, dlse)
    data = (call.q, call.k, call.v)
    by_head = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in data)
    last_strided = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in data)
    heads_first = oracle.Call(*by_head, call.scale, right=0)
    last_strided = oracle.Call(*last_strided, call.scale, right=0)
    for other in (heads_first, last_strided):
        got = run(other, dout, dlse)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        assert all(torch.equal(got[2][name], want[2][name]) for name in want[2])


def test_batch_invariance_and_repeatability():
    call = make(40, 45, 4, 2, batch=3, right=0, dtype=torch.bfloat16)
    dout, dlse = randn(3, 40, 4, 16, dtype=torch.bfloat16), randn(3, 4, 40)
    out, lse, grads = run(call, dout, dlse)
    again = run(call, dout, dlse)
    assert torch.equal(again[0], out) and all(torch.equal(again[2][n], grads[n]) for n in grads)
    alone = oracle.Call(call.q[1:2], call.k[1:2], call.v[1:2], call.scale, right=0)
    out1, lse1, grads1 = run(alone, dout[1:2], dlse[1:2])
    assert torch.equal(out1, out[1:2]) and torch.equal(lse1, lse[1:2])
    assert all(torch.equal(grads1[n], grads[n][1:2]) for n in grads)


def test_public_call_and_autograd():
    call = make(20, 30, right=0)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in (call.q, call.k, call.v))
    out, lse = gp.attention(q, k, v, causal=True, return_lse=True, backend="triton")
    dout, dlse = randn(*out.shape).to(DEVICE), randn(*lse.shape).to(DEVICE)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    want = run(call, dout.cpu(), dlse.cpu())
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert all(torch.equal(g, want[2][n]) for g, n in zip(grads, "qkv", strict=True))


def test_public_bias_and_its_gradient():
    call = make(9, 13)
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.to(DEVICE).requires_grad_() for x in (call.q, call.k, call.v))
        bias = torch.linspace(-1, 1, 9 * 13, device=DEVICE).view(1, 1, 9, 13).requires_grad_()
        out = gp.attention(q, k, v, attn_bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [None, 40])
def test_public_packed_sequences(longest):
    """With three rows past the last sequence, and with and without the length of the longest."""
    call = make(43, 50, right=0)
    lengths = {"cu_seqlens_q": cu(0, 30, 10), "cu_seqlens_k": cu(5, 35, 7)}
    lengths = {name: x.to(DEVICE) for name, x in lengths.items()}
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x[0].to(DEVICE).requires_grad_() for x in (call.q, call.k, call.v))
        out, lse = gp.attention(
            q, k, v, causal=True, **lengths, max_seqlen_q=longest, max_seqlen_k=longest,
            return_lse=True, backend=backend,
        )  # fmt: skip
        upstream = randn(*out.shape).to(DEVICE), randn(*lse.shape).to(DEVICE)
        results.append([out, lse, *torch.autograd.grad((out, lse), (q, k, v), upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_head_dimension_limit_is_said():
    call = make(2, 2, dim=300)
    with pytest.raises(gp.BackendUnsupported, match="head dimensions up to 256, got 300"):
        gp.attention(call.q.to(DEVICE), call.k.to(DEVICE), call.v.to(DEVICE), backend="triton")
