"""The Triton decode kernels against the float64 oracle; run by test_decode_attention_triton.py.

On a GPU if there is one, else in Triton's interpreter (TRITON_INTERPRET=1), in tiles of 16 x 16.
"""

from dataclasses import replace

import pytest
import torch

import genai_perf as gp
from genai_perf.ops.decode_attention import cases, reference
from genai_perf.ops.decode_attention.cases import make_inputs
from genai_perf.testing.numerics import assert_close_to_oracle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter is slow: sequences that are long only to have several parts are cut.
LONGEST = 150
BY_NAME = {case.name: case for case in cases.CASES}
TESTED = [
    replace(case, lengths=tuple(min(n, LONGEST) for n in case.lengths))
    for case in cases.CASES
    if {"smoke", "edge"} & set(case.tags)
]


def run(inputs: dict, backend: str):
    """out, lse and the caches afterwards, on the CPU; the inputs stay as they are."""
    device = DEVICE if backend == "triton" else "cpu"
    own = {n: x.clone().to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    out, lse = gp.decode_attention(**own, return_lse=True, backend=backend)
    return tuple(x.cpu() for x in (out, lse, own["k_cache"], own["v_cache"]))


def doubled(inputs: dict) -> dict:
    dtype, keep = inputs["q"].dtype, ("alibi_slopes", "k_scale", "v_scale")
    return {
        n: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype and n not in keep else x
        for n, x in inputs.items()
    }


def same(a, b) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.name)
def test_oracle(case, dtype, monkeypatch):
    if case.dtype == torch.bfloat16 or case.headdim > 128:
        dtype = torch.bfloat16
    inputs = make_inputs(replace(case, dtype=dtype))
    out, lse, *caches = run(inputs, "triton")
    ref_out, ref_lse, *_ = run(doubled(inputs), "reference")
    _, _, *ref_caches = run(inputs, "reference")
    plain = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a: plain(*a, upcast=False))
    yard_out, yard_lse, *_ = run(inputs, "reference")
    assert_close_to_oracle(out, ref_out, yard_out)
    assert_close_to_oracle(lse, ref_lse, yard_lse, name="lse")
    for cache, want in zip(caches, ref_caches, strict=True):
        if DEVICE == "cpu" or case.rotary_dim == 0:
            assert same(cache, want)
        else:  # a GPU contracts products and sums
            torch.testing.assert_close(cache.float(), want.float(), rtol=0.02, atol=1e-3,
                                       equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_appends_are_the_references(dtype):
    base = torch.cat([torch.arange(-40.0, 40.0) / 2, torch.logspace(-12, 4, 79),
                      torch.tensor([torch.inf])])  # fmt: skip
    x = torch.cat([base, -base]).view(1, -1, 1, 16)
    cache = torch.zeros(1, x.shape[1], 1, 16, dtype=dtype)
    call = {"q": x[:, :1], "k_cache": cache, "v_cache": cache, "k": x, "v": x, "cache_seqlens": 0,
            "k_scale": torch.tensor([1.0]), "v_scale": torch.tensor([0.37])}  # fmt: skip
    want, got = run(call, "reference"), run(call, "triton")
    assert same(got[2], want[2]) and same(got[3], want[3])


def test_large_logits():
    inputs = make_inputs(cases.Case("", (70, 40), nheads=8, headdim=16))
    inputs["q"], inputs["k_cache"] = inputs["q"] * 100, inputs["k_cache"] * 100
    out, lse, *_ = run(inputs, "triton")
    ref_out, ref_lse, *_ = run(doubled(inputs), "reference")
    yard_out, yard_lse, *_ = run(inputs, "reference")
    assert ref_lse.abs().max() > 1e4
    assert_close_to_oracle(out, ref_out, yard_out)
    assert_close_to_oracle(lse, ref_lse, yard_lse, name="lse")


def test_flash_name():
    inputs = make_inputs(cases.Case("", (40,), headdim=16))
    assert gp.explain(gp.decode_attention, **{
        n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()
    }).backend == "triton"  # fmt: skip
