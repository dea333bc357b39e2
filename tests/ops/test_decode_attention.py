"""decode_attention against the float64 oracle, torch and transformers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from decode_attention_checks import BY_NAME, DTYPES, TESTED, check_oracle, run

import genai_perf as gp
from genai_perf.ops.decode_attention import cases
from genai_perf.ops.decode_attention.cases import make_inputs
from genai_perf.testing.numerics import assert_close_to_oracle


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", TESTED, ids=lambda c: c.name)
def test_oracle(isa, case, dtype, monkeypatch):
    if case.dtype not in (torch.float32, dtype):
        pytest.skip("a case of another dtype")
    check_oracle(make_inputs(dataclasses.replace(case, dtype=dtype)), monkeypatch)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("cache", [None, torch.int8], ids=["same", "int8"])
def test_large_logits(isa, size, dtype, cache, monkeypatch):
    case = cases.Case("", (300, 70, 130), 4, nheads=8, headdim=16, dtype=dtype, cache_dtype=cache)
    inputs = make_inputs(case)
    inputs["q"] = inputs["q"].abs() * (abs(size) ** 0.5)
    if cache is None:
        inputs["k_cache"] = inputs["k_cache"] * (size / 4 / abs(size) ** 0.5)
    else:
        inputs["k_scale"] = inputs["k_scale"] * (abs(size) ** 0.5 / 4)
    assert run(inputs)[1].abs().max() > 2e3
    check_oracle(inputs, monkeypatch)


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


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_of_a_float8_cache_arrives(isa, code):
    inputs = make_inputs(dataclasses.replace(BY_NAME["fp8"], page_size=None, seqlen_new=None))
    inputs["v_cache"].view(torch.uint8)[0, 7, 0, 5] = code
    out, *_ = run(inputs)
    assert out[0, 0, :2, 5].isnan().all() and out.isnan().sum() == 2
    inputs["k_cache"].view(torch.uint8)[0, 3, 1, 60] = code
    out, lse, *_ = run(inputs)
    assert out[0, 0, 2:4].isnan().all() and lse[0, 2:4].isnan().all()
    assert out.isnan().sum() == 2 + 2 * out.shape[-1] and lse.isnan().sum() == 2


# --- flash-attn ----------------------------------------------------------------------------------
