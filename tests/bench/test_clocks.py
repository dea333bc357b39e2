"""Timers, the CUDA and Neuron ones with stand-ins for their devices."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from genai_perf import BackendUnsupported
from genai_perf.bench import clocks


class FakeCuda:
    """Calls are queued and take 2 ms each on a device clock; events read that clock."""

    def __init__(self):
        self.device_ms, self.log = 0.0, []
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = outer.device_ms

            def synchronize(self):
                outer.log.append("event wait")

            def elapsed_time(self, other):
                return other.at - self.at

        class Graph:
            def __init__(self):
                self.calls = 0

            def replay(self):
                outer.device_ms += 2.0 * self.calls

        self.Event, self.CUDAGraph = Event, Graph

    def work(self):
        self.device_ms += 2.0

    def _sleep(self, cycles):
        self.device_ms += 7.0

    def synchronize(self):
        self.log.append("device wait")

    def Stream(self):  # noqa: N802
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph):
        before = self.device_ms
        yield
        graph.calls, self.device_ms = (self.device_ms - before) / 2.0, before


@pytest.mark.parametrize("kind", [clocks.CudaEventTimer, clocks.CudaGraphTimer])
def test_cuda_times_are_those_of_the_device_without_the_head_start(kind):
    cuda = FakeCuda()
    timer = kind(cuda)
    handle = timer.sample(timer.prepare(cuda.work, 5))
    assert "event wait" not in cuda.log  # nothing waits inside of a round
    assert timer.seconds(handle) == pytest.approx(2e-3)


def test_neuron_waits_for_the_device_on_both_sides():
    log = []
    xla = SimpleNamespace(sync=lambda wait=False: log.append("wait" if wait else "step"))
    timer = clocks.NeuronTimer(xla)
    timer.seconds(timer.sample(timer.prepare(lambda: log.append("call"), 2)))
    assert log == ["wait", "call", "step", "call", "step", "wait"]


def test_no_device_is_said_in_a_sentence():
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnsupported, match="timer cuda-events: no GPU"):
            clocks.timer_for("cuda")
    if clocks.why_not("neuron"):
        with pytest.raises(BackendUnsupported, match="no Neuron device: torch_xla"):
            clocks.timer_for("neuron")
    with pytest.raises(ValueError, match="name must be one of 'cpu'.*got 'sundial'"):
        clocks.why_not("sundial")
