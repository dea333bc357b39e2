"""Result files: `results/<date>-<device>-<commit>.json`, versioned, checked on writing and reading.

A file of kind "bench" holds rows of ops, whole models and training; a file of kind "demo" is the
demo's report (`schema`). Beside a bench file lies `<name>.samples.jsonl` with every raw sample.
"""

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from . import schema
from .provenance import device_name

VERSION = 1
_NUMBER = (int, float)
_MAYBE = (*_NUMBER, type(None))
STATUSES = ("ok", "failed", "skipped", "out of memory", "error")

_VARIANT = {
    "name": str,
    "own": bool,
    "status": str,
    "reason": (str, type(None)),
    # Against the float64 oracle; None: it never ran.
    "error": _MAYBE,
    "allowed": _MAYBE,
    "numerics": (str, type(None)),
    "seconds": list,
    "median": _MAYBE,
    "share_of_bound": _MAYBE,
    "memory": (dict, type(None)),
}
# Of a variant in a row of device "neuron": what `neuron.measure` gives.
_NEURON = {"seconds": list, "median_seconds": _NUMBER, "memory": dict,
           "peak_device_bytes": (int, type(None)), "utilization": (dict, type(None)),
           "profile": (dict, type(None)), "topology": dict}  # fmt: skip
_COMPARISON = {"baseline": str, "candidate": str, "ratio": _NUMBER, "low": _NUMBER,
               "high": _NUMBER, "pairs": int, "verdict": str, "reason": str}  # fmt: skip
_ROW = {
    "op": str,
    "case": str,
    "phase": str,
    "dtype": str,
    "device": str,
    "cache": str,
    "flops": int,
    "floor_bytes": int,
    "seed": int,
    "bound": {"by": str, "seconds": _NUMBER},
    "noise": (dict, type(None)),
    "clocks": dict,
    "variants": [_VARIANT],
    "comparisons": [_COMPARISON],
}
_REPORT = {
    "schema_version": int,
    "kind": str,
    "created": str,
    "seconds": _NUMBER,
    "provenance": {"commit": (str, type(None)), "versions": dict, "device": str,
                   "machine": {"cpu": str, "cores_usable": int, "torch_threads": int,
                               "gpus": list}},
    "settings": dict,
    "peaks": (dict, type(None)),
    "rows": [_ROW],
    "models": list,
    "training": list,
}  # fmt: skip


class Clock:
    """When a run began, for the report that it ends in."""

    def __init__(self):
        self._started, self._begun = datetime.now(UTC), time.perf_counter()

    def spent(self) -> float:
        return time.perf_counter() - self._begun

    def report(self, about: dict, settings: dict, *, peaks: dict | None = None,
               rows: Sequence[dict] = (), models: Sequence[dict] = (),
               training: Sequence[dict] = (), left_out: Sequence[str] = ()) -> dict:  # fmt: skip
        """A bench report of what was measured since, validated.

        Args:
            about: from `provenance`.
            settings: how it was measured, as JSON values.
            peaks, rows, models, training, left_out: what was found.
        """
        report = {
            "schema_version": VERSION,
            "kind": "bench",
            "created": self._started.isoformat(timespec="seconds"),
            "seconds": round(self.spent(), 1),
            "provenance": about,
            "settings": settings,
            "peaks": peaks,
            "rows": list(rows),
            "left_out": list(left_out),
            "models": list(models),
            "training": list(training),
        }
        validate(report)
        return report


def validate(report: object) -> None:
    """Check a bench report.

    Raises:
        ValueError: names the first field that is missing or of the wrong type, and what it holds.
    """
    if isinstance(report, Mapping) and report.get("schema_version") != VERSION:
        raise ValueError(f"schema_version must be {VERSION}, got {report.get('schema_version')!r}; "
                         "read it with the genai_perf that wrote it")  # fmt: skip
    schema.check("report", report, _REPORT)
    for i, row in enumerate(report["rows"]):
        for variant in row["variants"]:
            if "neuron" in variant:
                schema.check(f"report.rows[{i}].neuron", variant["neuron"], _NEURON)
            if variant["status"] not in STATUSES:
                raise ValueError(f"report.rows[{i}]: status must be one of {', '.join(STATUSES)}, "
                                 f"got {variant['status']!r}")  # fmt: skip
            if variant["status"] != "ok" and variant["median"] is not None:
                raise ValueError(f"report.rows[{i}]: {variant['name']} is {variant['status']} and "
                                 "must have no time")  # fmt: skip


def load(path: Path) -> dict:
    """A result file of any kind, validated.

    Raises:
        ValueError: not JSON (cut in half, say), another schema version, a wrong field; names the
            file.
    """
    try:
        report = schema.parse(path.read_text(encoding="utf-8"))
        kind = report.get("kind") if isinstance(report, Mapping) else None
        if kind == "demo":
            schema.validate(report)
        elif kind == "bench":
            validate(report)
        else:
            raise ValueError(f"kind must be 'bench' or 'demo', got {kind!r}")
    except ValueError as error:  # a UnicodeDecodeError too
        raise ValueError(f"{path}: {error}") from error
    return report


def write(path: Path, report: dict) -> None:
    """Validate, then write in one step, making the folder if it is not there."""
    validate(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    schema.write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def file_name(created: str, found: dict) -> str:
    """`2026-11-21-amd-epyc-2core-83d2a5a.json`; a "+" after the commit: with changes."""
    head = found["commit"] or "nogit"
    mark = "+" if head.endswith("+") else ""
    return f"{created[:10]}-{device_name(found)}-{head[:7]}{mark}.json"


def samples_path(path: Path) -> Path:
    return path.with_suffix(".samples.jsonl")


def key(row: dict) -> tuple:
    """What makes two rows of different files the same measurement."""
    return tuple(row[name] for name in ("op", "case", "phase", "dtype", "device", "cache"))
