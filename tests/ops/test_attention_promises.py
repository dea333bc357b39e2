"""What every backend of attention promises beyond being right; on the CPU's backends here, and in
Triton's interpreter or on a GPU by test_attention_triton.py."""

from dataclasses import replace

import pytest
import torch

import genai_perf as gp
from genai_perf._backends import triton as toolchain
from genai_perf.ops.attention import cases as attention_cases
from genai_perf.ops.decode_attention.cases import Case, make_inputs
from genai_perf.testing.memory import far_apart, guarded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = toolchain.interpreting() or DEVICE == "cuda"
BACKENDS = ("triton",) if TRITON else ("native", "reference")
BACKWARD = attention_cases.Case(
    "", seqlen_q=37, seqlen_k=45, nheads=4, nheads_k=2, headdim=24, causal=True, sinks=True
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def attention(inputs: dict, backend: str) -> dict[str, torch.Tensor]:
    """out, lse and gradients of q, k, v and sinks."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, lse = gp.attention(**inputs | leaves, return_lse=True, backend=backend)
    grads = torch.autograd.grad((out.float().square().sum() + lse.sum()), list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def decode(inputs: dict, backend: str) -> dict[str, torch.Tensor]:
    own = {name: x.clone() if name.endswith("_cache") else x for name, x in inputs.items()}
    out, lse = gp.decode_attention(**own, return_lse=True, backend=backend)
    return {"out": out, "lse": lse}


def equal(got: dict, want: dict) -> bool:
    return all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_between_guards(backend, dtype):
    inputs = attention_cases.make_inputs(replace(BACKWARD, dtype=dtype), DEVICE)
    want = attention(inputs, backend)
    with guarded():
        assert equal(attention(inputs, backend), want)


def test_batches_of_attention_beyond_32_bits(backend):
    inputs = attention_cases.make_inputs(replace(BACKWARD, dtype=torch.bfloat16), DEVICE)
    want = attention(inputs, backend)
    far = inputs | {name: far_apart(inputs[name]) for name in ("q", "k", "v")}
    assert far["q"].stride(0) > 2**31
    assert equal(attention(far, backend), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_decode_between_guards(backend, dtype):
    case = Case("", (40, 9), headdim=16, num_splits=3, dtype=torch.bfloat16,
                cache_dtype=None if dtype == torch.bfloat16 else dtype)  # fmt: skip
    inputs = make_inputs(case, DEVICE)
    want = decode(inputs, backend)
    with guarded():
        assert equal(decode(inputs, backend), want)


@pytest.mark.parametrize("page_size", [None, 16])
def test_caches_beyond_32_bits(backend, page_size):
    """Rows of a batch and pages whose offsets are more than 2^31 elements."""
    case = Case("", (40, 9), headdim=16, page_size=page_size, dtype=torch.bfloat16)
    inputs = make_inputs(case, DEVICE)
    want = decode(inputs, backend)
    far = inputs | {name: far_apart(inputs[name]) for name in ("k_cache", "v_cache")}
    out, lse = gp.decode_attention(**far, return_lse=True, backend=backend)
    assert torch.equal(out, want["out"]) and torch.equal(lse, want["lse"])


@pytest.mark.parametrize("page_size", [1, 16])
def test_paged_is_contiguous_bit_for_bit(backend, page_size):
    case = Case("", (90, 33), headdim=16, spare=6, num_splits=2)
    want = decode(make_inputs(case, DEVICE), backend)
    assert equal(decode(make_inputs(replace(case, page_size=page_size), DEVICE), backend), want)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_fixed_splits_do_not_see_the_batch(backend, num_splits):
    inputs = make_inputs(Case("", (90, 7, 33), headdim=16, num_splits=num_splits), DEVICE)
    want = decode(inputs, backend)
    for i in range(3):
        one = {n: x[i : i + 1] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        assert equal(decode(one, backend), {name: x[i : i + 1] for name, x in want.items()})
