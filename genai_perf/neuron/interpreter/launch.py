"""Running a kernel: `jit`, the one or two cores of a launch, arguments in and results out."""

import functools
import threading
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass

import numpy as np

from . import dtypes
from .errors import KernelError, refuse
from .machine import Machine, use
from .memory import HBM, SHARED_HBM, Storage
from .report import Report, report
from .targets import TARGETS, Target
from .tensor import Tensor

_target: ContextVar[str] = ContextVar("genai_perf_nki_target", default="gen3")
_CORES = (1, 2)
_MISSED = "core_barrier or sendrecv: the other core has ended without arriving"


@dataclass(frozen=True)
class Run:
    """What a launch gave: arrays, and the report of each core."""

    outputs: tuple[np.ndarray, ...] | np.ndarray | None
    reports: tuple[Report, ...]

    @property
    def report(self) -> Report:
        """Of the core that took longest."""
        return max(self.reports, key=lambda r: r.seconds)


@contextmanager
def target(name: str):
    """`with target("gen4"):` kernels run for that generation (gen3 without)."""
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    token = _target.set(name)
    try:
        yield TARGETS[name]
    finally:
        _target.reset(token)


def current_target() -> Target:
    return TARGETS[_target.get()]


class Kernel:
    """A function marked by `nki.jit`: called with arrays it runs, `kernel[2]` on two cores."""

    def __init__(self, function: Callable, cores: int = 1):
        functools.update_wrapper(self, function)
        self.function, self.cores = function, cores

    def __getitem__(self, cores) -> "Kernel":
        cores = cores[0] if isinstance(cores, tuple) and len(cores) == 1 else cores
        if cores not in _CORES:
            raise KernelError(f"a launch is on 1 or 2 cores, got {cores!r}")
        return Kernel(self.function, cores)

    def __call__(self, *args, **kwargs):
        if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return self.function(*args, **kwargs)  # called by another kernel
        return self.run(*args, **kwargs).outputs

    def run(self, *args, **kwargs) -> Run:
        """The outputs, and what they cost."""
        return _launch(self, args, kwargs, dry=False)

    def estimate(self, *args, **kwargs) -> Report:
        """What it would cost: checked and counted, nothing computed, outputs left out."""
        return _launch(self, args, kwargs, dry=True).report


def jit(function=None, **options):
    """Marks a kernel's entry; options of the official decorator are accepted and mean nothing."""
    if function is None:
        return lambda f: Kernel(f)
    return Kernel(function)


def simulate(kernel) -> Kernel:
    """nki.simulate(kernel)(arrays): here the same as calling it."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


def _to_tensor(x):
    """NumPy arrays become tensors in HBM; everything else is a constant of the kernel."""
    if not isinstance(x, np.ndarray):
        return x
    if x.size == 0 or x.ndim == 0:
        raise KernelError(f"a kernel takes no empty and no 0-dimensional tensor, got {x.shape}")
    array = np.ascontiguousarray(x)
    array = array.view(np.uint8) if array.dtype == np.bool_ else array
    return Tensor.whole(Storage(array.shape, dtypes.of(array), HBM, "input", array=array))


def _launch(kernel: Kernel, args, kwargs, *, dry: bool) -> Run:
    import torch

    args = [_to_tensor(a) for a in args]
    kwargs = {name: _to_tensor(a) for name, a in kwargs.items()}
    shared: list[Storage] = []
    machines, threads = [], torch.get_num_threads()
    turns = _Turns() if kernel.cores == 2 else None
    for core in range(kernel.cores):
        barrier = None if turns is None else functools.partial(turns.barrier, core)
        machine = Machine(
            current_target(),
            dry=dry,
            program_id=core,
            num_programs=kernel.cores,
            shared=shared,
            barrier=barrier,
        )
        machines.append(machine)
    if turns is not None:
        machines[0].other, machines[1].other = machines[1], machines[0]
    torch.set_num_threads(1)  # small products, which threads only slow down
    try:
        with np.errstate(all="ignore"):
            if turns is None:
                results = [_run(kernel, machines[0], args, kwargs)]
            else:
                results = turns.run([functools.partial(_run, kernel, m, args, kwargs)
                                     for m in machines])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    outputs = None if dry else _outputs(kernel, results[0])
    return Run(outputs, tuple(report(m) for m in machines))


def _run(kernel: Kernel, machine: Machine, args, kwargs):
    with use(machine), np.errstate(all="ignore"):
        return kernel.function(*args, **kwargs)


def _outputs(kernel: Kernel, result):
    if result is None:
        return None
    single = isinstance(result, Tensor)
    arrays = []
    for i, x in enumerate((result,) if single else result):
        given = isinstance(x, Tensor) and x.name == "input"  # written in place
        if not given and not (isinstance(x, Tensor) and x.buffer is SHARED_HBM):
            raise KernelError(f"{kernel.__name__}: output {i} must be a tensor in nl.shared_hbm, "
                              f"got {x!r}")  # fmt: skip
        if not x.storage.full and not (x.written != 0).all():
            at = np.argwhere(x.written == 0)[0].tolist()
            raise KernelError(f"{kernel.__name__}: output {i} {x!r} was never written at {at}")
        arrays.append(np.ascontiguousarray(x.data))
    return arrays[0] if single else tuple(arrays)


class _Turns:
    """Two cores, one thread each, that run one after the other between barriers."""

    def __init__(self):
        self.locks = [threading.Semaphore(1), threading.Semaphore(0)]
        self.done, self.arrived = [False, False], [0, 0]
        self.error: BaseException | None = None

    def barrier(self, core: int) -> None:
        """Core 0 gives way to core 1 until it arrives (or ends); then core 0 goes on first."""
        other = 1 - core
        self.arrived[core] += 1
        if self.done[other] and self.arrived[other] < self.arrived[core]:
            refuse(_MISSED)
        self.locks[other].release()
        self.locks[core].acquire()
        if self.error is not None:
            raise _Stopped

    def run(self, calls) -> list:
        results: list = [None, None]

        def work(core: int) -> None:
            self.locks[core].acquire()
            try:
                if self.error is None:
                    results[core] = calls[core]()
                    if self.arrived[1 - core] > self.arrived[core]:
                        raise KernelError(_MISSED)
            except _Stopped:
                pass
            except BaseException as error:  # handed to the caller's thread
                self.error = self.error or error
            finally:
                self.done[core] = True
                self.locks[1 - core].release()

        workers = [threading.Thread(target=copy_context().run, args=(work, core))
                   for core in range(2)]  # fmt: skip
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.error is not None:
            raise self.error
        return results


class _Stopped(BaseException):
    """The other core failed."""
