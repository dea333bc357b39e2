"""decode_attention against the float64 oracle, torch and transformers, and its contracts."""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import library

import genai_perf as gp
from genai_perf.ops.decode_attention import cases, reference
from genai_perf.ops.decode_attention.cases import SCALED, make_inputs
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


@pytest.fixture
def same_precision(monkeypatch):
    """The reference computing in the dtype of its inputs, as a function of the call."""
    plain = reference.forward

    def call(inputs):
        with monkeypatch.context() as patch:
            patch.setattr(reference, "forward", lambda *a: plain(*a, upcast=False))
            return run(inputs, "reference")[:2]

    return call


def check_oracle(inputs: dict, same_precision) -> None:
    out, lse, k_cache, v_cache = run(inputs)
    ref_out, ref_lse, *_ = run(doubled(inputs), "reference")
    yard_out, yard_lse = same_precision(inputs)
    assert out.dtype == inputs["q"].dtype and lse.dtype == torch.float32
    assert_close_to_oracle(out, ref_out, yard_out)
    assert_close_to_oracle(lse, ref_lse, yard_lse, name="lse")
    _, _, ref_k, ref_v = run(inputs, "reference")
    assert same(k_cache, ref_k) and same(v_cache, ref_v), "the caches differ from the reference's"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.name)
def test_oracle(isa, case, dtype, same_precision):
    if case.dtype not in (torch.float32, dtype):
        pytest.skip("a case of another dtype")
    check_oracle(make_inputs(dataclasses.replace(case, dtype=dtype)), same_precision)


# --- outside judges ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, seqlen_q, causal", [(300, 1, False), (300, 1, True), (7, 7, True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_against_torch(length, seqlen_q, causal, dtype):
    """torch's SDPA in float64 over the keys that are in the cache."""
    case = cases.Case("", (length,), seqlen_q, nheads=8, causal=causal, dtype=dtype, page_size=5)
    inputs = make_inputs(case)
    table = inputs["block_table"][0].long()
    k, v = (inputs[n][table].flatten(0, 1)[None, :length] for n in ("k_cache", "v_cache"))
    mask = torch.ones(seqlen_q, length, dtype=torch.bool).tril(length - seqlen_q)

    def sdpa(dtype):
        x = [t.to(dtype).transpose(1, 2) for t in (inputs["q"], k, v)]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = F.scaled_dot_product_attention(*x, mask if causal else None, enable_gqa=True)
        return y.transpose(1, 2)

    assert_close_to_oracle(run(inputs)[0], sdpa(torch.float64), sdpa(dtype))


def test_halves_are_rotated_as_transformers_does():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    case = dataclasses.replace(BY_NAME["llama"], seqlen_new=4, seqlen_q=4, page_size=None)
    inputs = make_inputs(case)
    half = torch.cat([inputs[n] for n in ("rotary_cos", "rotary_sin")], 1).chunk(2, 1)
    positions = inputs["cache_seqlens"][:, None] + torch.arange(4)
    cos, sin = (torch.cat((x, x), -1)[positions] for x in half)
    q, k = llama.apply_rotary_pos_emb(inputs["q"], inputs["k"], cos, sin, unsqueeze_dim=2)
    plain = inputs | {"q": q, "k": k, "rotary_cos": None, "rotary_sin": None}
    for got, want in zip(run(inputs), run(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_pairs_are_rotated_as_complex_numbers():
    inputs = make_inputs(BY_NAME["rotary_interleaved"])
    positions = inputs["cache_seqlens"][:, None] + torch.arange(2)
    factor = torch.complex(inputs["rotary_cos"], inputs["rotary_sin"])[positions][:, :, None]

    def turned(x):
        pairs = torch.view_as_complex(x[..., :16].unflatten(-1, (8, 2)).contiguous()) * factor
        return torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., 16:]), -1)

    plain = {"q": turned(inputs["q"]), "k": turned(inputs["k"]), "rotary_cos": None,
             "rotary_sin": None}  # fmt: skip
    for got, want in zip(run(inputs), run(inputs | plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("paged", [False, True])
def test_generation_is_full_attention(paged):
    """A prompt, then token after token, as transformers would with a static cache laid out
    (batch, heads, seqlen, dim), against causal attention over everything at once."""
    g = torch.Generator().manual_seed(0)
    prompt, steps, heads, heads_k, dim = 9, 6, 6, 2, 32
    total = prompt + steps
    q, k, v = (torch.randn(2, total, h, dim, generator=g) for h in (heads, heads_k, heads_k))
    store = torch.full((2, 2, heads_k, 16, dim), torch.nan)
    k_cache, v_cache = (x.transpose(1, 2) for x in store)
    table = None
    if paged:
        k_cache, v_cache = torch.full((2, 40, 1, heads_k, dim), torch.nan)
        table = torch.randperm(40, generator=g)[:32].view(2, 16).to(torch.int32)
    outs = []
    for first, last in [(0, prompt), *((i, i + 1) for i in range(prompt, total))]:
        outs.append(gp.flash_attn_with_kvcache(
            q[:, first:last], k_cache, v_cache, k[:, first:last], v[:, first:last],
            cache_seqlens=first, block_table=table, causal=True,
        ))  # fmt: skip
    want = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)),
                                          is_causal=True, enable_gqa=True)  # fmt: skip
    torch.testing.assert_close(torch.cat(outs, 1).double(), want.transpose(1, 2), rtol=1e-5,
                               atol=1e-5)  # fmt: skip


