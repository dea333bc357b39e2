"""The state of the device while it was measured: clock, temperature, throttling, round by round.

A round in which the clock was throttled is marked, never dropped. NVML is called through ctypes;
that part has not run on a GPU so far and is tested with a stand-in.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .._checks import fail

# A clock below this share of the highest one seen counts as throttled.
THROTTLED = 0.75
# Reading clocks disturbs caches, so it is not done in every round.
_EVERY_SECONDS = 0.25
# nvmlClocksThrottleReasons: SwPowerCap, HwSlowdown, SwThermal, HwThermal, HwPowerBrake.
_REASONS = {0x4: "power cap", 0x8: "hardware slow-down", 0x20: "heat (software)",
            0x40: "heat (hardware)", 0x80: "power brake"}  # fmt: skip


@dataclass(frozen=True)
class State:
    seconds: float
    mhz: float | None
    celsius: float | None = None
    reasons: tuple[str, ...] = ()


def cpu_mhz(root: Path = Path("/sys/devices/system/cpu"),
            cpuinfo: Path = Path("/proc/cpuinfo")) -> float | None:  # fmt: skip
    """The highest clock of the cores now; None where the system does not say."""
    found = [int(p.read_text()) / 1e3 for p in root.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if not found and cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        found = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return max(found, default=None)


class Nvml:
    """The few calls of NVML that a trace needs."""

    def __init__(self, library=None, index: int = 0):
        self._library = library or ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self._handle))

    def _call(self, name: str, *arguments) -> None:
        if (code := getattr(self._library, name)(*arguments)) != 0:
            raise OSError(f"{name} gave error {code}")

    def _number(self, name: str, *arguments, kind=ctypes.c_uint) -> int:
        value = kind()
        self._call(name, self._handle, *arguments, ctypes.byref(value))
        return value.value

    def state(self, seconds: float) -> State:
        mask = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", kind=ctypes.c_ulonglong)
        return State(
            seconds,
            float(self._number("nvmlDeviceGetClockInfo", 1)),  # 1: the multiprocessors' clock
            float(self._number("nvmlDeviceGetTemperature", 0)),
            tuple(name for bit, name in _REASONS.items() if mask & bit),
        )

    def about(self) -> dict:
        """Driver, power limit in watts, ECC, highest clock; None where NVML does not tell."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, 96)
        ask = {
            "power_limit_mw": ("nvmlDeviceGetPowerManagementLimit",),
            "max_mhz": ("nvmlDeviceGetMaxClockInfo", 1),
        }
        found = {"driver": text.value.decode()}
        for name, call in ask.items():
            try:
                found[name] = self._number(*call)
            except OSError:
                found[name] = None
        return found


class Trace:
    """States over time, at most four a second.

    Args:
        device: "cpu", "cuda" or "neuron" (which tells nothing: the states hold no clock).
        probe: seconds -> State; None: the device's own.
    """

    def __init__(self, device: str = "cpu", *, probe: Callable[[float], State] | None = None,
                 clock: Callable[[], float] = time.perf_counter):  # fmt: skip
        self._clock, self._start, self._last = clock, clock(), -1.0
        self._probe = probe or _probe(device)
        self.states: list[State] = []

    def look(self) -> State:
        """The state now, or the last one if that is recent."""
        now = self._clock() - self._start
        if not self.states or now - self._last >= _EVERY_SECONDS:
            self._last = now
            self.states.append(self._probe(now))
        return self.states[-1]

    def throttled(self, state: State) -> bool:
        highest = max((s.mhz for s in self.states if s.mhz), default=None)
        slow = bool(highest and state.mhz and state.mhz < THROTTLED * highest)
        return slow or bool(state.reasons)

    def summary(self) -> dict:
        clocks = [s.mhz for s in self.states if s.mhz is not None]
        reasons = sorted({reason for s in self.states for reason in s.reasons})
        heat = [s.celsius for s in self.states if s.celsius is not None]
        return {
            "looks": len(self.states),
            "mhz": [min(clocks), max(clocks)] if clocks else None,
            "celsius": [min(heat), max(heat)] if heat else None,
            "throttled_looks": sum(self.throttled(s) for s in self.states),
            "reasons": reasons,
        }


def _probe(device: str) -> Callable[[float], State]:
    if device == "cuda":
        try:
            return Nvml().state
        except OSError:
            pass  # no NVML on this host: the trace then holds no clock, which the file shows
    if device == "cpu":
        return lambda seconds: State(seconds, cpu_mhz())
    return lambda seconds: State(seconds, None)


@contextmanager
def pinned(threads: int | None, *, pin: bool) -> Iterator[list[int] | None]:
    """Threads of torch and the kernels set for a while and, if asked, this process kept on as many
    cores; gives the cores, or None where it is not pinned.

    Raises:
        ValueError: more threads than cores to pin them to.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    if not (pin and hasattr(os, "sched_setaffinity")):
        try:
            yield None
        finally:
            torch.set_num_threads(before)
        return
    allowed = os.sched_getaffinity(0)
    chosen = sorted(allowed)[: torch.get_num_threads()]
    try:
        if len(chosen) < torch.get_num_threads():
            fail("pin", "threads", f"at most the {len(allowed)} cores", torch.get_num_threads())
        os.sched_setaffinity(0, chosen)
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)
