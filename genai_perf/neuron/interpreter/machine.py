"""The core that a kernel runs on: its memory, its meters, and what every instruction goes through.

There is one machine per core and kernel call, found by a context variable.
"""

import math
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

import numpy as np

from . import dtypes
from .errors import refuse, require
from .memory import HBM, PRIVATE_HBM, PSUM, SBUF, SHARED_HBM, OnChip, Storage
from .targets import PARTITIONS, Target
from .tensor import Tensor

_current: ContextVar["Machine | None"] = ContextVar("genai_perf_nki_machine", default=None)
FIXED_CYCLES = 64  # the least that an instruction takes


@dataclass
class Meter:
    """What was run: (engine, instruction) -> count and cycles; bytes by direction; flops."""

    instructions: Counter = field(default_factory=Counter)
    cycles: Counter = field(default_factory=Counter)
    moved: Counter = field(default_factory=Counter)
    dma_seconds: float = 0.0
    flops: int = 0
    fp8_flops: int = 0


class Machine:
    """One core.

    dry: instructions are checked and metered, but nothing is computed.
    shared: the outputs of the first core, which the second one gets again, in order.
    """

    def __init__(self, target: Target, *, dry: bool = False, program_id: int = 0,
                 num_programs: int = 1, shared: list[Storage] | None = None,
                 barrier=None):  # fmt: skip
        self.target, self.dry = target, dry
        self.program_id, self.num_programs = program_id, num_programs
        self.chip, self.meter = OnChip(target), Meter()
        self.shared = [] if shared is None else shared
        self._given = 0
        self.barrier = barrier
        self.other: Machine | None = None  # the second core of the launch
        self.sent: list[tuple] = []  # what it was sent, in order
        # Accumulator registers of the Vector and the Scalar engine: a sum per partition.
        self.registers: dict[str, np.ndarray] = {}
        self.identities: dict[tuple, Tensor] = {}

    def allocate(self, shape, dtype, buffer, name: str = "", address=None) -> Tensor:
        shape, dtype = tuple(int(n) for n in shape), dtypes.resolve(dtype)
        if buffer in (SBUF, PSUM):
            return Tensor.whole(self.chip.allocate(shape, dtype, buffer, name, address))
        if buffer not in (HBM, PRIVATE_HBM, SHARED_HBM):
            refuse(f"buffer must be one of nl.sbuf, nl.psum, nl.hbm, nl.private_hbm, "
                   f"nl.shared_hbm, got {buffer!r}")  # fmt: skip
        if not shape or 0 in shape:
            refuse(f"a tensor in HBM must not be empty, got {shape}")
        if buffer is not SHARED_HBM:
            return Tensor.whole(Storage(shape, dtype, buffer, name))
        if self._given < len(self.shared):
            storage = self.shared[self._given]
            if storage.shape != shape or storage.dtype is not dtype:
                refuse("the cores of one launch must allocate the same shared tensors in order")
        else:
            storage = Storage(shape, dtype, buffer, name)
            self.shared.append(storage)
        self._given += 1
        return Tensor.whole(storage)

    def issue(self, engine: str, instruction: str, cycles: float) -> None:
        key = (engine, instruction)
        self.meter.instructions[key] += 1
        self.meter.cycles[key] += max(FIXED_CYCLES, cycles)


def current() -> Machine:
    machine = _current.get()
    if machine is None:
        refuse("nki instructions run inside a kernel, which nki.simulate or a call starts")
    return machine