# --- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parts", "everything", "bf16", "int8", "fp8", "dim_111"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_paged_is_contiguous_bit_for_bit(isa, name, page_size):
    # 256 divides the room of both, so that the same random numbers go into it.
    case = dataclasses.replace(BY_NAME[name], spare=0, rotary_dim=0)
    case = dataclasses.replace(case, spare=-(max(case.lengths) + (case.seqlen_new or 0)) % 768)
    want = run(make_inputs(dataclasses.replace(case, page_size=None)))
    got = run(make_inputs(dataclasses.replace(case, page_size=page_size)))
    assert same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.name)
def test_poison_is_not_read(case):
    """The inputs of every test are poisoned with NaN; another poison gives the same bits."""
    a, b = (run(make_inputs(case, poison=poison)) for poison in (torch.nan, 3.0))
    assert same(a[0], b[0]) and same(a[1], b[1])
    assert a[0].isfinite().all()


@pytest.mark.parametrize("name", ["llama", "rows_by_index", "int8", "fp8", "everything"])
def test_append_writes_there_and_nowhere_else(isa, name):
    inputs = make_inputs(BY_NAME[name])
    _, _, *caches = run(inputs)
    for cache, before, fresh in zip(caches, ("k_cache", "v_cache"), ("k", "v"), strict=True):
        written = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b, length in enumerate(inputs["cache_seqlens"].tolist()):
            for position in range(length, length + inputs[fresh].shape[1]):
                page, slot = b, position
                if inputs["block_table"] is not None:
                    size = cache.shape[1]
                    page, slot = inputs["block_table"][b, position // size], position % size
                elif inputs["cache_batch_idx"] is not None:
                    page = inputs["cache_batch_idx"][b]
                written[page, slot] = True
        assert written.sum() == inputs[fresh].shape[:2].numel()
        changed = (bits(cache) != bits(inputs[before])).flatten(2).any(-1)
        assert torch.equal(changed, written)


def test_appended_values_are_those_given():
    inputs = make_inputs(BY_NAME["rows_by_index"])
    _, _, k_cache, _ = run(inputs)
    for b, row in enumerate(inputs["cache_batch_idx"]):
        start = inputs["cache_seqlens"][b]
        assert torch.equal(k_cache[row, start : start + 2], inputs["k"][b])


@pytest.mark.parametrize("dtype", SCALED, ids=lambda d: str(d)[6:])
def test_quantized_appends_round_and_saturate(isa, dtype):
    """Bit for bit the reference's, on halves, tiny and huge numbers, infinities and NaN."""
    base = torch.cat([torch.arange(-300.0, 300.0) / 2, torch.logspace(-12, 4, 399),
                      torch.tensor([torch.inf])])  # fmt: skip
    x = torch.cat([base, -base.roll(1)]).view(1, -1, 1, 8)
    if dtype != torch.int8:
        x[0, 0, 0, 0] = torch.nan
    cache = torch.zeros(1, x.shape[1], 1, 8, dtype=dtype)
    scales = {"k_scale": torch.tensor([1.0]), "v_scale": torch.tensor([0.37])}
    call = {"q": x[:, :1], "k_cache": cache, "v_cache": cache, "k": x, "v": x, "cache_seqlens": 0}
    want, got = run(call | scales, "reference"), run(call | scales)
    assert same(got[2], want[2]) and same(got[3], want[3])
    if dtype == torch.int8:
        expected = torch.tensor([-127, -100, 127], dtype=torch.int8)
        assert torch.equal(got[2].flatten()[[0, 100, 599]], expected)
    else:
        plain = x.clamp(-448, 448).to(dtype)
        assert same(got[2], plain)


def test_caches_inside_larger_memory():
    """Strided caches (heads first, and with gaps) give the bits of dense ones; the gaps stay."""
    inputs = make_inputs(BY_NAME["rows_by_index"])
    want = run(inputs)
    heads_first = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2)
                   for n in ("k_cache", "v_cache")}  # fmt: skip
    out, lse = gp.decode_attention(**inputs | heads_first, return_lse=True, backend="native")
    assert same(out, want[0]) and same(lse, want[1])
    nests = {n: torch.full([s + 2 for s in inputs[n].shape], 7.0) for n in heads_first}
    inner = {n: x[tuple(slice(1, -1) for _ in x.shape)].copy_(inputs[n]) for n, x in nests.items()}
    out, lse = gp.decode_attention(**inputs | inner, return_lse=True, backend="native")
    assert same(out, want[0]) and same(lse, want[1])
    for name, cache in zip(nests, want[2:], strict=True):
        assert same(inner[name], cache)
        inner[name].fill_(7.0)
        assert (nests[name] == 7.0).all()


