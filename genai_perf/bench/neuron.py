"""Measuring on a Neuron host: time, peak of device memory, utilisation; as JSON values.

Time comes from the host's clock around work that is waited for, memory from sysfs, utilisation from
neuron-monitor where it can be started. What a host does not offer is None in the result.
`genaiperf bench run OP --device neuron` puts this into the rows of its report (`runner`).
"""

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from .._checks import fail
from ..neuron import host, metrics

_CONFIG = (
    '{"period":"1s","neuron_runtimes":[{"tag_filter":".*","metrics":['
    '{"type":"neuroncore_counters"},{"type":"memory_used"},{"type":"execution_stats"}]}],'
    '"system_metrics":[]}'
)


def measure(
    call: Callable[[], object],
    *,
    rounds: int = 10,
    synchronize: Callable[[], object] | None = None,
    profile: Path | str | None = None,
    monitor: str | None = "neuron-monitor",
    root: Path | str = "/",
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Run `call` once to warm up and `rounds` times measured.

    Args:
        call: the work; it is waited for with `synchronize` (torch.neuron.synchronize there).
        profile: a summary-json of the profiler to take up into the result.
        monitor: the command of neuron-monitor; None or a command that is not there: left out.
        root: where /dev and /sys are, for tests.

    Returns:
        seconds (every round), median_seconds, memory ({"neuron0/core0": {"total", "peak"}}),
        peak_device_bytes (largest core; None where sysfs says nothing), utilization (the monitor's
        last whole line, None without), profile (fields that were there, None without), topology.

    Raises:
        ValueError: rounds below 1, or a profile that is no summary.
    """
    if rounds < 1:
        fail("measure", "rounds", "at least 1", rounds)
    summary = None if profile is None else metrics.parse_profile(Path(profile).read_text())
    wait = synchronize or (lambda: None)
    call()
    wait()
    metrics.reset_peaks(root)
    process = _start(monitor)
    try:
        seconds = []
        for _ in range(rounds):
            start = clock()
            call()
            wait()
            seconds.append(clock() - start)
    finally:
        text = _stop(process)
    memory = metrics.device_memory(root)
    return {
        "seconds": seconds,
        "median_seconds": median(seconds),
        "memory": memory,
        "peak_device_bytes": max((m["peak"] for m in memory.values()), default=None),
        "utilization": last_usage(text),
        "profile": summary,
        "topology": host.topology(root).to_dict(),
    }


def variant_memory(found: dict, floor_bytes: int) -> dict:
    """What a report's row says of a variant's memory on Neuron, from what `measure` gave: the peak
    of the largest core, not of a fresh process, because a core belongs to one process."""
    peak = found["peak_device_bytes"]
    if peak is None:
        return {"reason": "sysfs offers no peak of device memory here"}
    return {"peak_device_bytes": peak, "over_floor": peak / floor_bytes}


def last_usage(text: str) -> dict | None:
    """The last line of neuron-monitor that is whole, as a dict; None without one."""
    for line in reversed(text.splitlines()):
        try:
            return metrics.parse_monitor(line).to_dict()
        except ValueError:
            continue
    return None


def _start(monitor: str | None) -> subprocess.Popen | None:
    path = None if monitor is None else shutil.which(monitor)
    if path is None:
        return None
    process = subprocess.Popen([path, "-c", "/dev/stdin"], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)  # fmt: skip
    process.stdin.write(_CONFIG)
    process.stdin.close()
    process.stdin = None
    return process


def _stop(process: subprocess.Popen | None) -> str:
    if process is None:
        return ""
    process.terminate()
    return process.communicate(timeout=10)[0]
