"""The report file: what it must hold, checked on writing and on reading.

`report.json` of the demo. A change that old readers would misread raises VERSION.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

VERSION = 2
READABLE = (1, 2)

_NUMBER = (int, float)
_INTERVAL = {"ratio": _NUMBER, "low": _NUMBER, "high": _NUMBER}
_VARIANT = {
    "name": str,
    "bytes_on_disk": int,
    "peak_rss_bytes": int,
    "baseline_rss_bytes": int,
    # None: not finite.
    "perplexity": (*_NUMBER, type(None)),
    "nll": (*_NUMBER, type(None)),
    "prefill_tokens_per_s": _NUMBER,
    "decode_tokens_per_s": _NUMBER,
    # Time over the time of dense in the same rounds.
    "prefill_time_ratio": _INTERVAL,
    "decode_time_ratio": _INTERVAL,
    "prefill_seconds": list,
    "decode_seconds": list,
    "compress_seconds": (*_NUMBER, type(None)),
    "recipe": (dict, type(None)),
    "notes": list,
}
_LAYER_ROW = {
    "name": str,
    "rows": int,
    "weight_bytes": int,
    "seconds": list,
    "time_ratio": _INTERVAL,
    "error": _NUMBER,
}
_REPORT = {
    "schema_version": int,
    "kind": str,
    "created": str,
    "seconds": _NUMBER,
    "commit": (str, type(None)),
    "versions": dict,
    "machine": {"cpu": str, "cpu_flags": list, "isa": (str, type(None)), "cores_usable": int,
                "torch_threads": int, "memory_bytes": int, "system": str, "load_average": _NUMBER,
                "cores_busy": _NUMBER},
    "model": {"name": str, "parameters": int, "architecture": str},
    # Captions: what each number means.
    "settings": {"busy": (str, type(None)), "bytes_on_disk": str, "peak_rss": str,
                 "perplexity": str, "speed": str, "layer": str, "calibration": str,
                 "evaluation": str},
    "variants": [_VARIANT],
    "layer": {"in_features": int, "out_features": int, "rows": [_LAYER_ROW]},
}  # fmt: skip
# Version 1 promised less about the machine and the captions.
_FIRST = _REPORT | {
    "machine": {"cpu": str, "cpu_flags": list, "cores_usable": int, "torch_threads": int,
                "memory_bytes": int},
    "settings": dict,
}  # fmt: skip


def validate(report: object) -> None:
    """Check a report against the schema.

    Raises:
        ValueError: names the first field that is missing or of the wrong type, and what it holds.
    """
    version = report.get("schema_version") if isinstance(report, Mapping) else VERSION
    if version not in READABLE:
        raise ValueError(f"report: schema_version must be {VERSION}, got {version!r}")
    check("report", report, _FIRST if version == 1 else _REPORT)
    names = [variant["name"] for variant in report["variants"]]
    if not names or names[0] != "dense":
        raise ValueError(f"report.variants: the first must be 'dense', got {names[:1]}")
    if len(set(names)) != len(names):
        raise ValueError(f"report.variants: names must differ, got {names}")


def check(where: str, value: object, spec: object) -> None:
    if isinstance(spec, dict):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object, got {type(value).__name__}")
        for name, inner in spec.items():
            if name not in value:
                raise ValueError(f"{where}.{name} is missing")
            check(f"{where}.{name}", value[name], inner)
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {type(value).__name__}")
        for i, item in enumerate(value):
            check(f"{where}[{i}]", item, spec[0])
    # bool is an int to Python, but not a number here.
    elif not isinstance(value, spec) or (isinstance(value, bool) and spec is not bool):
        kinds = spec if isinstance(spec, tuple) else (spec,)
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"{where} must be {wanted}, got {value!r}")


def write(path: Path, report: dict) -> None:
    """Validate, then write the file in one step: it is there whole or not at all."""
    validate(report)
    write_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file beside `path`, then rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse(text: str) -> object:
    """The JSON in a text.

    Raises:
        ValueError: it is none, or ends too early.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be a whole JSON file, got one that is wrong or cut off at line "
                         f"{error.lineno}: {error.msg}") from error  # fmt: skip


def read(path: Path) -> dict:
    """A report from disk, validated.

    Raises:
        ValueError: not JSON (cut in half, say), of another schema version, or a field is wrong;
            names the file.
    """
    try:
        report = parse(path.read_text(encoding="utf-8"))
        validate(report)
    except ValueError as error:  # a UnicodeDecodeError too
        raise ValueError(f"{path}: {error}") from error
    return report
