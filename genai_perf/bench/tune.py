"""Search Triton configurations on this GPU and write what was fastest: `genaiperf tune OP`.

Each candidate is forced through `_backends.tuning`, checked against the oracle, and timed; the
table it ends in is the one that the kernels read. Not run on a GPU so far.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from itertools import product
from pathlib import Path

import torch

from .._backends import triton as toolchain
from .._backends import tuning
from .._errors import BackendUnsupported
from ..ops import OPS
from . import schema
from .clocks import CudaEventTimer, Timer
from .machine import commit
from .problem import choose
from .suites import suite
from .timer import Interleaver


@dataclass(frozen=True)
class Kernel:
    """A kernel that `_backends.tuning` knows by `name`, the phase of the suite in which it runs,
    and the launch keywords to try."""

    name: str
    phase: str
    space: dict[str, tuple[int, ...]]


_TILES = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8),
          "num_stages": (1, 2, 3)}  # fmt: skip
TUNABLE = {
    "attention": (
        Kernel("fwd", "forward", _TILES),
        Kernel("dkdv", "forward+backward", _TILES),
        Kernel("dq", "forward+backward", _TILES),
    ),
    "decode_attention": (Kernel("split", "forward", _TILES | {"BLOCK_M": (16, 32, 64)}),),
    "quant_matmul": (
        Kernel("gemv", "forward", {
            "BLOCK_N": (4, 8, 16, 32), "BLOCK_K": (64, 128, 256), "num_warps": (2, 4, 8),
            "num_stages": (1, 2, 3)}),
        Kernel("gemm", "forward", _TILES | {"BLOCK_K": (32, 64, 128)}),
        Kernel("dx", "backward", _TILES | {"BLOCK_K": (32, 64, 128)}),
    ),
    "sparse_matmul": (Kernel("gemv", "forward", {
        "BLOCK_N": (1, 2, 4, 8, 16), "UNITS": (16, 32, 64), "num_warps": (1, 2, 4, 8),
        "num_stages": (1, 2)}),),
    "optimizer_step": (Kernel("step", "step", {
        "ROWS": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8, 16)}),),
    "distill_loss": (Kernel("rows", "forward+backward", {
        "BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16), "num_stages": (1,)}),),
}  # fmt: skip
# What a configuration that does not fit the chip ends in.
_FAILURES = (RuntimeError, ValueError, MemoryError)
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Found:
    """The fastest configuration of one kernel for one case, and by how much it leads the rule's."""

    key: dict
    config: dict[str, int]
    seconds: float
    before: float


def candidates(space: dict[str, Iterable[int]]) -> list[dict[str, int]]:
    return [dict(zip(space, values, strict=True)) for values in product(*space.values())]


def search(configs: list[dict[str, int]], measure: Callable[[dict[str, int] | None], float]
           ) -> tuple[dict[str, int] | None, float, float]:  # fmt: skip
    """The fastest configuration, its time, and that of the rule's own (None).

    Args:
        configs: candidates.
        measure: seconds of a configuration, inf where it does not run or is wrong.
    """
    before = measure(None)
    best, lowest = None, before
    for config in configs:
        seconds = measure(config)
        if seconds < lowest:
            best, lowest = config, seconds
    return best, lowest, before


def tune(op: str, *, cases: tuple[str, ...] = (), folder: Path | None = None,
         progress: Progress | None = None) -> Path:  # fmt: skip
    """Search every kernel of an op on its benchmark cases and write `<folder>/<device>.json`.

    Args:
        op: one with Triton kernels.
        cases: names; none: the bfloat16 ones, or where there are none the headline.
        folder: None: the op's own `tuned`, where its kernels look.
        progress: called with (stage, done, total, what).

    Raises:
        ValueError: unknown op or case.
        BackendUnsupported: no GPU.
    """
    if op in OPS and op not in TUNABLE:
        raise ValueError(f"tune: {op} has no Triton kernel; those that have one: "
                         f"{', '.join(TUNABLE)}")  # fmt: skip
    choose("op with Triton configurations", op, list(TUNABLE))
    if (reason := toolchain.unavailable()) is not None or toolchain.interpreting():
        raise BackendUnsupported(f"tune {op}: {reason or 'Triton is set to interpret'}")
    room, progress = suite(op), progress or (lambda stage, done, total, what: None)
    known = room.cases()
    names = [choose("case", name, list(known)) for name in cases] or [
        name for name, case in known.items() if case.dtype == torch.bfloat16] or list(
            room.HEADLINE)  # fmt: skip
    timer, entries = CudaEventTimer(), []
    work = list(product(names, TUNABLE[op]))
    for i, (name, kernel) in enumerate(work):
        progress("Tuning", i, len(work), f"{name} {kernel.name}")
        problem = room.make(known[name], kernel.phase, "cuda", seed=0)
        seen: list[dict] = []

        def measure(config, problem=problem, kernel=kernel, seen=seen):
            return _measure(room, problem, kernel.name, config, timer, seen)

        best, seconds, before = search(candidates(kernel.space), measure)
        if best is not None:
            entries.append(Found(seen[0], best, seconds, before))
    device = torch.device("cuda")
    own = Path(import_module(f"genai_perf.ops.{op}").__file__).parent / "tuned"
    path = (folder or own) / f"{toolchain.device_key(device)}.json"
    write(path, entries, toolchain.device_key(device), toolchain.version())
    return path


def _measure(room, problem, kernel: str, config: dict[str, int] | None, timer: Timer,
             seen: list[dict]) -> float:  # fmt: skip
    """Seconds of the whole call with one kernel's configuration forced; inf if it fails."""
    with tuning.forced(kernel, config, seen), torch.set_grad_enabled("backward" in problem.phase):
        try:
            variant = room.own(problem, "triton")
            if not room.check(problem, variant.result(variant.call())).passed:
                return math.inf
            run = Interleaver({"it": variant.call}, timer=timer, warmup_seconds=0.05,
                              min_sample_seconds=0.0)  # fmt: skip
            run.run(20)
        except _FAILURES:
            return math.inf
        return run.samples()["it"].median


def write(path: Path, entries: list[Found], device: str, triton: str) -> None:
    """The table that `_backends.tuning.lookup` reads; entries of other cases stay."""
    kept = []
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        new = [found.key for found in entries]
        kept = [
            e for e in old["entries"] if {k: v for k, v in e.items() if k != "config"} not in new
        ]
        kept = kept if old["triton"] == triton else []
    table = {
        "device": device,
        "triton": triton,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "entries": kept + [found.key | {"config": found.config} for found in entries],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    schema.write_text(path, json.dumps(table, indent=1) + "\n")
