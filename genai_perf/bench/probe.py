"""Memory of one variant of one case in a process that has done nothing else."""

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

from . import peers, shapes
from .problem import Problem, Variant
from .suites import suite

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def build(problem: Problem, variant: str, own: bool) -> Variant:
    """An own backend's variant, or a peer's."""
    return suite(problem.op).own(problem, variant) if own else peers.build(variant, problem)


def variant_memory(op: str, case: str, phase: str, device: str, variant: str, own: bool, seed: int,
                   threads: int, model: str | None = None) -> dict:  # fmt: skip
    """Build the problem, call the variant once, and say how far memory rose above what the inputs
    and the variant's own weights already took.

    Returns:
        dict: `extra_bytes`, the rise of the peak during the call over what was resident before;
        `input_bytes`; `resident_peak_bytes`, everything; on a GPU `allocated_peak_bytes` and
        `reserved_peak_bytes` of torch's allocator too.
    """
    torch.set_num_threads(threads)
    room = suite(op)
    known = shapes.cases(op, model and Path(model))
    problem = room.make(known[case], phase, device, seed)
    made = build(problem, variant, own)
    # What a library loads, and keeps, on its first call is not of the call, so the second is looked
    # at, after the first one's memory went back to the system.
    with torch.set_grad_enabled("backward" in phase):
        made.call()
        _give_back()
        if device == "cuda":
            return _cuda(made, problem)
        before = reset_peak()
        kept = made.call()
    peak = peak_bytes()
    del kept
    return {"extra_bytes": max(0, peak - before), "input_bytes": _bytes(problem),
            "resident_peak_bytes": peak}  # fmt: skip


def _cuda(made: Variant, problem: Problem) -> dict:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = made.call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    del kept
    return {"extra_bytes": peak - before, "input_bytes": _bytes(problem),
            "resident_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "allocated_peak_bytes": peak,
            "reserved_peak_bytes": torch.cuda.max_memory_reserved()}  # fmt: skip


def _bytes(problem: Problem) -> int:
    """Of the inputs that the op itself takes; the others are for the oracle and the peers."""
    unused = {"dense", {"quantize": "packed", "dequantize": "x"}.get(problem.phase)}
    return sum(getattr(value, "nbytes", 0) for name, value in problem.inputs.items()
               if name not in unused)  # fmt: skip


def _give_back() -> None:
    """Free memory that the C library holds, so that a new allocation shows."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> int:
    """Resident bytes now; the system's peak of this process starts over."""
    if _RESET.exists():
        _RESET.write_text("5")
    return _field("VmRSS")


def peak_bytes() -> int:
    """The peak of this process since then."""
    return _field("VmHWM")


def _field(name: str) -> int:
    if not _STATUS.exists():  # macOS: the peak of the whole process, in bytes
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
