"""What the commands share: where they print, how errors end, what a progress line looks like."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .._errors import BackendUnsupported


@contextmanager
def user_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """Bad input ends in one sentence and exit code 2; any other exception is a bug and is shown.

    CheckpointError and CalibrationError are ValueErrors. An OSError is a file that is missing,
    forbidden, or does not fit on the disk.
    """
    try:
        yield
    except (ValueError, OSError, BackendUnsupported) as error:
        sentence = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(sentence)}", soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        Console(stderr=True).print(interrupted)
        raise typer.Exit(130) from None


def need(extra: str, *modules: str) -> None:
    """Fail in one sentence if a module of an optional extra is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} not installed; run `pip install 'genaiperf[{extra}]'`"
        )


class Stages:
    """One progress line for each stage, with time left, on stderr; used in a `with` statement.
    `quiet` shows none."""

    def __init__(self, *, quiet: bool = False):
        self._bar = Progress(
            TextColumn("[bold]{task.description:<32}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[what]}"),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "Stages":
        self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.stop()

    def update(self, stage: str, done: int, total: int, what: str = "") -> None:
        """`done` of `total` of a stage, at work on `what`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, what="")
        self._bar.update(self._tasks[stage], completed=done, total=total, what=what)
