"""decode_attention's words, operators and refusals."""

import inspect

import pytest
import torch
from decode_attention_checks import BY_NAME, copied, doubled, run, same
from torch import library

import genai_perf as gp
from genai_perf.ops.decode_attention.cases import make_inputs


def test_flash_signature():
    """That of flash-attn 2.8, word for word."""
    assert str(inspect.signature(gp.flash_attn_with_kvcache)) == (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)"
    )


def test_flash_words():
    inputs = make_inputs(BY_NAME["window_both"])
    want = run(inputs)
    flash = {n: x for n, x in inputs.items() if n not in ("sinks", "k_scale", "v_scale")}
    out, lse = gp.flash_attn_with_kvcache(**flash, return_softmax_lse=True)
    assert same(out, want[0]) and same(lse, want[1])
    flash["window_size"] = (99, -1)
    assert same(gp.flash_attn_with_kvcache(**flash), run(inputs, window_size=(99, None))[0])
    flash["window_size"] = torch.tensor([99, -1])  # as flash-attn's own tests pass it
    assert same(gp.flash_attn_with_kvcache(**flash), run(inputs, window_size=(99, None))[0])
    whole = {n: inputs[n].nan_to_num() for n in ("q", "k_cache", "v_cache")}
    room = whole["k_cache"].shape[1]
    want = gp.decode_attention(**whole, cache_seqlens=room)
    assert same(gp.flash_attn_with_kvcache(**whole), want)
    assert same(gp.flash_attn_with_kvcache(**whole, cache_seqlens=room), want)
    with pytest.raises(ValueError, match="cache_seqlens must be given where k and v are appended"):
        new = inputs["k_cache"][:, :1]
        gp.flash_attn_with_kvcache(**whole, k=new, v=new)
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\), each -1"):
        gp.flash_attn_with_kvcache(**whole, window_size=(-2, 0))


# --- torch ---------------------------------------------------------------------------------------


def op_arguments(inputs: dict):
    """The operator and its positional arguments for a call."""
    from unittest import mock

    from genai_perf._dispatch import Op

    patched = mock.patch.object(Op, "__call__", side_effect=StopIteration)
    with patched as call, pytest.raises(StopIteration):
        gp.decode_attention(**inputs)
    name = "decode_attention" if inputs["k"] is None else "decode_attention_append"
    return getattr(torch.ops.genai_perf, name).default, call.call_args.args


@pytest.mark.parametrize("name", ["leftpad", "everything", "int8"])
def test_opcheck(name):
    op, args = op_arguments(make_inputs(BY_NAME[name], poison=0.0))
    library.opcheck(op, args)


def test_schema_says_what_is_written():
    schema = torch.ops.genai_perf.decode_attention_append.default._schema
    aliases = {a.name: a.alias_info for a in schema.arguments}
    written = [name for name, info in aliases.items() if info is not None and info.is_write]
    assert written == ["k_cache", "v_cache"]
    assert not torch.ops.genai_perf.decode_attention.default._schema.is_mutable


def test_torch_notices_the_write():
    for backend in ("native", "reference"):
        inputs = copied(make_inputs(BY_NAME["rows_by_index"]))
        before = inputs["k_cache"]._version
        gp.decode_attention(**inputs, backend=backend)
        assert inputs["k_cache"]._version > before


@pytest.mark.parametrize("name", ["leftpad", "llama", "int8"])
def test_compile_fullgraph(name):
    inputs = make_inputs(BY_NAME[name])
    want = run(inputs, q=inputs["q"] * 2)
    own = copied(inputs)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k_cache, v_cache):
        call = own | {"q": q * 2, "k_cache": k_cache, "v_cache": v_cache}
        return gp.decode_attention(**call, return_lse=True)

    got = step(own["q"], own["k_cache"], own["v_cache"])
    for x, y in zip((*got, own["k_cache"], own["v_cache"]), want, strict=True):
        assert same(x, y)


def test_compile_with_a_growing_length():
    cache = torch.randn(1, 40, 2, 16)
    q = torch.randn(1, 1, 4, 16)
    compiled = torch.compile(gp.flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    for length in (5, 6, 7, 20):
        want = gp.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length)
        assert same(compiled(q, cache, cache, cache_seqlens=length), want)


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: a call that read one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        for name in ("everything", "int8", "rows_by_index"):
            inputs = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
                      for n, x in make_inputs(BY_NAME[name]).items()}  # fmt: skip
            out, lse = gp.decode_attention(**inputs, return_lse=True)
            assert out.shape == inputs["q"].shape and lse.dtype == torch.float32


