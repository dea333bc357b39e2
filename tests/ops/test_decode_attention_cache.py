"""What decode_attention reads and writes of its cache, and on what its bits depend."""

import dataclasses

import pytest
import torch
from decode_attention_checks import BY_NAME, TESTED, bits, run, same

import genai_perf as gp
from genai_perf.ops.decode_attention import cases
from genai_perf.ops.decode_attention.cases import SCALED, make_inputs


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
