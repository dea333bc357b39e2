"""What the machine can do at most, measured in the same run: the roof that every row is held to."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from .._backends import native
from .caches import last_level_bytes
from .clocks import Timer, timer_for

_REPEATS = 5
_LEAST_SECONDS = 0.002


@dataclass(frozen=True)
class Peaks:
    """Bytes a second of reading and of copying (read and written bytes both counted), and flops a
    second of a square matmul by dtype. The best of several, which is what a roof is."""

    read: float
    copy: float
    matmul: dict[str, float]

    def to_dict(self) -> dict:
        return asdict(self)

    def highest(self, other: "Peaks") -> "Peaks":
        """The higher of each: what another process took from one measurement it leaves another."""
        matmul = {kind: max(rate, other.matmul[kind]) for kind, rate in self.matmul.items()}
        return Peaks(max(self.read, other.read), max(self.copy, other.copy), matmul)


@dataclass(frozen=True)
class Bound:
    """The least time that flops and bytes allow, and which of the two it is."""

    by: str
    seconds: float


def measure_peaks(device: str = "cpu", dtypes: Sequence[torch.dtype] = (torch.float32,), *,
                  timer: Timer | None = None, buffer_bytes: int | None = None,
                  side: int | None = None) -> Peaks:  # fmt: skip
    """Read, copy and multiply, each as fast as torch does it here, with the threads set now.

    Args:
        device: "cpu" or "cuda".
        dtypes: of the matmuls.
        timer: None: the device's own.
        buffer_bytes: of the tensor that is read and copied; None: four times the last cache.
        side: of the square matrices; None: 1024 on the processor, 8192 on a GPU.
    """
    timer = timer or timer_for(device)
    cache = last_level_bytes()
    if device == "cuda":
        cache = torch.cuda.get_device_properties(0).L2_cache_size
    size = buffer_bytes or max(4 * cache, 64 << 20)
    source = torch.ones(size // 8, dtype=torch.int64, device=device)
    target = torch.empty_like(source)
    side = side or (8192 if device == "cuda" else 1024)
    read = source.nbytes / min(_best(call, timer) for call in _readers(source))
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), timer)
    matmul = {}
    for dtype in dtypes:
        a = torch.randn(side, side, device=device).to(dtype)
        matmul[str(dtype)[6:]] = 2 * side**3 / _best(lambda a=a: a @ a, timer)
    return Peaks(read, copied, matmul)


def _readers(source: torch.Tensor) -> list[Callable[[], object]]:
    """Ways to read a tensor once; on a processor also a kernel that does nothing else."""
    found = [source.sum]
    if source.device.type == "cpu" and native.unavailable() is None:
        address, size = source.data_ptr(), source.nbytes
        found.append(lambda: native.lib().read_memory(address, size, native.threads()))
    return found


def _best(call: Callable[[], object], timer: Timer) -> float:
    call()
    timer.synchronize()
    start = time.perf_counter()
    call()
    timer.synchronize()
    calls = max(1, round(_LEAST_SECONDS / max(time.perf_counter() - start, 1e-7)))
    prepared = timer.prepare(call, calls)
    return min(timer.seconds(timer.sample(prepared)) for _ in range(_REPEATS))


def bound(flops: int, floor_bytes: int, dtype: torch.dtype, peaks: Peaks, cache: str) -> Bound:
    """The roof over a problem.

    Compute takes the faster of the matmuls in its dtype and in float32, for a kernel may widen.
    With hot caches nothing need come from memory, so compute alone bounds.
    """
    rates = [rate for name in (str(dtype)[6:], "float32") if (rate := peaks.matmul.get(name))]
    compute = flops / max(rates) if rates else 0.0
    memory = floor_bytes / max(peaks.read, peaks.copy) if cache == "cold" else 0.0
    return Bound("memory", memory) if memory > compute else Bound("compute", compute)
