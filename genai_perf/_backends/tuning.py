"""Measured launch configurations: `tuned/<device>.json` beside a kernel, nearest key first.

A table is written by a measurement on that device and never by hand:

    {"device": "nvidia-h200", "triton": "3.6.0", "commit": "...", "date": "...",
     "entries": [{"kernel": "fwd", "dtype": "bfloat16", ..., "seqlen": 4096,
                  "config": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}}]}

Optima move between Triton's minor versions, so a table of another one is not used.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def _table(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


@dataclass(frozen=True)
class _Trial:
    kernel: str
    config: dict[str, int] | None
    seen: list[dict]


_trial: ContextVar[_Trial | None] = ContextVar("genai_perf_tuning_trial", default=None)


@contextmanager
def forced(kernel: str, config: dict[str, int] | None, seen: list[dict]) -> Iterator[None]:
    """Inside, every lookup for `kernel` gives `config` (None: what it would have given), and the
    keys that were asked for are appended to `seen`."""
    token = _trial.set(_Trial(kernel, config, seen))
    try:
        yield
    finally:
        _trial.reset(token)


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def lookup(folder: Path, device: str, triton_version: str, exact: Mapping[str, object],
           near: Mapping[str, float]) -> dict[str, int] | None:  # fmt: skip
    """The launch keywords of the nearest measured entry, or None if nothing comparable was.

    Args:
        folder: holds the tables, one file a device.
        device: as `_backends.triton.device_key` names it.
        triton_version: only a table of the same major and minor version counts.
        exact: fields on which an entry must agree.
        near: fields in which the entry of least distance wins, measured in powers of two.
    """
    trial = _trial.get()
    if trial is not None and trial.kernel == exact.get("kernel"):
        trial.seen.append({**exact, **near})
        if trial.config is not None:
            return trial.config
    table = _table(folder / f"{device}.json")
    if table is None or _minor(table["triton"]) != _minor(triton_version):
        return None
    entries = [
        entry for entry in table["entries"] if all(entry[key] == exact[key] for key in exact)
    ]
    if not entries:
        return None

    def distance(entry: Mapping[str, object]) -> float:
        return sum(
            abs(math.log2(max(entry[key], 1) / max(value, 1))) for key, value in near.items()
        )

    return min(entries, key=distance)["config"]
