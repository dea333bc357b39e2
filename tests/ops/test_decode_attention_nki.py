"""The NKI decode kernel in the interpreter against the float64 oracle, on one core and two."""

from dataclasses import replace

import pytest
import torch
from nki_backend import backend, interpreting
from test_decode_attention import copied, doubled, run, same_precision  # noqa: F401

import genai_perf as gp
from genai_perf.ops.decode_attention import cases
from genai_perf.testing.numerics import assert_close_to_oracle


def takes(case) -> bool:
    plain = case.leftpad is None and not case.alibi and not case.softcap and case.seqlen_new is None
    rows = case.seqlen_q * case.nheads // case.nheads_k
    fits = max(case.headdim, case.headdim_v or 0) <= 256 and rows <= 128
    return plain and fits and case.cache_dtype is None


CASES = [c for c in cases.CASES if {"smoke", "edge"} & set(c.tags) and takes(c)]


def on_nki(inputs, generation="gen3", cores=1):
    with interpreting(generation):
        backend.CONFIG = replace(backend.CONFIG, neuron_logical_cores=cores)
        return run(inputs, backend="nki")


@pytest.mark.parametrize("generation, cores", (("gen3", 1), ("gen3", 2), ("gen4", 1)))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_oracle(case, generation, cores, same_precision):  # noqa: F811
    inputs = cases.make_inputs(case)
    got = on_nki(inputs, generation, cores)
    ref, same = run(doubled(inputs), "reference"), same_precision(inputs)
    for name, x, ref64, yard in zip(("out", "lse"), got, ref, same, strict=False):
        assert_close_to_oracle(x, ref64, yard, name=name)


def test_there_are_cases():
    assert len(CASES) >= 8


def test_append_is_said_not_to_run():
    case = next(c for c in cases.CASES if c.name == "llama")
    with interpreting(), pytest.raises(gp.BackendUnsupported, match="appends nothing"):
        run(cases.make_inputs(case), backend="nki")


def test_poison_outside_is_not_read():
    case = next(c for c in CASES if c.page_size)
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