def test_rows_that_repeat():
    """Two queries over one cache row; with an append the last of them stays."""
    inputs = make_inputs(cases.Case("", (5, 5), seqlen_new=1, headdim=8))
    idx = torch.zeros(2, dtype=torch.int32)
    for backend in ("native", "reference"):
        _, _, k_cache, _ = run(inputs, backend, cache_batch_idx=idx)
        assert torch.equal(k_cache[0, 5], inputs["k"][1, 0])


def test_offsets_past_two_billion_elements():
    """A page far into a cache of more than 2^31 elements, of which little memory is real."""
    page = 64 * 2 * 32
    pages = 2**31 // page + 3
    try:
        k_cache, v_cache = (torch.empty(pages, 64, 2, 32, dtype=torch.int8) for _ in "kv")
    except RuntimeError:
        pytest.skip("no room for two caches of 2 GiB of address space")
    small = torch.randint(-100, 100, (1, 64, 2, 32), dtype=torch.int8)
    k_cache[pages - 1], v_cache[pages - 1] = small[0], small[0]
    scale = torch.full((2,), 0.01)
    common = {"q": torch.randn(1, 1, 4, 32), "k_scale": scale, "v_scale": scale}
    table = torch.tensor([[pages - 1]], dtype=torch.int32)
    far = gp.decode_attention(k_cache=k_cache, v_cache=v_cache, cache_seqlens=50, **common,
                              block_table=table, backend="native")  # fmt: skip
    near = gp.decode_attention(k_cache=small, v_cache=small, cache_seqlens=50, **common)
    assert torch.equal(far, near)


