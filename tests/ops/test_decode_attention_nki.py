"""The NKI decode kernel in the interpreter against the float64 oracle, on one core and two."""

from dataclasses import replace

import pytest
import torch
from decode_attention_checks import copied, doubled, run, same_precision
from nki_backend import backend, interpreting

import genai_perf as gp
from genai_perf.ops.decode_attention import cases
from genai_perf.testing.numerics import assert_close_to_oracle


def takes(case) -> bool:
    rows = case.seqlen_q * case.nheads // case.nheads_k
    return max(case.headdim, case.headdim_v or 0) <= 256 and rows <= 128


CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags) and takes(c)]


def on_nki(inputs, generation="gen3", cores=1):
    with interpreting(generation):
        backend.CONFIG = replace(backend.CONFIG, neuron_logical_cores=cores)
        return run(inputs, backend="nki")


@pytest.mark.parametrize("generation, cores", (("gen3", 1), ("gen3", 2), ("gen4", 1)))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle(case, generation, cores, monkeypatch):
    inputs = cases.make_inputs(case)
    got = on_nki(inputs, generation, cores)
    ref, same = run(doubled(inputs), "reference"), same_precision(inputs, monkeypatch)
    for name, x, ref64, yard in zip(("out", "lse"), got, ref, same, strict=False):
        assert_close_to_oracle(x, ref64, yard, name=name)
    for x, want in zip(got[2:], run(inputs, "reference")[2:], strict=True):
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (x, want))), "the cache"


def test_there_are_cases():
    assert len(CASES) >= len([c for c in cases.CASES if {"smoke", "edge"} & set(c.tags)]) - 2


@pytest.mark.parametrize("generation, cores", (("gen3", 1), ("gen3", 2), ("gen4", 1)))
@pytest.mark.parametrize("cache", (None, torch.int8, torch.float8_e4m3fn), ids=str)
def test_several_sections(cache, generation, cores, monkeypatch):
    """More keys than a section has, so that maxima move and rooms are used again."""
    case = cases.Case("", (2600, 150), nheads=8, nheads_k=2, headdim=64, page_size=16,
                      dtype=torch.bfloat16, cache_dtype=cache, sinks=True)  # fmt: skip
    inputs = cases.make_inputs(case)
    got = on_nki(inputs, generation, cores)
    ref, same = run(doubled(inputs), "reference"), same_precision(inputs, monkeypatch)
    for name, x, ref64, yard in zip(("out", "lse"), got, ref, same, strict=False):
        assert_close_to_oracle(x, ref64, yard, name=name)


def test_every_code_of_an_fp8_cache():
    """One key, so that out is its value: each finite e4m3fn code, exactly, on both chips."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes[127], codes[255] = 0, 0  # NaN
    v = codes.view(1, 1, 2, 128).view(torch.float8_e4m3fn)
    q = torch.zeros(1, 1, 2, 128, dtype=torch.bfloat16)
    scale = torch.ones(2)
    for generation in ("gen3", "gen4"):
        with interpreting(generation):
            out = gp.decode_attention(q, v, v, cache_seqlens=1, k_scale=scale, v_scale=scale,
                                      backend="nki")  # fmt: skip
        assert torch.equal(out.float(), v.float())


def test_append_needs_a_contiguous_cache():
    inputs = copied(cases.make_inputs(next(c for c in cases.CASES if c.name == "llama")))
    inputs["k_cache"] = inputs["k_cache"].transpose(1, 2).contiguous().transpose(1, 2)
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="a contiguous cache"):
        gp.decode_attention(**inputs, backend="nki")


def estimate(generation: str, kind: str, keys: int, heads_k: int, rows: int):
    """bf16 queries of head dimension 128 over one sequence in pages of 16."""
    from genai_perf.neuron.interpreter import target
    from genai_perf.ops.decode_attention.nki import _places
    from genai_perf.ops.decode_attention.nki.kernel import decode_attention

    pages = keys // 16
    types = {"plain": torch.bfloat16, "int8": torch.int8, "fp8": torch.uint8}
    cache = torch.empty(pages, 16, heads_k, 128, dtype=types[kind])
    numbers = torch.empty(1, heads_k)
    tensors = (
        torch.empty(1, heads_k, rows, 128, dtype=torch.bfloat16), cache, cache,
        torch.empty(1, pages, dtype=torch.int32), torch.empty(1, 2), torch.empty(1, rows),
        _places(16, pages, "cpu"), torch.empty(heads_k, rows), numbers, numbers, numbers,
    )  # fmt: skip
    with target(generation):
        return decode_attention.estimate(*map(backend.to_numpy, tensors), kind, False, False,
                                         0.1, 0.0, -1, -1)  # fmt: skip


@pytest.mark.parametrize("generation, kind, share", (
    ("gen3", "plain", 0.9), ("gen3", "int8", 0.5), ("gen4", "plain", 0.65), ("gen4", "fp8", 0.3),
))  # fmt: skip
def test_at_the_rate_of_hbm(generation, kind, share):
    """8192 keys of 8 key heads; an estimate, which a change of the kernel must not lower."""
    assert estimate(generation, kind, 8192, 8, 4).of_bandwidth > share


def test_poison_outside_is_not_read():
    case = next(c for c in CASES if c.page_size and c.seqlen_new is None)
    inputs = copied(cases.make_inputs(case))
    plain = on_nki(inputs)
    lengths, table, page = inputs["cache_seqlens"], inputs["block_table"], case.page_size
    used = torch.zeros(inputs["k_cache"].shape[:2], dtype=torch.bool)
    for b, length in enumerate(lengths.tolist()):
        for j in range(length):
            used[table[b, j // page], j % page] = True
    for name in ("k_cache", "v_cache"):
        inputs[name][~used] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], on_nki(inputs)[:2], strict=True))
