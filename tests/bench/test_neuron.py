"""The measurement on Neuron hosts, against a host of files and a monitor that is a script."""

import json
from pathlib import Path

import pytest

from genai_perf import BackendUnsupported
from genai_perf.bench import neuron, results, runner
from genai_perf.bench.clocks import CpuTimer

from .small import shrink

SAMPLES = Path(__file__).parent.parent / "neuron" / "samples"


@pytest.fixture
def root(tmp_path):
    memory = "sys/devices/virtual/neuron_device/neuron0/neuron_core1/stats/memory_usage/device_mem"
    folder = tmp_path / memory
    folder.mkdir(parents=True)
    (folder / "total").write_text("100")
    (folder / "peak").write_text("900")
    return tmp_path


def monitor(tmp_path) -> str:
    """Prints the sample, then a line cut in half, and waits to be ended."""
    path = tmp_path / "monitor"
    sample = SAMPLES / "neuron-monitor.json"
    path.write_text(f"#!/bin/sh\ncat {sample}\nhead -c 100 {sample}\nexec sleep 5\n")
    path.chmod(0o755)
    return str(path)


def test_measure(root, tmp_path):
    import time

    peak = next(root.rglob("peak"))
    waited = []

    def work():
        peak.write_text("700")
        time.sleep(0.1)

    got = neuron.measure(work, rounds=3, synchronize=lambda: waited.append(1), root=root,
                         monitor=monitor(tmp_path),
                         profile=SAMPLES / "profile-summary.json")  # fmt: skip
    assert len(got["seconds"]) == 3 and len(waited) == 4 and got["median_seconds"] >= 0.1
    assert got["peak_device_bytes"] == 700  # what the warm-up reached is forgotten
    assert got["memory"] == {"neuron0/core1": {"total": 100, "peak": 700}}
    assert got["utilization"]["utilization"] == {"0": 81.5, "1": 79.0}
    assert got["profile"]["mfu_estimated_percent"] == 61.2
    json.dumps(got)


def test_a_host_that_offers_nothing(tmp_path):
    got = neuron.measure(lambda: None, rounds=1, root=tmp_path, monitor="no-such-command")
    assert got["peak_device_bytes"] is None and got["utilization"] is None
    assert got["topology"]["devices"] == ()


@pytest.fixture
def on_neuron(root, monkeypatch):
    """The runner on a host of files, whose device is the processor: a stand-in, not Neuron."""
    peak = next(root.rglob("peak"))
    real = neuron.measure

    def measured(call, *, synchronize):
        def work():
            call()
            peak.write_text("4096000")

        return real(work, synchronize=synchronize, root=root, monitor=None)

    monkeypatch.setattr(neuron, "measure", measured)
    monkeypatch.setattr(runner, "torch_device", lambda device: "cpu")
    monkeypatch.setattr(runner, "timer_for", lambda device, name: CpuTimer())
    peaks = runner.Peaks(2e10, 2e10, {"float32": 1e11})
    monkeypatch.setattr(runner, "measure_peaks", lambda *args, **options: peaks)
    return shrink(monkeypatch, "quantize")


def test_the_runner_puts_it_into_the_report(on_neuron, tmp_path):
    settings = runner.Settings(device="neuron", cache="hot", budget_seconds=1, warmup_seconds=0)
    selection = runner.Selection("quantize", tuple(on_neuron)[:1])
    report = runner.run([selection], settings)
    (row,) = report["rows"]
    assert row["device"] == report["provenance"]["device"] == "neuron"
    assert report["provenance"]["neuron"]["devices"] is not None
    for variant in row["variants"]:
        assert variant["neuron"]["peak_device_bytes"] == 4096000
        assert variant["memory"]["over_floor"] == 4096000 / row["floor_bytes"]
        assert len(variant["neuron"]["seconds"]) == 10
    results.write(tmp_path / "r.json", report)
    assert results.load(tmp_path / "r.json") == json.loads(json.dumps(report))
    row["variants"][0]["neuron"]["seconds"] = "0.1"
    with pytest.raises(ValueError, match=r"rows\[0\].neuron.seconds must be list"):
        results.validate(report)


def test_a_host_without_the_packages_is_told(tmp_path):
    with pytest.raises(BackendUnsupported, match="no Neuron device: torch_xla and torch_neuronx"):
        runner.run([runner.Selection("quantize")], runner.Settings(device="neuron"))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        neuron.measure(lambda: None, rounds=0)
    assert neuron.last_usage("oops\n") is None