# --- reproducibility -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parts", "fixed_splits", "everything", "int8"])
@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_a_sequence_alone_gives_the_same_bits(isa, name, num_splits):
    inputs = make_inputs(dataclasses.replace(BY_NAME[name], num_splits=num_splits))
    want = run(inputs)
    again = run(inputs)
    assert all(same(x, y) for x, y in zip(want, again, strict=True))
    batch = len(inputs["q"])
    paged = inputs["block_table"] is not None
    for i in range(batch):
        one = {
            n: x[i : i + 1]
            if isinstance(x, torch.Tensor) and x.dim() and len(x) == batch
            and not (paged and n.endswith("cache")) and not (x.dim() == 1 and n[1:] == "_scale")
            else x
            for n, x in inputs.items()
        }  # fmt: skip
        got = run(one)
        assert same(got[0], want[0][i : i + 1]) and same(got[1], want[1][i : i + 1])


@pytest.mark.parametrize("name", ["parts", "prefill", "bf16"])
def test_thread_count_changes_nothing(name):
    inputs = make_inputs(BY_NAME[name])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert same(other[0], results[0][0]) and same(other[1], results[0][1])


def test_splitting_changes_little():
    inputs = make_inputs(BY_NAME["parts"])
    whole = run(inputs, num_splits=1)
    for splits in (2, 7, 10**6):
        got = run(inputs, num_splits=splits)
        torch.testing.assert_close(got[0], whole[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1], whole[1], rtol=1e-6, atol=1e-6)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("cache", [None, torch.int8], ids=["same", "int8"])
def test_large_logits(isa, size, dtype, cache, same_precision):
    case = cases.Case("", (300, 70, 130), 4, nheads=8, headdim=16, dtype=dtype, cache_dtype=cache)
    inputs = make_inputs(case)
    inputs["q"] = inputs["q"].abs() * (abs(size) ** 0.5)
    if cache is None:
        inputs["k_cache"] = inputs["k_cache"] * (size / 4 / abs(size) ** 0.5)
    else:
        inputs["k_scale"] = inputs["k_scale"] * (abs(size) ** 0.5 / 4)
    assert run(inputs)[1].abs().max() > 2e3
    check_oracle(inputs, same_precision)


def test_all_ones(isa):
    q, ones = torch.ones(2, 1, 4, 16), torch.ones(2, 1300, 2, 16)
    options = {"softmax_scale": 1.0, "return_lse": True, "backend": "native"}
    out, lse = gp.decode_attention(q, ones, ones, cache_seqlens=1300, **options)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-6, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 16 + torch.tensor(1300.0).log().item()))


def test_blind_queries_are_zero(isa):
    out, lse, *_ = run(make_inputs(BY_NAME["queries_blind"]))  # 8 queries; 3 and 0 keys
    assert (out[0, :5] == 0).all() and (out[1] == 0).all()
    assert (lse[0, :, :5] == -torch.inf).all() and (lse[1] == -torch.inf).all()
    assert lse[0, :, 5:].isfinite().all()


def test_nan_arrives(isa):
    for where in ("q", "k_cache", "v_cache"):
        inputs = make_inputs(BY_NAME["bf16"])
        inputs[where][0, 0, 0, 0] = torch.nan
        out, _, *_ = run(inputs)
        assert out[0, 0, 0].isnan().any() and not out[1].isnan().any(), where


def test_nan_of_a_float8_cache_arrives(isa):
    inputs = make_inputs(dataclasses.replace(BY_NAME["fp8"], page_size=None, seqlen_new=None))
    inputs["v_cache"].view(torch.uint8)[0, 7, 0, 5] = 0x7F
    out, *_ = run(inputs)
    assert out[0, 0, :2, 5].isnan().all() and out.isnan().sum() == 2


# --- flash-attn ----------------------------------------------------------------------------------


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
    whole = {n: inputs[n].nan_to_num() for n in ("q", "k_cache", "v_cache")}
    room = whole["k_cache"].shape[1]
    want = gp.decode_attention(**whole, cache_seqlens=room)
    assert same(gp.flash_attn_with_kvcache(**whole), want)
    assert same(gp.flash_attn_with_kvcache(**whole, cache_seqlens=room), want)
    with pytest.raises(ValueError, match="cache_seqlens must be given where k and v are appended"):
        new = inputs["k_cache"][:, :1]
        gp.flash_attn_with_kvcache(**whole, k=new, v=new)
    with pytest.raises(ValueError, match=r"window_size must be \(left, right\), each an int >= -1"):
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