def test_nothing_has_a_gradient():
    inputs = make_inputs(BY_NAME["plain"])
    inputs["q"].requires_grad_()
    assert not gp.decode_attention(**inputs).requires_grad


def test_explain():
    inputs = make_inputs(BY_NAME["plain"])
    assert gp.explain(gp.decode_attention, **inputs).backend == "native"
    chosen = gp.explain(gp.decode_attention, **doubled(inputs))
    assert chosen.backend == "reference" and "float64" in chosen.reasons["native"]
    inputs = make_inputs(BY_NAME["llama"])
    assert gp.explain(gp.flash_attn_with_kvcache, **{
        n: x for n, x in inputs.items() if n not in ("sinks", "k_scale", "v_scale")
    } | {"window_size": (-1, -1)}).op == "decode_attention_append"  # fmt: skip


# --- bad input -----------------------------------------------------------------------------------

F32, I32 = torch.float32, torch.int32
GOOD = {
    "q": torch.zeros(2, 1, 4, 8), "k_cache": torch.zeros(2, 6, 2, 8),
    "v_cache": torch.zeros(2, 6, 2, 8), "cache_seqlens": torch.tensor([3, 6], dtype=I32),
}  # fmt: skip
NEW = {"k": torch.zeros(2, 1, 2, 8), "v": torch.zeros(2, 1, 2, 8), "cache_seqlens": 3}
TABLE = torch.zeros(2, 2, dtype=I32)
COS = torch.zeros(4, 4)
INT8 = {n: torch.zeros(2, 6, 2, 8, dtype=torch.int8) for n in ("k_cache", "v_cache")}
BAD = [
    ({"q": torch.zeros(2, 4, 8)}, r"q must be \(batch, seqlen, nheads, headdim\)"),
    ({"q": torch.zeros(2, 1, 4, 8).int()}, "q must be one of"),
    ({"q": torch.zeros(2, 1, 3, 8)}, r"nheads of q must be a multiple of nheads_k \(2\), got 3"),
    ({"q": torch.zeros(2, 1, 4, 9)}, "k_cache must be of headdim 9"),
    ({"q": torch.zeros(2, 1, 4, 8).half()}, "k_cache must be one of torch.float16, torch.int8"),
    ({"k_cache": torch.zeros(2, 6, 2, 8, device="meta")}, "k_cache must be of the device of q"),
    ({"v_cache": torch.zeros(2, 5, 2, 8)}, "v_cache must be of k_cache's pages, rows and heads"),
    ({"v_cache": torch.zeros(2, 6, 2, 8).half()}, "v_cache must be of the dtype of k_cache"),
    ({"k_cache": torch.zeros(1, 6, 2, 8), "v_cache": torch.zeros(1, 6, 2, 8)},
     "k_cache must be of at least batch 2 rows, got 1 rows"),
    ({"cache_seqlens": torch.tensor([3, 6])}, "cache_seqlens must be one of torch.int32"),
    ({"cache_seqlens": torch.tensor([3], dtype=I32)}, r"cache_seqlens must be \(batch 2,\)"),
    ({"cache_seqlens": torch.tensor([3, 7], dtype=I32)},
     r"cache_seqlens\[1\] must be in 0..6 \(capacity 6\), got 7"),
    ({"cache_seqlens": torch.tensor([-1, 0], dtype=I32)}, r"cache_seqlens\[0\] must be in 0..6"),
    ({"cache_seqlens": 7}, "cache_seqlens must be in 0..6"),
    ({"cache_seqlens": 3.0}, "cache_seqlens must be an int or an int32 tensor"),
    ({"block_table": TABLE.long()}, "block_table must be one of torch.int32"),
    ({"block_table": TABLE[:1]}, r"block_table must be \(batch 2, max_pages\)"),
    ({"block_table": TABLE + 2}, r"block_table\[0, 0\] must be in 0..1 \(pages .*, got 2"),
    ({"block_table": TABLE - 1}, r"block_table\[0, 0\] must be in 0..1 \(pages"),
    ({"block_table": TABLE, "cache_batch_idx": TABLE[0]}, "cache_batch_idx must be None"),
    ({"cache_batch_idx": torch.tensor([0, 2], dtype=I32)}, r"cache_batch_idx\[1\] must be in 0..1"),
    ({"cache_leftpad": torch.tensor([0, 7], dtype=I32)}, r"cache_leftpad\[1\] must be in 0..6"),
    ({"cache_leftpad": torch.tensor([4, 0], dtype=I32)}, r"cache_leftpad\[0\] must be in 0..3"),
    ({"k": NEW["k"]}, "k and v must be both given or both None"),
    (NEW | {"k": torch.zeros(2, 1, 2, 9)}, "k must be .batch 2, seqlen_new, nheads_k 2, headdim 8"),
    (NEW | {"v": torch.zeros(2, 2, 2, 8), "k": torch.zeros(2, 1, 2, 8)}, "v must be"),
    (NEW | {"cache_seqlens": 6}, r"cache_seqlens must be in 0..5 \(capacity 6 less 1 new keys\)"),
    (NEW | {"cache_seqlens": torch.tensor([0, 6], dtype=I32)}, r"cache_seqlens\[1\] must be in 0"),
    ({"rotary_cos": COS, "rotary_sin": COS}, "rotary_cos must be None where no k"),
    (NEW | {"rotary_cos": COS}, "rotary_cos and rotary_sin must be both"),
    (NEW | {"rotary_cos": COS, "rotary_sin": COS[:2]}, "rotary_sin must be of the shape of"),
    (NEW | {"rotary_cos": torch.zeros(9, 5), "rotary_sin": torch.zeros(9, 5)},
     r"rotary_cos must be \(positions, rotary_dim / 2\), rotary_dim at most 8"),
    (NEW | {"rotary_cos": COS, "rotary_sin": COS, "cache_seqlens": 4},
     r"cache_seqlens\[0\] must be in 0..3 \(4 rotary positions less 1 of this call\)"),
    (NEW | {"rotary_cos": COS, "rotary_sin": COS, "rotary_seqlens": TABLE[0] - 1},
     r"rotary_seqlens\[0\] must be in 0..3"),
    (NEW | {"rotary_seqlens": TABLE[0]}, "rotary_seqlens must be None without rotary_cos"),
    ({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "k_scale must be given for an int8 or"),
    (INT8, "k_scale must be given for an int8 or float8_e4m3fn cache and for no other, got None"),
    (INT8 | {"k_scale": torch.ones(4), "v_scale": torch.ones(4)},
     r"k_scale must be \(nheads_k 2,\) or \(batch 2, nheads_k 2\), got \(4,\)"),
    (INT8 | {"k_scale": torch.ones(2), "v_scale": torch.ones(2, 2)}, "v_scale must be of as many"),
    ({"window_size": (-2, 0)}, r"window_size must be \(left, right\)"),
    ({"window_size": 5}, "window_size must be a pair"),
    ({"softcap": -1.0}, r"softcap must be 0 \(none\) or positive"),
    ({"num_splits": -1}, "num_splits must be an int >= 0"),
    ({"alibi_slopes": torch.zeros(3)}, r"alibi_slopes must be \(nheads 4,\) or \(batch 2"),
    ({"sinks": torch.zeros(2, 4)}, r"sinks must be \(nheads 4,\), got"),
    ({"backend": "tpu"}, "backend must be one of"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD, ids=[m[:30] for _, m in BAD])
def test_bad_input(change, message):
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=message):
            gp.decode_attention(**GOOD | {"backend": backend} | change)


def test_a_refused_append_writes_nothing():
    cache = torch.zeros(2, 6, 2, 8)
    with pytest.raises(ValueError, match="cache_seqlens"):
        lengths = torch.tensor([0, 6], dtype=I32)
        ones = torch.ones(2, 1, 2, 8)
        gp.decode_attention(ones.repeat(1, 1, 2, 1), cache, cache, k=ones, v=ones,
                            cache_seqlens=lengths)  # fmt: skip
    assert (cache == 0).all()


def test_values_are_checked_on_request():
    from genai_perf.ops.decode_attention.options import Options
    from genai_perf.ops.decode_attention.values import check_values

    with pytest.raises(ValueError, match=r"cache_seqlens\[1\]"):
        lengths = torch.tensor([3, 7], dtype=I32)
        check_values(GOOD["k_cache"], Options(lengths, *(None,) * 7, -1, -1, 1.0, 0.0, 0))
        gp.decode_attention(**GOOD | {"cache_seqlens": lengths}, check_cache=True)
