"""The embedded model and the text that it was trained on.

The text is the source of the running Python's standard library, so every machine has it and nothing
is downloaded. HELD_OUT and CALIBRATION are the one place that says which modules are for what.
"""

import sysconfig
import tokenize
from pathlib import Path

from .._checks import check_choice

# Whole modules or packages of mixed kinds, never seen in training nor by the tokenizer. All of them
# exist in Python 3.11 to 3.14, as `name.py` or as the folder `name/`, and none has a near copy
# among the training modules (as posixpath has ntpath, or decimal _pydecimal).
HELD_OUT = (
    "bisect", "calendar", "cmd", "colorsys", "configparser", "contextlib", "csv", "dataclasses",
    "filecmp", "fnmatch", "fractions", "getopt", "glob", "graphlib", "heapq", "hmac", "json",
    "netrc", "numbers", "pprint", "queue", "rlcompleter", "sched", "secrets", "selectors",
    "shelve", "shlex", "statistics", "tempfile", "textwrap", "timeit", "tomllib", "zipapp",
)  # fmt: skip

# Training modules of mixed kinds; compression calibrates on these.
CALIBRATION = (
    "argparse", "ast", "asyncio", "collections", "datetime", "email", "functools", "http",
    "inspect", "logging", "pathlib", "pickle", "random", "subprocess", "tarfile", "threading",
    "typing", "unittest", "urllib", "xml",
)  # fmt: skip

SPLITS = ("train", "heldout", "calibration")

# Folders that are not the library, or that some machines have and others do not.
_SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "ensurepip", "lib-dynload",
    "__pycache__",
}  # fmt: skip
# Tables written by a program: character maps, help topics as one string, build variables.
_SKIPPED_TABLES = ("encodings", "pydoc_data", "html.entities")


def tiny_python_lm() -> Path:
    """The folder of the embedded model, in Hugging Face format (LlamaForCausalLM, fp16)."""
    return Path(__file__).parent / "tiny_python_lm"


def stdlib_text(split: str = "train") -> list[tuple[str, str]]:
    """The standard library's modules and their source text, one split of it.

    Args:
        split: "train", "heldout" (the modules in HELD_OUT, in no other split) or "calibration" (the
            modules in CALIBRATION, a part of "train").

    Returns:
        (module, text) pairs in the order of their dotted names, empty files left out.

    Raises:
        ValueError: split is none of these.
        FileNotFoundError: this Python has no standard library in source form.
    """
    check_choice("stdlib_text", "split", split, SPLITS)
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        if _in_split(name, parts, split) and (text := _read(path)).strip():
            found.append((name, text))
    if not found:
        raise FileNotFoundError(f"stdlib_text: no .py files of the standard library under {root}")
    return sorted(found)


def _in_split(name: str, parts: tuple[str, ...], split: str) -> bool:
    if _SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[0].startswith(
        ("config-", "_sysconfigdata")
    ):
        return False
    if any(name == table or name.startswith(table + ".") for table in _SKIPPED_TABLES):
        return False
    if split == "calibration":
        return parts[0] in CALIBRATION
    return (parts[0] in HELD_OUT) == (split == "heldout")


def _read(path: Path) -> str:
    """The text in the encoding that the file declares (PEP 263), newlines as `\\n`."""
    with tokenize.open(path) as file:
        return file.read()
