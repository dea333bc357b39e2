"""genaiperf bench from the command line."""

import json

import pytest
from typer.testing import CliRunner

from genai_perf.bench import results, runner
from genai_perf.cli import app
from tests.bench.small import shrink
from tests.bench.test_results import bench_report


def run(*words):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *map(str, words)])


@pytest.fixture
def small(monkeypatch):
    peaks = runner.Peaks(2e10, 2e10, {"float32": 1e11})
    monkeypatch.setattr(runner, "measure_peaks", lambda *args, **kwargs: peaks)
    return {op: shrink(monkeypatch, op) for op in ("attention", "quantize", "quant_matmul")}


def test_list_names_ops_cases_and_why_peers_are_missing():
    found = run("list").output
    assert "attention" in found and "quant_matmul" in found and "torch-sdpa" in found
    one = run("list", "attention").output
    assert "case float32_s512_d64_causal, headline" in one


def test_run_and_compare(small, tmp_path):
    first = tmp_path / "first.json"
    done = run(
        "run",
        "attention",
        "--case",
        "float32_s512*",
        "--hot",
        "--budget",
        "1",
        "--no-memory",
        "--against",
        "torch-sdpa,torch-sdpa:math",
        "--out",
        first,
    )
    assert done.exit_code == 0, done.output
    assert "torch-sdpa:math" in done.output and "native" in done.output
    assert results.samples_path(first).exists()
    assert run("compare", first, first).exit_code in (0, 2)


def test_compare_fails_on_a_regression(tmp_path):
    for name, ours in (("a", 1.0), ("b", 1.2)):
        (tmp_path / f"{name}.json").write_text(json.dumps(bench_report(ours)))
    slower = run("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert slower.exit_code == 1 and "1.200 [" in slower.output
    assert run("compare", tmp_path / "b.json", tmp_path / "a.json").exit_code == 0


def test_a_wrong_kernel_ends_in_exit_code_1(small, tmp_path, monkeypatch):
    from genai_perf.bench.suites import attention

    monkeypatch.setattr(attention, "check", lambda *args: runner.Check(1.0, 0.5))
    done = run("run", "attention", "--case", "float32_s512_d64_causal", "--hot", "--no-memory",
               "--out", tmp_path / "x.json")  # fmt: skip
    assert done.exit_code == 1 and "failed" in done.output


@pytest.mark.parametrize(
    "words, said",
    [
        (("run", "atention"), "did you mean attention"),
        (("run", "attention", "--against", "torch-spda"), "did you mean torch-sdpa"),
        (("run", "attention", "--device", "neuron"), "no Neuron device"),
        (("run", "model"), "--model must name a checkpoint folder"),
        (("compare", "no.json", "no.json"), "No such file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, said):
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.output and "Traceback" not in done.output
