"""How one sample is taken on each kind of device: the processor's clock, CUDA events, CUDA graphs,
Neuron. Each says in one sentence why it cannot run here.

A timer prepares a call, takes a sample (which may still be running on the device), and turns it
into seconds per call once the round is over.

Not run on a GPU or on Neuron so far: the CUDA and Neuron timers are tested with stand-ins.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

from .._checks import check_choice
from .._errors import BackendUnsupported

TIMERS = ("cpu", "cuda-events", "cuda-graph", "neuron")
# Before a sample, the GPU is kept busy this long so that the calls are queued when it begins, and
# no gap between launches is counted.
_HEAD_START_CYCLES = 200_000


@dataclass(frozen=True)
class Prepared:
    """What a sample calls, and how many times."""

    call: Callable[[], object]
    calls: int
    graph: object | None = None


class Timer(Protocol):
    name: str

    def now(self) -> float: ...
    def synchronize(self) -> None: ...
    def prepare(self, call: Callable[[], object], calls: int) -> Prepared: ...
    def sample(self, prepared: Prepared) -> object: ...
    def seconds(self, handle: object) -> float: ...


class _HostTimer:
    """What timers share that take the host's time and call as they are told."""

    def now(self) -> float:
        return time.perf_counter()

    def prepare(self, call: Callable[[], object], calls: int) -> Prepared:
        return Prepared(call, calls)


class CpuTimer(_HostTimer):
    """time.perf_counter around the calls."""

    name = "cpu"

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock

    def now(self) -> float:
        return self._clock()

    def synchronize(self) -> None:
        """A call on the processor is over when it returns."""

    def sample(self, prepared: Prepared) -> float:
        call, clock = prepared.call, self._clock
        repeats = range(prepared.calls)
        before = clock()
        for _ in repeats:
            call()
        return (clock() - before) / prepared.calls

    def seconds(self, handle: float) -> float:
        return handle


class CudaEventTimer(_HostTimer):
    """A pair of CUDA events around the calls, on the current stream; read after the round."""

    name = "cuda-events"

    def __init__(self, cuda: ModuleType | None = None):
        self._cuda = cuda or importlib.import_module("torch.cuda")

    def synchronize(self) -> None:
        self._cuda.synchronize()

    def sample(self, prepared: Prepared) -> tuple:
        self._cuda._sleep(_HEAD_START_CYCLES)
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        if prepared.graph is not None:
            prepared.graph.replay()
        else:
            for _ in range(prepared.calls):
                prepared.call()
        end.record()
        return start, end, prepared.calls

    def seconds(self, handle: tuple) -> float:
        start, end, calls = handle
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls


class CudaGraphTimer(CudaEventTimer):
    """The calls recorded once into a CUDA graph; a sample replays it between two events."""

    name = "cuda-graph"

    def prepare(self, call: Callable[[], object], calls: int) -> Prepared:
        stream = self._cuda.Stream()
        stream.wait_stream(self._cuda.current_stream())
        with self._cuda.stream(stream):
            call()  # what is set up on the first call cannot be recorded
        self._cuda.current_stream().wait_stream(stream)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for _ in range(calls):
                call()
        return Prepared(call, calls, graph)


class NeuronTimer(_HostTimer):
    """The host's clock around calls that torch_xla runs and waits for."""

    name = "neuron"

    def __init__(self, xla: ModuleType | None = None):
        self._xla = xla or importlib.import_module("torch_xla")

    def synchronize(self) -> None:
        self._xla.sync(wait=True)

    def sample(self, prepared: Prepared) -> float:
        self.synchronize()
        before = time.perf_counter()
        for _ in range(prepared.calls):
            prepared.call()
            self._xla.sync()
        self.synchronize()
        return (time.perf_counter() - before) / prepared.calls

    def seconds(self, handle: float) -> float:
        return handle


def torch_device(device: str) -> str:
    """What torch calls a device: Neuron's is "xla" where torch_xla drives it."""
    return "xla" if device == "neuron" else device


def why_not(name: str) -> str | None:
    """Why a timer cannot run here, in one sentence, or None."""
    check_choice("timer", "name", name, TIMERS)
    if name == "cpu":
        return None
    if name == "neuron":
        missing = [module for module in ("torch_xla", "torch_neuronx") if find_spec(module) is None]
        return f"no Neuron device: {' and '.join(missing)} not installed" if missing else None
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU: this torch is built for the CPU alone"
    return None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


def timer_for(device: str, name: str | None = None) -> Timer:
    """The timer of a device, or the one named.

    Args:
        device: "cpu", "cuda" or "neuron".
        name: of TIMERS; None: the device's own, for cuda its events.

    Raises:
        ValueError: unknown name or device.
        BackendUnsupported: it cannot run here; says why.
    """
    check_choice("timer", "device", device, ("cpu", "cuda", "neuron"))
    chosen = name or {"cuda": "cuda-events"}.get(device, device)
    if (reason := why_not(chosen)) is not None:
        raise BackendUnsupported(f"timer {chosen}: {reason}")
    kinds = {"cpu": CpuTimer, "cuda-events": CudaEventTimer, "cuda-graph": CudaGraphTimer,
             "neuron": NeuronTimer}  # fmt: skip
    return kinds[chosen]()
