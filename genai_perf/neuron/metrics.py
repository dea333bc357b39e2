"""What a Neuron host reports while something runs: sysfs, neuron-monitor, the profiler's summary.

Field names change between SDKs, so every lookup may miss: a miss is None, never a guess.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_SYSFS = "sys/devices/virtual/neuron_device"
_SUMMARY = (
    "total_time", "total_active_time_percent", "mfu_estimated_percent",
    "mfu_max_achievable_estimated_percent", "hfu_estimated_percent", "mbu_estimated_percent",
    "model_flops", "hardware_flops", "transpose_flops", "hbm_read_bytes", "hbm_write_bytes",
    "spill_save_bytes", "spill_reload_bytes", "dma_active_time_percent",
    "tensor_engine_active_time_percent", "vector_engine_active_time_percent",
    "scalar_engine_active_time_percent", "gpsimd_engine_active_time_percent",
)  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """One period of neuron-monitor.

    utilization: percent by core; device_bytes and host_bytes of the runtimes; latency_p50 and p99
    seconds of a device's work; failed: executions that ended with an error.
    """

    utilization: dict[str, float]
    device_bytes: int | None
    host_bytes: int | None
    latency_p50: float | None
    latency_p99: float | None
    completed: int
    failed: int
    errors: tuple[str, ...]

    def to_dict(self) -> dict:
        return asdict(self)


def _at(value: object, *path: str) -> object:
    """The value at the end of a path of keys, None where one is missing."""
    for name in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def parse_monitor(text: str) -> Usage:
    """One line of neuron-monitor.

    Raises:
        ValueError: no JSON object, such as a line cut in half.
    """
    try:
        report = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"neuron-monitor: not a line of JSON: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"neuron-monitor: an object expected, got {type(report).__name__}")
    runtimes = report.get("neuron_runtime_data")
    runtimes = [r for r in runtimes if isinstance(r, dict)] if isinstance(runtimes, list) else []
    cores, memory, latency, done, errors = {}, [], [], [0, 0], []
    for runtime in runtimes:
        inside = runtime.get("report")
        counters = _at(inside, "neuroncore_counters", "neuroncores_in_use")
        for core, values in counters.items() if isinstance(counters, dict) else ():
            if (percent := _number(_at(values, "neuroncore_utilization"))) is not None:
                cores[core] = percent
        memory.append(_at(inside, "memory_used", "neuron_runtime_used_bytes"))
        latency.append(_at(inside, "execution_stats", "latency_stats", "device_latency"))
        summary = _at(inside, "execution_stats", "execution_summary")
        done[0] += int(_number(_at(summary, "completed")) or 0)
        for name in ("completed_with_err", "timed_out", "incorrect_input", "failed_to_queue"):
            done[1] += int(_number(_at(summary, name)) or 0)
        said = [runtime.get("error")]
        said += [_at(group, "error") for group in (inside or {}).values()]
        errors += [e for e in said if isinstance(e, str) and e]

    def total(name: str) -> int | None:
        values = [v for m in memory if (v := _number(_at(m, name))) is not None]
        return int(sum(values)) if values else None

    def slowest(name: str) -> float | None:
        values = [v for x in latency if (v := _number(_at(x, name))) is not None]
        return max(values) if values else None

    return Usage(cores, total("neuron_device"), total("host"), slowest("p50"), slowest("p99"),
                 done[0], done[1], tuple(errors))  # fmt: skip


def parse_profile(text: str) -> dict[str, float]:
    """The fields of the profiler's summary-json that mean something here, those that are there.

    It may be one object, a list of them, or objects by the name of a NEFF; the first is taken.

    Raises:
        ValueError: no JSON, or none of the known fields.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"profile summary: not JSON: {error}") from error
    for candidate in _objects(found):
        fields = {n: v for n in _SUMMARY if (v := _number(candidate.get(n))) is not None}
        if fields:
            return fields
    raise ValueError("profile summary: none of the known fields, such as total_time, is in it")


def _objects(value: object):
    if isinstance(value, Mapping):
        yield value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _objects(inner)


def device_memory(root: Path | str = "/") -> dict[str, dict[str, int]]:
    """{"neuron0/core0": {"total": bytes, "peak": bytes}} of device memory, from sysfs."""
    found = {}
    pattern = "neuron*/neuron_core*/stats/memory_usage/device_mem"
    for folder in sorted(Path(root, _SYSFS).glob(pattern)):
        device, core = folder.parts[-5], folder.parts[-4].removeprefix("neuron_")
        numbers = {name: _count(folder / name) for name in ("total", "peak")}
        if None not in numbers.values():
            found[f"{device}/{core}"] = numbers
    return found


def reset_peaks(root: Path | str = "/") -> int:
    """Set every core's peak of device memory back; how many cores let it be done."""
    done = 0
    pattern = "neuron*/neuron_core*/stats/memory_usage/device_mem/peak"
    for path in Path(root, _SYSFS).glob(pattern):
        try:
            path.write_text("0")
            done += 1
        except OSError:
            continue
    return done


def _count(path: Path) -> int | None:
    try:
        match = re.match(r"\d+", path.read_text())
    except OSError:
        return None
    return int(match.group()) if match else None
