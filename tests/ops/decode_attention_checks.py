"""What the tests of decode_attention share."""

import torch

import genai_perf as gp
from genai_perf.ops.decode_attention import cases, reference
from genai_perf.testing.numerics import assert_close_to_oracle

TESTED = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_NAME = {case.name: case for case in cases.CASES}


def copied(inputs: dict) -> dict:
    return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


def run(inputs: dict, backend="native", **changes):
    """out, lse and the caches afterwards; the inputs stay as they are."""
    own = copied(inputs) | changes
    out, lse = gp.decode_attention(**own, return_lse=True, backend=backend)
    return out, lse, own["k_cache"], own["v_cache"]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def same(a, b) -> bool:
    return torch.equal(bits(a), bits(b))


def doubled(inputs: dict) -> dict:
    """Everything of the dtype of q in float64; a quantized cache as it is."""
    dtype = inputs["q"].dtype
    keep = ("alibi_slopes", "k_scale", "v_scale")
    return {
        n: x.double() if isinstance(x, torch.Tensor) and x.dtype == dtype and n not in keep else x
        for n, x in inputs.items()
    }


def same_precision(inputs: dict, monkeypatch):
    """out and lse of the reference computing in the dtype of its inputs."""
    plain = reference.forward
    with monkeypatch.context() as patch:
        patch.setattr(reference, "forward", lambda *a: plain(*a, upcast=False))
        return run(inputs, "reference")[:2]


def check_oracle(inputs: dict, monkeypatch) -> None:
    out, lse, k_cache, v_cache = run(inputs)
    ref_out, ref_lse, *_ = run(doubled(inputs), "reference")
    yard_out, yard_lse = same_precision(inputs, monkeypatch)
    assert out.dtype == inputs["q"].dtype and lse.dtype == torch.float32
    assert_close_to_oracle(out, ref_out, yard_out)
    assert_close_to_oracle(lse, ref_lse, yard_lse, name="lse")
    _, _, ref_k, ref_v = run(inputs, "reference")
    assert same(k_cache, ref_k) and same(v_cache, ref_v), "the caches differ from the reference's"
