"""benchmarks/gpu.py without a GPU: its gate, and how it goes on where it was ended."""

import importlib.util
from pathlib import Path

import pytest
import torch

from genai_perf.bench import results

from .small import shrink
from .test_results import bench_report

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_command", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for op in module.SUITES:
        shrink(monkeypatch, op)
    return module


def test_no_gpu_is_said_in_a_sentence(gpu, tmp_path, capsys):
    if not torch.cuda.is_available():
        assert gpu.main([str(tmp_path)]) == 2
        assert "no GPU" in capsys.readouterr().err


def test_it_goes_on_with_the_ops_that_are_not_whole(gpu, tmp_path, monkeypatch):
    measured = []

    def measure(op, variants, path, seconds, device):
        measured.append(op)
        assert "native" in variants and "reference" not in variants
        assert ("native:int8-x" in variants) == (op == "quant_matmul")
        report = bench_report() | {"left_out": ["a case"] if op == "quantize" else []}
        report["provenance"]["commit"] = gpu.commit()
        results.write(path, report)
        return 0

    monkeypatch.setattr(gpu, "measure", measure)
    assert gpu.main([str(tmp_path)], device="cpu") == 0
    assert measured == list(gpu.SUITES)
    assert (tmp_path / "report.html").exists()
    measured.clear()
    gpu.main([str(tmp_path)], device="cpu")
    assert measured == ["quantize"]


def test_a_red_gate_stops_everything(gpu, tmp_path, monkeypatch, capsys):
    from genai_perf.bench.problem import Check
    from genai_perf.bench.suites import quantize

    monkeypatch.setattr(quantize, "check", lambda *args: Check(1.0, 0.5))
    monkeypatch.setattr(gpu, "measure", lambda *args: pytest.fail("timed on a red gate"))
    assert gpu.main([str(tmp_path)], device="cpu") == 1
    assert "quantize nf4-4096-float32 quantize native: error 1" in capsys.readouterr().err