class use:
    """`with use(machine)`: instructions go to it."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def __enter__(self) -> Machine:
        self._token = _current.set(self.machine)
        return self.machine

    def __exit__(self, *exc) -> None:
        _current.reset(self._token)


class Handle:
    """What an instruction returns: only good for ordering."""

    def depends_on(self, *producers) -> "Handle":
        return self


HANDLE = Handle()


# --- checks that instructions share ---------------------------------------------------------------


def tile(instruction: str, name: str, x, *, buffers=(SBUF, PSUM), anywhere=False) -> Tensor:
    """`x` as a tile in one of `buffers`, where an engine can start (DMA: anywhere)."""
    if not isinstance(x, Tensor):
        refuse(f"{instruction}: {name} must be a tile, got {type(x).__name__}")
    if x.storage.buffer not in buffers:
        names = " or ".join(b.name for b in buffers)
        refuse(f"{instruction}: {name} must be in {names}, got {x!r}")
    if x.gather is not None:
        refuse(f"{instruction}: {name} is indirect, which only dma_copy takes")
    if x.ndim < 2 or not 1 <= x.shape[0] <= PARTITIONS:
        refuse(f"{instruction}: {name} has 1 to {PARTITIONS} partitions and two dimensions or "
               f"more, got {x!r}")  # fmt: skip
    if x.storage.shape[0] != x.shape[0] and not anywhere:
        _check_start(instruction, name, x)
    limit = 65536
    if x.free <= limit and x.storage.buffer is PSUM:
        limit = 4096  # of its own: a broadcast repeats them
        repeats = [n for n, s in zip(x.shape[1:], x.strides[1:], strict=True) if s == 0]
        limit *= math.prod(repeats)
    if x.free > limit:
        refuse(f"{instruction}: {name} has {x.free} elements a partition, the limit is {limit}")
    return x


def _check_start(instruction: str, name: str, x: Tensor) -> None:
    start, count = x.partition, x.shape[0]
    allowed = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    if start not in allowed:
        refuse(f"{instruction}: {name} has {count} partitions from {start}; {count} can start at "
               f"{', '.join(map(str, allowed))} only")  # fmt: skip


def same_shape(instruction: str, dst: Tensor, **sources: Tensor) -> None:
    """Equal partitions, and as many elements in each."""
    for name, source in sources.items():
        if source.shape[0] != dst.shape[0] or source.free != dst.free:
            refuse(f"{instruction}: {name} {source.shape} must have the partitions and elements "
                   f"of dst {dst.shape}")  # fmt: skip


def check_tiles(instruction: str, dst, **sources) -> None:
    """dst and sources are tiles of equal partitions, with as many elements in each."""
    tile(instruction, "dst", dst)
    for name, source in sources.items():
        tile(instruction, name, source)
    same_shape(instruction, dst, **sources)


def not_both_psum(instruction: str, first: Tensor, second: Tensor) -> None:
    if first.in_psum() and second.in_psum():
        refuse(f"{instruction}: two inputs must not both be in PSUM")


def no_psum(instruction: str, engine: str, *tiles) -> None:
    for t in tiles:
        if isinstance(t, Tensor) and t.in_psum():
            refuse(f"{instruction}: {engine} cannot reach PSUM, got {t!r}")


def from_generation(machine: Machine, generation: int, what: str) -> None:
    if machine.target.generation < generation:
        refuse(f"{what} needs gen{generation}, the target is {machine.target.name}")


# --- reading and writing --------------------------------------------------------------------------


def check_written(x: Tensor) -> None:
    if x.storage.full or x.written is None:
        return
    if x.written.min(initial=np.iinfo(x.written.dtype).max) != np.iinfo(x.written.dtype).max:
        missing = np.argwhere(x.written != np.iinfo(x.written.dtype).max)[0].tolist()
        refuse(f"{x!r} is read at {missing} before anything was written there")


def moved(x: Tensor, dst: Tensor, *, bits=False) -> tuple[np.ndarray, np.ndarray | None]:
    """(values, which were written; None: all), for what computes nothing but moves x to dst.

    Lanes that nobody wrote may be moved along into a tile that is not whole itself. They stay
    unwritten; their value here is 0.
    """
    whole = x.storage.full or x.written is None or dst.storage.full
    written = None if whole else x.written.reshape(x.shape[0], -1)
    if written is None or written.all():
        return (raw(x) if bits else read(x)), None
    written = written == np.iinfo(written.dtype).max
    values = x.rows().copy()
    values[~written] = 0
    return (values if bits else dtypes.to_float(values, x.dtype)), written


def raw(x: Tensor) -> np.ndarray:
    """(partitions, elements), as stored."""
    check_written(x)
    return x.rows()


def read(x: Tensor) -> np.ndarray:
    """(partitions, elements) in fp32, as the engines compute."""
    check_written(x)
    return dtypes.to_float(x.rows(), x.dtype)


def operand(instruction: str, name: str, x, machine: Machine, partitions: int, *,
            bits: bool = False):  # fmt: skip
    """A scalar, or a (partitions, 1) tile, as something that broadcasts over a row."""
    if isinstance(x, (int, float, np.number)) and not isinstance(x, bool):
        if bits:
            require(float(x).is_integer(), f"{instruction}: {name} of a bit operation must be an "
                    f"integer, got {x}")  # fmt: skip
            return int(x)
        return np.float32(x)
    t = tile(instruction, name, x)
    if t.shape[0] != partitions or t.free != 1:
        refuse(f"{instruction}: {name} must be a number or ({partitions}, 1), got {t!r}")
    if bits:
        require(t.dtype.kind == "int", f"{instruction}: {name} must be of integers, got {t!r}")
        return None if machine.dry else raw(t)
    if t.dtype is not dtypes.float32:
        refuse(f"{instruction}: {name} must be float32, got {t!r}")
    return None if machine.dry else read(t)


def store(dst: Tensor, values: np.ndarray, *, summed: bool = False, bits: bool = False,
          written: np.ndarray | None = None) -> None:  # fmt: skip
    """Write fp32 `values` (or, with `bits`, values already of dst's type) and note it.

    written: of `moved`, where not all values are some that a kernel wrote.
    """
    if not bits:
        values = dtypes.from_float(values, dst.dtype)
    dst.data[...] = values.reshape(dst.shape)
    mark(dst, summed, written)


def mark(dst: Tensor, summed: bool = False, written: np.ndarray | None = None) -> None:
    storage = dst.storage
    if dst.summed is not None:
        dst.summed[...] = np.iinfo(dst.summed.dtype).max if summed else 0
    if written is not None:
        dst.written[...] = np.where(written, np.iinfo(dst.written.dtype).max, 0).reshape(dst.shape)
        return
    if storage.full:
        return
    dst.written[...] = np.iinfo(dst.written.dtype).max
    if dst.size * dst.itemsize == storage.array.nbytes and 0 not in dst.data.strides:
        storage.full = True
