"""Runs cases of an op: every variant checked against the oracle, timed in pairs, its memory taken.

A variant whose numbers are wrong gets no time. One that runs out of memory, or whose device is
lost, says so in its row, and the rest goes on.
"""

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from statistics import median

import torch

from .._errors import BackendUnsupported
from ..ops import OPS
from . import caches, neuron, peers, probe, results, shapes
from .clocks import timer_for, torch_device
from .memory import FreshProcesses
from .problem import Check, Problem, Unsupported, choose
from .provenance import provenance, triton_kernels
from .roofline import Peaks, bound, measure_peaks
from .suites import own_names, suite
from .trace import Trace, pinned
from .verdict import MIN_PAIRS, measure

# What a kernel, ours or another's, may end with; an ImportError is a library half installed.
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError, ImportError,
             AttributeError, OSError)  # fmt: skip
_PRELOAD = ("torch", "numpy", "genai_perf.bench.probe", *(f"genai_perf.ops.{op}" for op in OPS))
# In place of peers: every one that computes the op, those that cannot run here skipped by name.
ALL = "all"
# Seconds between two looks at the roof, which the highest one makes.
_PEAKS_EVERY = 20.0
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Selection:
    """What to measure. Empty tuples: the suite's own choice.

    cases: names or patterns such as "int4-*"; phases: of the suite's PHASES; dtypes: "bfloat16";
    against: variants of peers, the first one the baseline; backends: own ones, of `own_names`;
    model: a checkpoint whose shapes the cases take.
    """

    op: str
    cases: tuple[str, ...] = ()
    phases: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    model: Path | None = None


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    pairs: ABBA rounds at least; budget_seconds: for the rounds of one row; memory: whether each
    variant's memory is taken in a fresh process; quick: the suite's few headline cases;
    total_seconds: no row begins later than this, and those left out are named in the report.
    """

    device: str = "cpu"
    cache: str = "cold"
    timer: str | None = None
    pairs: int = MIN_PAIRS
    budget_seconds: float = 15.0
    warmup_seconds: float = 0.1
    memory: bool = True
    threads: int | None = None
    pin: bool = False
    quick: bool = False
    seed: int | None = None
    total_seconds: float | None = None


@dataclass
class _Entry:
    """One variant on its way to a row."""

    name: str
    own: bool
    status: str = "ok"
    reason: str | None = None
    check: Check | None = None
    numerics: str | None = None
    seconds: list[float] = field(default_factory=list)
    memory: dict | None = None
    neuron: dict | None = None  # of `neuron.measure`


def select(selection: Selection, quick: bool = False) -> list[tuple[object, str]]:
    """(case, phase) of everything selected.

    Raises:
        ValueError: unknown op, case, phase, peer or backend; offers the nearest names.
    """
    room = suite(selection.op)
    known = shapes.cases(selection.op, selection.model)
    for name in selection.against:
        if name == ALL:
            continue
        peers.find(name, selection.op)
    for name in selection.backends:
        choose(f"backend of {selection.op}", name, own_names(selection.op))
    phases = [choose("phase", name, room.PHASES) for name in selection.phases] or [room.PHASES[0]]
    names: list[str] = []
    headline = tuple(known)[: len(room.HEADLINE)] if selection.model else room.HEADLINE
    for wanted in selection.cases or (headline if quick else tuple(known)):
        matching = [name for name in known if fnmatchcase(name, wanted)]
        names += matching or [choose("case", wanted, list(known))]
    cases = [known[name] for name in dict.fromkeys(names)]
    if selection.dtypes:
        kinds = sorted({str(case.dtype)[6:] for case in known.values()})
        dtypes = [choose("dtype", name, kinds) for name in selection.dtypes]
        cases = [case for case in cases if str(case.dtype)[6:] in dtypes]
        if not cases:
            raise ValueError(f"bench: no case of {selection.op} that was chosen is of dtype "
                             f"{' or '.join(dtypes)}")  # fmt: skip
    return [(case, phase) for case in cases for phase in phases]


def run(selections: Sequence[Selection], settings: Settings, *, samples: Path | None = None,
        progress: Progress | None = None) -> dict:  # fmt: skip
    """Measure everything selected.

    Args:
        selections: one for each op.
        settings: how.
        samples: a JSONL file that every raw sample is written to as it is taken.
        progress: called with (stage, done, total, what).

    Returns:
        dict: a valid report (`results.validate`).

    Raises:
        ValueError: unknown names, before anything is measured.
        BackendUnsupported: the device is not here.
    """
    clock = results.Clock()
    progress = progress or (lambda stage, done, total, what: None)
    parts = [[(one, *chosen) for chosen in select(one, settings.quick)] for one in selections]
    # Where time may end, the ops take turns, so that it is no op's whole that is left out.
    turns = parts if settings.total_seconds is None else zip_longest(*parts)
    work = [item for turn in turns for item in turn if item is not None]
    timer = timer_for(settings.device, settings.timer)
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    settings = replace(settings, seed=seed)
    rows, left_out = [], []
    with pinned(settings.threads, pin=settings.pin) as cores:
        settings = replace(settings, threads=torch.get_num_threads())
        about = provenance(settings.device)
        dtypes = {case.dtype for _, case, _ in work} | {torch.float32}

        def measured_peaks() -> Peaks:
            return measure_peaks(
                torch_device(settings.device), sorted(dtypes, key=str), timer=timer
            )

        peaks, looked = measured_peaks(), clock.spent()
        with _journal(samples) as write, _processes(settings) as fresh:
            for i, (one, case, phase) in enumerate(work):
                if settings.total_seconds is not None and clock.spent() > settings.total_seconds:
                    left_out.append(f"{one.op} {case.name} {phase}")
                    continue
                progress("Cases", i, len(work), f"{one.op} {case.name} {phase}")
                rows.append(_row(one, case, phase, settings, timer, write, fresh))
                if clock.spent() - looked > _PEAKS_EVERY or i + 1 == len(work):
                    peaks, looked = peaks.highest(measured_peaks()), clock.spent()
            progress("Cases", len(work), len(work), "")
    for row in rows:
        _under(row, peaks)
    return clock.report(about | {"pinned_to": cores}, asdict(settings), peaks=peaks.to_dict(),
                        rows=rows, left_out=left_out)  # fmt: skip


def _under(row: dict, peaks: Peaks) -> None:
    """The roof over a row, and the share of it that each variant reached."""
    roof = bound(row["flops"], row["floor_bytes"], getattr(torch, row["dtype"]), peaks,
                 row["cache"])  # fmt: skip
    row["bound"] = asdict(roof)
    for variant in row["variants"]:
        middle = variant["median"]
        variant["share_of_bound"] = roof.seconds / middle if middle else None


def _row(one: Selection, case, phase: str, settings: Settings, timer,
         write: Callable[[dict], None], fresh: FreshProcesses | None) -> dict:  # fmt: skip
    room = suite(one.op)
    problem = room.make(case, phase, torch_device(settings.device), settings.seed)
    entries, calls = _prepare(one, room, problem, settings)
    ready = [entry for entry in entries if entry.status == "ok"]
    trace, measured = Trace(settings.device), None
    about = {"op": one.op, "case": case.name, "phase": phase, "dtype": str(problem.dtype)[6:],
             "device": settings.device, "cache": settings.cache}  # fmt: skip

    def on_round(number: int, order: list[str], seconds: dict[str, float]) -> None:
        state = trace.look()
        write(about | {"round": number, "order": order, "seconds": seconds, "mhz": state.mhz,
                       "throttled": trace.throttled(state)})  # fmt: skip

    while ready and measured is None:
        try:
            with torch.set_grad_enabled("backward" in phase):
                measured = measure(
                    {entry.name: calls[entry.name] for entry in ready},
                    timer=timer,
                    pairs=settings.pairs,
                    budget_seconds=settings.budget_seconds,
                    warmup_seconds=settings.warmup_seconds,
                    stable_seconds=0.5,
                    min_sample_seconds=0.002 if settings.device == "cpu" else 0.0,
                    before=caches.flusher(settings.device, settings.cache),
                    on_round=on_round,
                )
        except _FAILURES as error:
            # The last one warmed up or timed is not known here, so each is tried alone once more.
            _find_culprit(ready, calls, error)
            ready = [entry for entry in ready if entry.status == "ok"]
    comparisons = []
    if measured is not None:
        for entry in ready:
            entry.seconds = list(measured.samples[entry.name].seconds)
        comparisons = [
            _comparison(measured, theirs.name, ours.name)
            for ours in ready
            if ours.own
            for theirs in ready
            if not theirs.own
        ]
    if settings.device == "neuron":
        for entry in ready:
            entry.neuron = neuron.measure(calls[entry.name], synchronize=timer.synchronize)
            entry.memory = neuron.variant_memory(entry.neuron, problem.floor_bytes)
    elif fresh is not None:
        for entry in ready:
            entry.memory = _memory(fresh, entry, about, one.model, settings, problem)
    row = about | {
        "flops": problem.flops,
        "floor_bytes": problem.floor_bytes,
        "seed": settings.seed,
        "noise": _noise(measured),
        "clocks": trace.summary(),
        "variants": [_variant(entry, problem) for entry in entries],
        "comparisons": comparisons,
    }
    if any(entry.own and entry.name == "triton" for entry in ready):
        row["triton"] = triton_kernels(one.op)
    return row


def _prepare(one: Selection, room, problem: Problem, settings: Settings
             ) -> tuple[list[_Entry], dict[str, Callable[[], object]]]:  # fmt: skip
    """Every variant built and checked; calls of those that passed."""
    own = one.backends or _chosen_backend(room, problem)
    theirs = one.against or (room.BASELINE,)
    if ALL in theirs:
        theirs = tuple(dict.fromkeys((room.BASELINE, *peers.variants(one.op))))
    entries = [_Entry(name, True) for name in own] + [_Entry(name, False) for name in theirs]
    calls: dict[str, Callable[[], object]] = {}
    try:
        copies = caches.problems(problem, settings.cache)
    except ValueError as error:
        for entry in entries:
            entry.status, entry.reason = "error", str(error)
        return entries, calls
    for entry in entries:
        with _guarded(entry), torch.set_grad_enabled("backward" in problem.phase):
            built = [probe.build(copy, entry.name, entry.own) for copy in copies]
            entry.numerics = built[0].numerics
            outputs = built[0].result(built[0].call())
            entry.check = room.check(problem, outputs, built[0].numerics, built[0].weight)
            if not entry.check.passed:
                entry.status = "failed"
                entry.reason = (f"error {entry.check.error:.3g} against the oracle, allowed "
                                f"{entry.check.allowed:.3g}")  # fmt: skip
            calls[entry.name] = caches.rotate([variant.call for variant in built])
    return entries, calls


def _chosen_backend(room, problem: Problem) -> tuple[str, ...]:
    """The first own backend that can run it; the reference only where no other can."""
    for name in room.BACKENDS:
        try:
            with torch.set_grad_enabled("backward" in problem.phase):
                room.own(problem, name).call()
        except (BackendUnsupported, ValueError):
            continue
        except _FAILURES:
            pass  # it wants to run and cannot: the row says how it ended
        return (name,)
    return (room.BACKENDS[-1],)


@contextmanager
def _guarded(entry: _Entry) -> Iterator[None]:
    """What goes wrong inside becomes the entry's status."""
    try:
        yield
    except (Unsupported, BackendUnsupported) as error:
        entry.status, entry.reason = "skipped", _sentence(error)
    except _FAILURES as error:
        _mark(entry, error)


