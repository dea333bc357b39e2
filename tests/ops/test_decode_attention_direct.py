"""Reading quantized caches, and appending, without the op: its bits, its caches, its sentences."""

import pytest
import torch
from decode_attention_checks import copied, same

import genai_perf as gp
from genai_perf.ops.decode_attention import native
from genai_perf.ops.decode_attention.op import APPEND, READ
from genai_perf.ops.decode_attention.options import QUANTIZED

LENGTHS = torch.tensor([0, 5, 7], dtype=torch.int32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(dtype=torch.bfloat16, cache=None, new=2, table=None, by_batch=True, **options) -> dict:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    found = {"q": normal(3, 2, 6, 24), "cache_seqlens": LENGTHS, **options}
    for name, dim in (("k", 24), ("v", 40)):
        found[f"{name}_cache"] = (normal(3, 9, 2, dim) * 3).to(cache or dtype)
        if cache in QUANTIZED:
            scale = normal(*((3, 2) if by_batch else (2,)), dtype=torch.float32).abs()
            found[f"{name}_scale"] = scale
        if new is not None:
            found[name] = normal(3, new, 2, dim)
    if table is not None:
        found |= {f"rotary_{name}": normal(12, 8, dtype=table) for name in ("cos", "sin")}
    return found


@pytest.fixture
def op_calls(monkeypatch):
    calls = []
    for op in (READ, APPEND):
        run = op._run
        monkeypatch.setattr(op, "_run", lambda *a, run=run, **k: calls.append(a) or run(*a, **k))
    return calls


def both_ways(given: dict, op_calls: list, *, short: bool) -> None:
    """A call left to itself gives the bits of the op with "native" named, out, lse and caches."""
    caches = ("k_cache", "v_cache")
    own, by_op = (given | {name: given[name].clone() for name in caches} for _ in range(2))
    out, lse = gp.decode_attention(**own, return_lse=True)
    assert bool(op_calls) != short
    want, want_lse = gp.decode_attention(**by_op, return_lse=True, backend="native")
    assert op_calls and same(out, want) and same(lse, want_lse)
    for name in caches:
        assert same(own[name], by_op[name])
        assert same(own[name], given[name]) == (given.get("k") is None or given["k"].shape[1] == 0)
    assert own["k_cache"]._version == by_op["k_cache"]._version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [
    {}, {"causal": True, "softcap": 5.0}, {"window_size": (2, 1), "num_splits": 2},
    {"cache_seqlens": 7}, {"cache_seqlens": 0, "new": 1}, {"new": 0},
    {"table": torch.float32}, {"table": torch.bfloat16, "causal": True},
    {"table": torch.float16, "rotary_interleaved": False}, {"table": torch.float32, "new": 0},
], ids=str)  # fmt: skip
def test_appending(options, dtype, op_calls):
    both_ways(inputs(dtype, **options), op_calls, short=True)


@pytest.mark.parametrize("new", [None, 2])
@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cache", QUANTIZED, ids=str)
def test_quantized_caches(cache, dtype, by_batch, new, op_calls):
    both_ways(inputs(dtype, cache, new, by_batch=by_batch), op_calls, short=True)


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([x, x], 1)[:, 0] if x.dim() < 3 else torch.stack([x, x], 2)[:, :, 0]


@pytest.mark.parametrize("change", [
    {"rotary_seqlens": LENGTHS}, {"rotary_cos": apart}, {"rotary_sin": torch.Tensor.double},
    {"k": apart}, {"cache_leftpad": torch.zeros(3, dtype=torch.int32)},
    {"k_scale": apart}, {"alibi_slopes": torch.ones(6)},
], ids=lambda c: next(iter(c)))  # fmt: skip
def test_what_takes_the_long_way(change, op_calls):
    given = inputs(cache=torch.int8, table=torch.float32)
    for name, how in change.items():
        given[name] = how(given[name]) if callable(how) else how
    both_ways(given, op_calls, short=False)


BAD = {
    "cache_seqlens\\[2\\] must be in 0..6": {"new": 3},
    "in 0..1 .12 rotary positions less 11": {"new": 11},
    "k must be .batch 3, seqlen_new": {"k": torch.zeros(3, 2, 1, 24).bfloat16()},
    "v must be of the dtype of q": {"v": torch.zeros(3, 2, 2, 40)},
    "k and v must be both given": {"v": None},
    "rotary_cos must be .positions, rotary_dim": {"rotary_cos": torch.zeros(12, 13)},
    "rotary_sin must be of the shape": {"rotary_sin": torch.zeros(12, 7)},
    "rotary_cos and rotary_sin must be both": {"rotary_sin": None},
    "k_scale must be given": {"k_scale": None},
    "v_scale must be .nheads_k 2": {"v_scale": torch.ones(3)},
    "v_scale must be of as many dimensions": {"v_scale": torch.ones(2)},
}


@pytest.mark.parametrize("sentence", BAD)
def test_bad_input_keeps_its_sentence(sentence):
    change = dict(BAD[sentence])
    given = inputs(cache=torch.int8, table=torch.float32, new=change.pop("new", 2)) | change
    if "less 11" in sentence:  # room in the cache, none in the tables
        given["k_cache"] = torch.zeros(3, 40, 2, 24, dtype=torch.int8)
        given["v_cache"] = torch.zeros(3, 40, 2, 40, dtype=torch.int8)
    before = copied(given)
    with pytest.raises(ValueError, match=sentence):
        gp.decode_attention(**given)
    assert same(given["k_cache"], before["k_cache"]) and same(given["v_cache"], before["v_cache"])


def test_flash_attn_with_kvcache_goes_directly(monkeypatch):
    found, plain = [], native.direct
    monkeypatch.setattr(native, "direct", lambda *a, **k: found.append(plain(*a, **k)) or found[-1])
    x = inputs(table=torch.bfloat16)
    names = ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens")
    out = gp.flash_attn.flash_attn_with_kvcache(
        x["q"], x["k_cache"], x["v_cache"], *(x[name] for name in names), causal=True
    )
    assert found[0] is not None and out is found[0][0]
