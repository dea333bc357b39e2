"""Running cases: what a row holds, and what becomes of variants that are wrong or fail."""

import json
from dataclasses import replace

import pytest
import torch

from genai_perf.bench import peers, results, runner, shapes
from genai_perf.bench.problem import Check, Unsupported, Variant, join
from genai_perf.bench.runner import Selection, Settings
from genai_perf.bench.suites import SUITES, attention, suite
from genai_perf.models import tiny_python_lm

from .small import shrink

QUICK = Settings(cache="hot", budget_seconds=2.0, warmup_seconds=0.0, memory=False, seed=3)
CASE = "float32_s512_d64_causal"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        runner, "measure_peaks", lambda *args, **kwargs: runner.Peaks(2e10, 2e10, {"float32": 1e11})
    )
    return {op: shrink(monkeypatch, op) for op in SUITES}


def run_one(settings=QUICK, samples=None, **fields):
    report = runner.run([Selection("attention", (CASE,), **fields)], settings, samples=samples)
    return report["rows"][0], report


def by_name(row):
    return {variant["name"]: variant for variant in row["variants"]}


def test_a_row(small, tmp_path):
    journal = tmp_path / "x.samples.jsonl"
    row, report = run_one(samples=journal, against=("torch-sdpa", "torch-sdpa:math"))
    found = by_name(row)
    assert [v["status"] for v in row["variants"]] == ["ok"] * 3
    assert all(0 < v["error"] <= v["allowed"] and v["median"] > 0 for v in row["variants"])
    assert [(p["baseline"], p["candidate"]) for p in row["comparisons"]] == [
        ("torch-sdpa", "native"), ("torch-sdpa:math", "native")]  # fmt: skip
    assert row["noise"]["of"] == "native"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert len(lines) == len(found["native"]["seconds"]) == row["comparisons"][0]["pairs"]
    assert [line["seconds"]["native"] for line in lines] == found["native"]["seconds"]
    assert lines[0]["order"] == lines[1]["order"][::-1]
    path = tmp_path / "results" / results.file_name(report["created"], report["provenance"])
    results.write(path, report)
    assert results.load(path) == json.loads(json.dumps(report))


def test_a_variant_with_wrong_numbers_gets_no_time(small, monkeypatch):
    plain = attention.own

    def wrong(problem, backend):
        good = plain(problem, backend)
        return Variant(lambda: tuple(x + 1e-3 for x in good.call()), good.result)

    monkeypatch.setattr(attention, "own", wrong)
    row, _ = run_one()
    bad = by_name(row)["native"]
    assert (bad["status"], bad["median"], bad["seconds"]) == ("failed", None, [])
    assert "against the oracle" in bad["reason"]
    assert row["comparisons"] == []
    assert by_name(row)["torch-sdpa"]["median"] > 0


def test_nan_fails_the_check():
    assert not Check(float("nan"), 1.0).passed
    assert join([Check(0.1, 1.0), Check(float("nan"), 1.0)]).error != 0.1


@pytest.mark.parametrize(
    "error, status",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("CUDA error: device lost"), "error"),
    ],
)
@pytest.mark.parametrize("after", [0, 12])
def test_a_variant_that_fails_says_so_and_the_rest_goes_on(
    small, monkeypatch, error, status, after
):
    """At once, or in the middle of the rounds."""
    plain, calls = attention.own, []

    def failing(problem, backend):
        good = plain(problem, backend)

        def call():
            calls.append(1)
            if len(calls) > after + 1:  # one for the choice of the backend
                raise error
            return good.call()

        return Variant(call, good.result)

    monkeypatch.setattr(attention, "own", failing)
    row, _ = run_one(backends=("native",))
    assert by_name(row)["native"]["status"] == status
    assert by_name(row)["native"]["median"] is None
    assert by_name(row)["torch-sdpa"]["median"] > 0