def _mark(entry: _Entry, error: BaseException) -> None:
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    # The CPU's allocator raises a plain RuntimeError.
    memory = memory or "can't allocate memory" in str(error) or "out of memory" in str(error)
    entry.status = "out of memory" if memory else "error"
    entry.reason = f"{type(error).__name__}: {_sentence(error)}"


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"


def _find_culprit(ready: list[_Entry], calls: dict, error: BaseException) -> None:
    for entry in ready:
        with _guarded(entry):
            calls[entry.name]()
    if all(entry.status == "ok" for entry in ready):  # only together: then none has a time
        for entry in ready:
            _mark(entry, error)


def _comparison(measured, baseline: str, candidate: str) -> dict:
    found = measured.pair(baseline, candidate)
    pair = found.pair
    return {"baseline": baseline, "candidate": candidate, "ratio": pair.ratio, "low": pair.low,
            "high": pair.high, "pairs": pair.pairs, "verdict": str(found.verdict),
            "reason": found.reason}  # fmt: skip


def _noise(measured) -> dict | None:
    if measured is None:
        return None
    pair = measured.noise.pair
    return {"of": measured.noise.of, "ratio": pair.ratio, "low": pair.low, "high": pair.high,
            "floor": measured.noise.floor,
            "stable": all(warm.stable for warm in measured.warm.values())}  # fmt: skip


