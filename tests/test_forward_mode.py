"""Forward-mode derivatives: right where an op has them, else one sentence, and never lost."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

import genai_perf as gp
from genai_perf.formats import sparse
from genai_perf.ops.distill_loss import distillation_loss

generator = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=generator)


Q, K, V = normal(2, 5, 4, 8), normal(2, 7, 2, 8), normal(2, 7, 2, 8)
CU_Q, CU_K = (torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [0, 3, 7]))
X, DENSE = normal(3, 64), normal(32, 64)
HALVED = sparse.pack(DENSE.where(normal(32, 64) > 0, 0.0))
LENGTHS = torch.tensor([3, 7], dtype=torch.int32)

RIGHT = {
    "attention": (lambda x: gp.attention(x, K, V, causal=True), Q),
    "keys": (lambda x: gp.attention(Q, x, V, softcap=2.0, alibi_slopes=torch.ones(4)), K),
    "bias": (lambda x: gp.attention(Q, K, V, attn_bias=x, sinks=torch.ones(4)), normal(4, 5, 7)),
    "lse": (lambda x: gp.attention(x, K, V, return_lse=True)[1], Q),
    "flash_attn": (lambda x: gp.flash_attn_func(x, K, V, window_size=(2, 1)), Q),
    "varlen": (lambda x: gp.flash_attn_varlen_func(x, K[0], V[0], CU_Q, CU_K, 3, 4), Q[0]),
    "sparse_matmul": (lambda x: gp.sparse_matmul(x, HALVED), X),
}
for name in ("int8", "nf4", "int4", "fp8"):
    RIGHT[f"quant_matmul {name}"] = (partial(gp.quant_matmul, qweight=gp.quantize(DENSE, name)), X)


@pytest.mark.parametrize("name", RIGHT)
def test_the_tangent_is_that_of_the_gradient(name):
    call, x = RIGHT[name]
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    out = call(leaf)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    value, found = torch.func.jvp(call, (x,), (tangent,))
    torch.testing.assert_close(value, out.detach(), rtol=1e-4, atol=1e-5)
    want = (gradient.double() * tangent.double()).sum()
    got = (upstream.double() * found.double()).sum()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        again = forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(again, found)


def test_jacobian():
    whole = torch.func.jacfwd(lambda x: gp.attention(x, K, V))(Q)
    by_rows = torch.autograd.functional.jacobian(lambda x: gp.attention(x, K, V), Q)
    torch.testing.assert_close(whole, by_rows, rtol=1e-4, atol=1e-5)


def int8_activations(x):
    return gp.quant_matmul(x, gp.quantize(DENSE, "int8"), activations="int8")


LABELS = torch.tensor([1, 2, 3])
REFUSED = {
    "decode_attention": (lambda x: gp.decode_attention(x, K, V, cache_seqlens=LENGTHS), Q),
    "flash_attn_with_kvcache": (lambda x: gp.flash_attn_with_kvcache(x, K, V), Q),
    "quant_matmul_int8": (int8_activations, X),
    "distillation_loss": (lambda x: distillation_loss(x, X, labels=LABELS), X),
}


@pytest.mark.parametrize("name", REFUSED)
def test_no_tangent_is_lost(name):
    call, x = REFUSED[name]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        call(x)


def test_a_backend_that_was_named():
    with forward_ad.dual_level():
        q = forward_ad.make_dual(Q, torch.ones_like(Q))
        with pytest.raises(gp.BackendUnsupported, match=r"jvp.*got backend 'native'"):
            gp.attention(q, K, V, backend="native")
        out = gp.attention(q, K, V, backend="reference")
        assert forward_ad.unpack_dual(out).tangent is not None
        assert torch.equal(gp.attention(Q, K, V), gp.attention(Q, K, V, backend="native"))