def test_a_peer_that_is_not_there_is_skipped_by_name(small, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    row, _ = run_one(against=("torch-sdpa", "xformers"))
    assert by_name(row)["xformers"]["status"] == "skipped"
    assert by_name(row)["xformers"]["reason"] == "xformers is not installed"


def test_a_named_backend_that_cannot_run_is_skipped(small):
    row, _ = run_one(backends=("triton", "native"))
    if not torch.cuda.is_available():
        assert by_name(row)["triton"]["status"] == "skipped"
    assert by_name(row)["native"]["status"] == "ok"


def test_memory_beside_the_floor(monkeypatch):
    """Flash attention holds no score matrix: little over q, k, v and out; the math path does."""
    settings = replace(QUICK, memory=True, budget_seconds=0.05)
    row, _ = run_one(settings, against=("torch-sdpa:math",))
    ours, math = (by_name(row)[name]["memory"] for name in ("native", "torch-sdpa:math"))
    assert ours["input_bytes"] == 3 * 512 * 8 * 64 * 4
    assert math["extra_bytes"] >= 8 * 512 * 512 * 4  # the scores
    assert 0.9 < ours["over_floor"] < math["over_floor"]
    assert ours["resident_peak_bytes"] > ours["input_bytes"] + ours["extra_bytes"]


@pytest.mark.parametrize("op", SUITES)
def test_every_variant_that_is_here_passes_the_oracle(small, op):
    room, ran = suite(op), set()
    for case in small[op].values():
        for phase in room.PHASES:
            problem = room.make(case, phase, "cpu", 5)
            for name in ["native", *peers.variants(op)]:
                if name == "flex-attention":  # compiles for a minute
                    continue
                try:
                    own = name == "native"
                    variant = room.own(problem, name) if own else peers.build(name, problem)
                except Unsupported:
                    continue
                with torch.set_grad_enabled("backward" in phase):
                    outputs = variant.result(variant.call())
                    check = room.check(problem, outputs, variant.numerics, variant.weight)
                assert check.passed, (name, case.name, phase, check)
                ran.add(name)
    assert {"native", room.BASELINE} <= ran


def test_unknown_names_offer_the_nearest():
    for selection, words in {
        Selection("atention"): "no op is named 'atention'; did you mean attention",
        Selection(
            "attention", ("float32_s512_d64_casual",)
        ): "did you mean float32_s512_d64_causal",
        Selection("attention", against=("torch-spda",)): "no peer of attention.*torch-sdpa",
        Selection("attention", phases=("backwards",)): "no phase is named 'backwards'",
        Selection("attention", backends=("nativ",)): "did you mean native",
        Selection("attention", dtypes=("bf16",)): "no dtype is named 'bf16'",
        Selection("attention", ("float32*",), dtypes=("bfloat16",)): "is of dtype bfloat16",
    }.items():
        with pytest.raises(ValueError, match=words):
            runner.select(selection)


def test_patterns_and_dtypes_choose_cases():
    chosen = runner.select(Selection("attention", ("*_s512_*",), dtypes=("bfloat16",)))
    assert {case.name for case, _ in chosen} == {
        f"bfloat16_s512_d{dim}_{kind}" for dim in (64, 128) for kind in ("causal", "full")
    }


def test_cases_take_the_shapes_of_a_model():
    folder = tiny_python_lm()
    names = [case.name for case, _ in runner.select(Selection("attention", model=folder))]
    assert "float32_s512_d64_causal" in names and len(set(names)) == len(names)
    case = shapes.cases("attention", folder)["bfloat16_s1024_d64_full"]
    assert (case.nheads, case.nheads_k, case.headdim) == (4, 2, 64)
    assert not any(case.seqlen_q > 1024 for case in shapes.cases("attention", folder).values())
    linear = shapes.cases("quant_matmul", folder)
    assert {(c.n, c.k) for c in linear.values()} == {
        (256, 256), (128, 256), (768, 256), (256, 768)}  # fmt: skip
    assert linear["nf4-1x768x256-float32"].k == 256
    assert shapes.cases("quantize", folder)["nf4-768x256-float32"].shape == (768, 256)
    assert shapes.cases("distill_loss", folder)["bench-64"].vocab == 4096


def test_the_highest_roof_of_a_run_holds_for_all_of_its_rows(small, monkeypatch):
    """What other work took from the first look, a later one gives back."""
    looks = iter(
        [runner.Peaks(1e9, 2e9, {"float32": 1e6}), runner.Peaks(3e9, 1e9, {"float32": 5e6})]
    )
    monkeypatch.setattr(runner, "measure_peaks", lambda *args, **kwargs: next(looks))
    row, report = run_one()
    assert report["peaks"] == {"read": 3e9, "copy": 2e9, "matmul": {"float32": 5e6}}
    assert row["bound"] == {"by": "compute", "seconds": row["flops"] / 5e6}
    ours = by_name(row)["native"]
    assert ours["share_of_bound"] == row["bound"]["seconds"] / ours["median"]


def test_ops_take_turns_where_time_may_end(small):
    chosen = [Selection("attention"), Selection("quantize")]
    ended = replace(QUICK, quick=True, total_seconds=0.0)
    left = runner.run(chosen, ended)["left_out"]
    assert [name.split()[0] for name in left[:4]] == ["attention", "quantize"] * 2