def _memory(fresh: FreshProcesses, entry: _Entry, about: dict, model: Path | None,
            settings: Settings, problem: Problem) -> dict:  # fmt: skip
    arguments = {name: about[name] for name in ("op", "case", "phase", "device")} | {
        "variant": entry.name, "own": entry.own, "seed": settings.seed,
        "threads": settings.threads, "model": model and str(model),
    }  # fmt: skip
    try:
        found = fresh.run("genai_perf.bench.probe:variant_memory", arguments).value
    except RuntimeError as error:
        return {"reason": _sentence(error)}
    held = found["input_bytes"] + found["extra_bytes"]
    return found | {"over_floor": held / problem.floor_bytes}


def _variant(entry: _Entry, problem: Problem) -> dict:
    middle = median(entry.seconds) if entry.seconds else None
    check = entry.check
    row = {
        "name": entry.name,
        "own": entry.own,
        "status": entry.status,
        "reason": entry.reason,
        "error": _finite(check.error) if check else None,
        "allowed": _finite(check.allowed) if check else None,
        "numerics": entry.numerics,
        "seconds": entry.seconds,
        "median": middle,
        "flops_per_s": problem.flops / middle if middle else None,
        "bytes_per_s": problem.floor_bytes / middle if middle else None,
        "memory": entry.memory,
    }
    return row if entry.neuron is None else row | {"neuron": entry.neuron}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@contextmanager
def _journal(path: Path | None) -> Iterator[Callable[[dict], None]]:
    if path is None:
        yield lambda line: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        yield lambda line: (file.write(json.dumps(line) + "\n"), file.flush())


@contextmanager
def _processes(settings: Settings) -> Iterator[FreshProcesses | None]:
    if not settings.memory or settings.device == "neuron":
        yield None
        return
    with FreshProcesses(preload=_PRELOAD) as fresh:
        yield fresh
