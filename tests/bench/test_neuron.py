"""The measurement on Neuron hosts, against a host of files and a monitor that is a script."""

import json
from pathlib import Path

import pytest

from genai_perf.bench import neuron

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


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        neuron.measure(lambda: None, rounds=0)
    assert neuron.last_usage("oops\n") is None
