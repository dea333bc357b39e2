"""The NKI attention kernels in the interpreter against the float64 oracle, on trn2 and trn3."""

import numpy as np
import pytest
import torch
from nki_backend import backend, interpreting
from test_attention import run, same_precision

import genai_perf as gp
from genai_perf.neuron.interpreter import target
from genai_perf.ops.attention import cases
from genai_perf.testing.numerics import assert_close_to_oracle


def takes(case) -> bool:
    names = ("bias", "mask", "block_mask", "dropout_p", "alibi")
    others = (getattr(case, name) for name in names)
    plain = not any(others)
    return plain and max(case.headdim, case.headdim_v or 0) <= 256


CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags) and takes(c)]


def on_nki(inputs: dict, generation: str, upstream=None) -> dict:
    with interpreting(generation):
        return run(inputs, backend="nki", upstream=upstream)


def check(inputs: dict, dtype: torch.dtype) -> None:
    got = on_nki(inputs, "gen3")
    upstream = got.pop("upstream")
    ref = run(inputs, backend="reference", dtype=torch.float64, upstream=upstream)
    with same_precision():
        yardstick = run(inputs, backend="reference", upstream=upstream)
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if name == "lse" else dtype)
        factor = 2 if name in ("out", "lse") else 3
        assert_close_to_oracle(tensor, ref[name], yardstick[name], factor, name)
    # trn3 is another machine, and rounds nowhere that trn2 does not.
    other = on_nki(inputs, "gen4", upstream)
    assert all(torch.equal(tensor, other[name]) for name, tensor in got.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle(case):
    check(cases.make_inputs(case), case.dtype)


def small(seqlen_q=5, seqlen_k=7, dtype=torch.float32, heads=2, dim=16):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, seqlen_q, heads, dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, seqlen_k, heads, dim, generator=generator).to(dtype)
    return q, k, v


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_several_sections_and_a_running_maximum(dtype):
    """More than 2048 keys: the maximum moves and what was summed before decays."""
    q, k, v = small(130, 2500, dtype, heads=1)
    k = k * torch.linspace(0.1, 3, 2500)[:, None, None].to(dtype)
    check(
        {"q": q, "k": k, "v": v, "causal": True, "sinks": torch.tensor([2.0], dtype=dtype)}, dtype
    )


def test_keys_that_do_not_stay_in_sbuf(monkeypatch):
    from genai_perf.ops.attention.nki import fwd_kernel

    q, k, v = small(300, 2300, heads=1)
    with interpreting():
        once = gp.attention(q, k, v, causal=True, backend="nki")
        monkeypatch.setattr(fwd_kernel, "RESIDENT_BYTES", 0)
        again = gp.attention(q, k, v, causal=True, backend="nki")
    assert torch.equal(once, again)


def test_queries_in_several_sections_of_the_backward(monkeypatch):
    from genai_perf.ops.attention.nki import bwd_kernel

    monkeypatch.setattr(bwd_kernel, "SECTION_BYTES", 4096)
    q, k, v = small(300, 520, heads=2, dim=32)
    check({"q": q, "k": k[:, :, :1], "v": v[:, :, :1], "causal": True}, torch.float32)


@pytest.mark.parametrize("size", (1e4, -1e4))
def test_large_logits(size):
    q, k, v = small()
    q[..., 0], k[..., 0] = 1.0, size
    k[:, 3, :, 0] = 0.9 * size
    check({"q": q, "k": k, "v": v, "softmax_scale": 1.0}, torch.float32)


def test_all_ones():
    x = torch.ones(1, 300, 1, 16)
    with interpreting():
        out, lse = gp.attention(x, x, x, softmax_scale=1.0, return_lse=True, backend="nki")
    torch.testing.assert_close(out, x, rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 16 + torch.tensor(300.0).log().item()))


def test_batch_invariance_and_repeatability():
    case = next(c for c in cases.CASES if c.name == "blocks")
    inputs = cases.make_inputs(case)
    with interpreting():
        whole = gp.attention(**inputs, backend="nki")
        assert torch.equal(whole, gp.attention(**inputs, backend="nki"))
        alone = {n: x[1:2] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        assert torch.equal(whole[1:2], gp.attention(**alone, backend="nki"))


def test_strides():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in small(40, 50))
    with interpreting():
        strided = gp.attention(q, k, v, backend="nki")
        plain = gp.attention(*(x.contiguous() for x in (q, k, v)), backend="nki")
    assert torch.equal(strided, plain)


@pytest.mark.parametrize("options, reason", (
    ({"alibi_slopes": torch.ones(2)}, "nki takes no alibi_slopes"),
    ({"attn_bias": torch.zeros(5, 7)}, "nki takes no attn_bias"),
    ({"softmax_scale": -1.0}, "nki takes a positive softmax_scale"),
))  # fmt: skip
def test_what_it_does_not_take(options, reason):
    with interpreting(), pytest.raises(gp.BackendUnsupported, match=reason):
        gp.attention(*small(), **options, backend="nki")


def test_never_chosen_by_itself():
    with interpreting():
        explained = gp.explain(gp.attention, *small())
    assert explained.backend == "native"


def test_named_without_the_switch():
    with pytest.raises(gp.BackendUnsupported, match="nki needs tensors on a Neuron device"):
        gp.attention(*small(), backend="nki")


def estimate(generation: str, seqlen: int, dim: int, causal: bool):
    from genai_perf.ops.attention.nki.fwd_kernel import attention_fwd

    x = backend.to_numpy(torch.empty(1, seqlen, 1, dim, dtype=torch.bfloat16))
    sinks = np.empty((1, 1), np.float32)
    with target(generation):
        right = 0 if causal else -1
        return attention_fwd.estimate(x, x, x, sinks, False, dim**-0.5, 0.0, -1, right)


@pytest.mark.parametrize("generation, causal, of_peak, tensor", (
    ("gen3", False, 0.65, 0.80), ("gen3", True, 0.62, 0.80), ("gen4", False, 0.65, 0.80),
))  # fmt: skip
def test_the_tensor_engine_is_kept_busy(generation, causal, of_peak, tensor):
    """8k tokens of head dimension 128; an estimate, which a change of the kernel must not lower."""
    report = estimate(generation, 8192, 128, causal)
    assert report.of_peak >= of_peak and report.share("tensor") >= tensor
    assert report.engines["dma"].seconds < 0.7 * report.seconds
