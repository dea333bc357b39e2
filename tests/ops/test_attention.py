"""attention against the float64 oracle, torch's own SDPA, and its contracts."""

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.attention import reference
from genai_perf.testing.numerics import assert_close_to_oracle

native = pytest.importorskip("genai_perf._C", reason="the native extension is not built")


@pytest.fixture(params=["scalar", "avx2", "avx512"])
def isa(request):
    before = native.isa()
    try:
        native.force_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.force_isa(before)


def make(batch, sq, sk, heads, heads_k, dim, dim_v, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, sq, heads, dim), (batch, sk, heads_k, dim), (batch, sk, heads_k, dim_v)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


SHAPES = [  # seqlen_q, seqlen_k, heads, heads_k, dim, dim_v
    (1, 1, 1, 1, 8, 8),
    (5, 7, 2, 1, 40, 40),
    (128, 128, 4, 2, 64, 64),
    (200, 317, 4, 2, 64, 64),
    (317, 200, 2, 2, 80, 32),
    (1, 600, 7, 1, 64, 64),
    (97, 193, 2, 2, 111, 128),
    (33, 300, 2, 1, 256, 256),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_oracle(isa, shape, causal, dtype):
    inputs = make(2, *shape, dtype)
    scale = shape[4] ** -0.5
    out, lse = gp.attention(*inputs, causal=causal, return_lse=True, backend="native")
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse))
    grads = torch.autograd.grad((out, lse), inputs, (dout, dlse))
    data = [x.detach() for x in inputs]
    data64 = [x.double() for x in data]
    out64, lse64 = reference.forward(*data64, causal, scale)
    grads64 = reference.backward(dout.double(), dlse.double(), *data64, out64, lse64, causal, scale)
    out_pt, lse_pt = reference.forward(*data, causal, scale, upcast=False)
    grads_pt = reference.backward(dout, dlse, *data, out_pt, lse_pt, causal, scale, upcast=False)
    assert_close_to_oracle(out, out64, out_pt)
    assert_close_to_oracle(lse, lse64, lse_pt, name="lse")
    for name, got, ref, pt in zip(("dq", "dk", "dv"), grads, grads64, grads_pt, strict=True):
        assert_close_to_oracle(got, ref, pt, factor=3, name=name)


def test_opcheck():
    q, k, v = make(1, 5, 7, 2, 1, 8, 8, torch.float32)
    torch.library.opcheck(torch.ops.genai_perf.attention_fwd.default, (q, k, v, True, 0.3))
    out, lse = gp.attention(q, k, v, return_lse=True)
    args = [x.detach() for x in (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(torch.ops.genai_perf.attention_bwd.default, (*args, True, 0.3))


def test_compile_fullgraph():
    q, k, v = make(1, 9, 9, 2, 1, 16, 16, torch.float32)

    def loss(q, k, v):
        return gp.attention(q * 2, k, v, causal=True).square().sum()

    want = torch.autograd.grad(loss(q, k, v), (q, k, v))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
