"""Plain CPU calls go to the native function without the op: the same bits, and only where nothing
else should see the call."""

import math
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile

import genai_perf as gp
from genai_perf import _dispatch
from genai_perf.ops.attention import native as attention_native
from genai_perf.ops.attention.op import FORWARD
from genai_perf.ops.decode_attention import native as decode_native
from genai_perf.ops.decode_attention.op import APPEND, READ

LENGTHS = torch.tensor([5, 9], dtype=torch.int32)
CALLS = {
    "attention": (FORWARD, lambda q, k, v, **o: gp.attention(q, k, v, **o)),
    "decode": (READ, lambda q, k, v, **o: gp.decode_attention(q, k, v, cache_seqlens=7, **o)),
    "decode lengths": (
        READ,
        lambda q, k, v, **o: gp.decode_attention(q, k, v, cache_seqlens=LENGTHS, **o),
    ),
}


def inputs(dtype=torch.float32, seqlen_q=3, **options):
    generator = torch.Generator().manual_seed(0)
    sizes = ((seqlen_q, 6, 24), (9, 2, 24), (9, 2, 40))
    return [
        torch.randn(2, *size, generator=generator).to(dtype).requires_grad_(bool(options))
        for size in sizes
    ]


@pytest.fixture
def op_calls(monkeypatch):
    """How often an op ran."""
    calls = []
    for op in (FORWARD, READ, APPEND):
        run = op._run
        monkeypatch.setattr(op, "_run", lambda *a, run=run, **k: calls.append(a) or run(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0, "softmax_scale": 0.3},
                                     {"window_size": (2, 1)}, {"window_size": (sys.maxsize, None)}],
                         ids=["plain", "causal", "window", "endless"])  # fmt: skip
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_op(name, options, dtype, op_calls):
    op, call = CALLS[name]
    q, k, v = inputs(dtype)
    out, lse = call(q, k, v, return_lse=True, **options)
    assert bool(op_calls) == (options.get("window_size") == (sys.maxsize, None))
    assert torch.equal(call(q, k, v, **options), out)
    by_op = call(q, k, v, return_lse=True, backend="native", **options)
    assert torch.equal(out, by_op[0]) and torch.equal(lse, by_op[1])
    reference = call(*(x.double() for x in (q, k, v)), backend="reference", **options)
    torch.testing.assert_close(out.double(), reference, atol=1e-6 if dtype == torch.float32 else
                               2e-2, rtol=0)  # fmt: skip


def test_heads_before_rows(op_calls):
    q, k, v = inputs(seqlen_q=1)
    sinks = torch.randn(6)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out, lse = decode_native.direct(*turned, 9, (-1, -1), None, 0.0, sinks=sinks, heads_first=True,
                                    return_lse=True)  # fmt: skip
    want = gp.decode_attention(q, k, v, cache_seqlens=9, sinks=sinks, backend="native",
                               return_lse=True)  # fmt: skip
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def with_profiler(call, *tensors):
    with profile() as recorded:
        call(*tensors)
    return recorded


def with_fake_tensors(call, *tensors):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = call(*(mode.from_tensor(x) for x in tensors))
    assert type(out).__name__ == "FakeTensor"


def with_another_backend(call, *tensors):
    call(*tensors, backend="reference")


def with_a_subclass(call, *tensors):
    class Seen(torch.Tensor):
        pass

    call(tensors[0].as_subclass(Seen), *tensors[1:])


def with_a_gradient(call, *tensors):
    call(tensors[0].detach().requires_grad_(), *tensors[1:])


WATCHED = [with_profiler, with_fake_tensors, with_another_backend, with_a_subclass, with_a_gradient]


@pytest.mark.parametrize("how", WATCHED)
@pytest.mark.parametrize("name", CALLS)
def test_what_must_not_be_short_cut(name, how, monkeypatch):
    _, call = CALLS[name]
    module = attention_native if name == "attention" else decode_native
    taken, plain = [], module.direct
    monkeypatch.setattr(module, "direct", lambda *a, **k: taken.append(plain(*a, **k)) or taken[-1])
    tensors = inputs()
    how(call, *tensors)
    assert not any(taken)
    call(*tensors)
    assert taken[-1]


