"""Result files: old ones load, broken ones are named; two files compared."""

import copy
import json
from pathlib import Path

import pytest

from genai_perf.bench import results
from genai_perf.bench.compare_files import compare_files

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def variant(name, own, seconds, status="ok"):
    timed = status == "ok"
    return {"name": name, "own": own, "status": status, "reason": None if timed else "because",
            "error": 1e-7, "allowed": 2e-7, "numerics": None, "seconds": seconds if timed else [],
            "median": seconds[0] if timed else None, "share_of_bound": 0.5 if timed else None,
            "memory": {"over_floor": 1.5}}  # fmt: skip


def bench_report(ours=1.0, theirs=2.0, floor=0.004, status="ok", rounds=40):
    spread = [1 + 0.004 * ((i * 7) % 11 - 5) / 5 for i in range(rounds)]
    row = {
        "op": "attention", "case": "c", "phase": "forward", "dtype": "float32", "device": "cpu",
        "cache": "cold", "flops": 10**9, "floor_bytes": 10**7, "seed": 1,
        "bound": {"by": "compute", "seconds": 0.5},
        "noise": {"of": "native", "ratio": 1.0, "low": 1.0, "high": 1.004, "floor": floor},
        "clocks": {"looks": 1, "mhz": None, "throttled_looks": 0, "reasons": []},
        "variants": [variant("native", True, [ours * s for s in spread], status),
                     variant("torch-sdpa", False, [theirs * s for s in spread[::-1]])],
        "comparisons": [],
    }  # fmt: skip
    machine = {"cpu": "AMD EPYC", "cores_usable": 2, "torch_threads": 2, "gpus": []}
    return {
        "schema_version": results.VERSION, "kind": "bench", "created": "2026-11-21T08:00:00+00:00",
        "seconds": 3.0, "settings": {}, "peaks": {"read": 2e10, "copy": 2e10,
                                                  "matmul": {"float32": 1e11}},
        "provenance": {"commit": "83d2a5a" + "0" * 33 + "+", "versions": {"torch": "2.13"},
                       "device": "cpu", "machine": machine},
        "rows": [row], "models": [], "training": [],
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda p: p.name)
def test_old_files_keep_loading(path):
    assert results.load(path)["kind"] in ("demo", "bench")


def test_there_are_old_files():
    assert list(RESULTS.glob("*-demo.json"))


def test_file_name():
    report = bench_report()
    name = results.file_name(report["created"], report["provenance"])
    assert name == "2026-11-21-amd-epyc-2core-83d2a5a+.json"
    assert results.samples_path(Path("r") / name).name == name[:-5] + ".samples.jsonl"


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "r.json"
    results.write(path, bench_report())
    whole = path.read_text()
    newer = json.loads(whole) | {"schema_version": 99}
    for text, words in {
        whole[: len(whole) // 2]: "wrong or cut off at line",
        json.dumps(newer): "schema_version must be 1, got 99",
        json.dumps({"kind": "poem"}): "kind must be 'bench' or 'demo', got 'poem'",
        "[1, 2]": "kind must be",
        whole.replace('"status": "ok"', '"status": "fine"', 1): "status must be one of ok",
        whole.replace(
            '"floor_bytes": 10000000', '"floor_bytes": "many"'
        ): "floor_bytes must be int",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"r.json: .*({words})"):
            results.load(path)


def test_a_failed_variant_must_not_have_a_time():
    report = bench_report()
    report["rows"][0]["variants"][0]["status"] = "failed"
    with pytest.raises(ValueError, match="native is failed and must have no time"):
        results.validate(report)


def verdict(before, after):
    (change,) = compare_files(before, after)
    return change.verdict


def test_compare():
    assert verdict(bench_report(), bench_report()) == "same"
    assert verdict(bench_report(), bench_report(ours=1.1)) == "slower"
    assert verdict(bench_report(), bench_report(ours=0.9)) == "faster"
    assert verdict(bench_report(), bench_report(ours=1.1, floor=0.2)) == "undecided"
    assert verdict(bench_report(), bench_report(ours=1.1, rounds=20)) == "undecided"
    assert verdict(bench_report(), bench_report(status="failed")) == "slower"
    assert verdict(bench_report(status="error"), bench_report()) == "undecided"


def test_a_machine_that_is_slower_as_a_whole_does_not_count():
    assert verdict(bench_report(), bench_report(ours=1.3, theirs=2.6)) == "same"


def test_files_without_a_common_case():
    other = copy.deepcopy(bench_report())
    other["rows"][0]["case"] = "d"
    with pytest.raises(ValueError, match="no case in common"):
        compare_files(bench_report(), other)
