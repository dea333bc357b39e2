"""Cold and hot caches, named as such.

hot: the same tensors in every call. cold: on the processor, calls rotate over copies of their
inputs that together are twice as large as the last-level cache; on a GPU, a write of twice the
size of its L2 cache goes before every sample, outside of its time.
"""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch

from .problem import Problem

CACHES = ("cold", "hot")
_FALLBACK = 32 << 20
_MOST_COPIES = 64
_MOST_BYTES = 2 << 30


def last_level_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache of the first core; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [path.read_text().strip() for path in root.glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=_FALLBACK)


def copies(working_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs keep each other out of the cache; 1 if one alone does.

    Raises:
        ValueError: more than 64 sets would be needed: too small a problem to be timed cold.
    """
    if working_bytes >= 2 * cache_bytes:
        return 1
    count = math.ceil(2 * cache_bytes / max(1, working_bytes)) + 1
    if count > _MOST_COPIES:
        raise ValueError(
            f"cold caches would need {count} copies of {working_bytes} bytes; time it hot"
        )
    return max(2, min(count, _MOST_BYTES // max(1, working_bytes)))


def problems(problem: Problem, cache: str) -> list[Problem]:
    """The problem, and on the processor for cold caches its clones."""
    if cache == "hot" or problem.device != "cpu":
        return [problem]
    count = copies(problem.floor_bytes, last_level_bytes())
    return [problem, *(problem.clone() for _ in range(count - 1))]


def rotate(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of `calls` each time."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


def flusher(device: str, cache: str) -> Callable[[], object] | None:
    """What goes before each sample on a GPU with cold caches, else None."""
    if device != "cuda" or cache == "hot":
        return None
    size = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(max(size, 1 << 20), dtype=torch.int8, device=device).zero_