def test_another_backend_by_environment(monkeypatch, op_calls):
    monkeypatch.setattr(_dispatch, "_NATIVE_FIRST", False)
    gp.attention(*inputs())
    assert len(op_calls) == 1
    assert gp._dispatch.explain(gp.attention, *inputs()).backend == "native"


BAD = {
    "nheads of q": {"q": torch.randn(2, 3, 5, 24)},
    "headdim of k|k_cache": {"k": torch.randn(2, 9, 2, 16)},
    "v must|v_cache must": {"v": torch.randn(2, 8, 2, 40)},
    "4 dimensions": {"q": torch.randn(3, 6, 24)},
    "one of torch": {"q": torch.ones(2, 3, 6, 24, dtype=torch.int64)},
    "of the dtype|one of torch": {
        "k": torch.randn(2, 9, 2, 24).half(),
        "v": torch.randn(2, 9, 2, 40).half(),
    },
    "batch|rows": {"q": torch.randn(3, 3, 6, 24)},
    "softcap must be 0": {"softcap": -1.0},
    "softcap must be a finite number, got 'x'": {"softcap": "x"},
    "softmax_scale must be a finite number, got nan": {"softmax_scale": math.nan},
    "softmax_scale must be a finite number, got 'x'": {"softmax_scale": "x"},
    "window_size": {"window_size": (-1, 0)},
}


@pytest.mark.parametrize("wrong", BAD)
@pytest.mark.parametrize("name", ["attention", "decode"])
def test_bad_input_keeps_its_sentence(name, wrong):
    changed = dict(BAD[wrong])
    tensors = [changed.pop(n, x) for n, x in zip("qkv", inputs(), strict=True)]
    with pytest.raises(ValueError, match=wrong):
        CALLS[name][1](*tensors, **changed)


def test_a_length_past_the_cache():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"cache_seqlens must be in 0\.\.9"):
        gp.decode_attention(q, k, v, cache_seqlens=10)
    long = torch.tensor([3, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cache_seqlens\[1\] must be in 0\.\.9"):
        gp.decode_attention(q, k, v, cache_seqlens=long)
    empty = gp.decode_attention(q, k, v, cache_seqlens=0)
    assert torch.equal(empty, torch.zeros_like(empty))


FLAGS = {
    "attention": (lambda q, k, v, **o: gp.attention(q, k, v, **o), ("causal", "return_lse")),
    "decode_attention": (
        lambda q, k, v, **o: gp.decode_attention(q, k, v, cache_seqlens=9, **o),
        ("causal", "return_lse", "rotary_interleaved", "check_cache"),
    ),
    "flash_attn_func": (
        lambda q, k, v, **o: gp.flash_attn_func(q, k, v, **o),
        ("causal", "deterministic", "return_attn_probs"),
    ),
    "flash_attn_with_kvcache": (
        lambda q, k, v, **o: gp.flash_attn_with_kvcache(q, k, v, **o),
        ("causal", "rotary_interleaved", "return_softmax_lse"),
    ),
}


ALL_FLAGS = [(name, flag) for name, (_, flags) in FLAGS.items() for flag in flags]


@pytest.mark.parametrize(("name", "flag"), ALL_FLAGS)
def test_flags_are_true_or_false(name, flag):
    call = FLAGS[name][0]
    for wrong in ("no", 0, 1, None, 0.5, torch.tensor(True)):
        with pytest.raises(ValueError, match=rf"^{name}: {flag} must be True or False, got"):
            call(*inputs(), **{flag: wrong})
    for value in (True, False):
        got, want = (call(*inputs(), **{flag: x}) for x in (np.bool_(value), value))
        assert type(got) is type(want)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
            assert torch.equal(a, b)
