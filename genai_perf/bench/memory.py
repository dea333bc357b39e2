"""Peak resident memory of a piece of work, each in a process of its own.

A process that has loaded one model never gives all of its memory back, so a second model measured
in it reads too high. Starting Python anew for each costs the imports again (about 4 s for torch and
transformers). Here one server process imports the modules and nothing else; every measurement runs
in a fork of it, and the kernel reports the peak of that fork (`ru_maxrss` from `wait4`).

What the peak counts: every resident page of the fork: the interpreter and what it touched of the
libraries, mapped weight files, and what the work allocated; Linux counts it to within about 100
pages. `baseline_rss_bytes` is the same fork just before the work begins; it is reported beside the
peak and not subtracted from it.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path(__file__).resolve().parents[2]
# ru_maxrss is in KiB on Linux and in bytes on macOS.
_MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Usage:
    """What one piece of work returned, and its memory in bytes."""

    value: object
    peak_rss_bytes: int
    baseline_rss_bytes: int


class FreshProcesses:
    """Runs functions, each in a fresh fork of one server process that has done only imports.

    Args:
        preload: modules that the server imports once.
        path: folders put on the server's module search path.

    Use it in a `with` statement; leaving it ends the server and whatever still runs in it.
    """

    def __init__(self, preload: Sequence[str] = (), path: Sequence[Path] = ()):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        folders = [str(folder) for folder in (_ROOT, *path)]
        code = (f"import sys; sys.path[:0] = {folders!r}; "
                f"from genai_perf.bench.memory import serve; serve({list(preload)!r})")  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # so that one killpg ends the server with its forks
        )

    def __enter__(self) -> "FreshProcesses":
        return self

    def __exit__(self, *exc_info) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()
        self._errors.close()

    def run(self, target: str, arguments: dict) -> Usage:
        """Call `target` ("package.module:function") with `arguments` (JSON values) by keyword.

        Returns:
            Usage: `value` is what the function returned (a JSON value).

        Raises:
            RuntimeError: the function raised, or its process was killed; says which.
        """
        heard = self._errors.seek(0, os.SEEK_END)
        try:
            self._server.stdin.write(json.dumps({"target": target, "arguments": arguments}) + "\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            pass  # the empty answer below says why
        line = self._server.stdout.readline()
        answer = json.loads(line) if line else {"status": "ended before it answered"}
        if answer["status"]:
            raise RuntimeError(f"{target} {answer['status']}: {self._last_words(heard)}")
        return Usage(answer["value"], answer["peak"] * _MAXRSS_UNIT, answer["baseline"])

    def _last_words(self, heard: int) -> str:
        """The last line on stderr after position `heard`."""
        self._errors.seek(heard)
        return next((s for s in reversed(self._errors.read().splitlines()) if s.strip()), "no word")


def serve(preload: Sequence[str]) -> None:
    """The server's loop: one JSON request a line in, one JSON answer a line out, until the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the work prints must not land between the answers
    for name in preload:
        importlib.import_module(name)
    for line in sys.stdin:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(json.loads(line), writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            sent = pipe.read()
        _, status, usage = os.wait4(pid, 0)
        answer = {"status": _outcome(status), "peak": usage.ru_maxrss}
        answers.write(json.dumps(answer | (json.loads(sent) if sent else {})) + "\n")
        answers.flush()


def _work(request: dict, writer: int) -> None:
    """In the fork. An exception goes up to the interpreter, which prints it and exits with 1."""
    module, function = request["target"].split(":")
    call = getattr(importlib.import_module(module), function)
    baseline = psutil.Process().memory_info().rss
    value = call(**request["arguments"])
    with os.fdopen(writer, "w") as pipe:
        json.dump({"value": value, "baseline": baseline}, pipe)
    os._exit(0)


def _outcome(status: int) -> str | None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}" if code else None
