"""The command `genaiperf`. Commands import torch only when they run, so that --help is quick."""

import signal
import sys
from typing import Annotated

import typer

from . import bench, checkpoint, compress, demo, distill, doctor, plan, report, tune

app = typer.Typer(
    name="genaiperf",
    help="Compress language models and compare the result with the original, side by side.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.command)
app.command("compress")(compress.command)
app.command("plan")(plan.command)
app.add_typer(distill.app, name="distill")
app.command("convert")(checkpoint.convert)
app.command("validate")(checkpoint.validate)
app.command("pack-sparse")(checkpoint.pack_sparse)
app.command("doctor")(doctor.command)
app.add_typer(bench.app, name="bench")
app.command("report")(report.command)
app.command("tune")(tune.command)


def main() -> None:
    # A polite kill ends like an exception, so that working folders are removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app()


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from .._version import __version__

        typer.echo(f"genaiperf {__version__}")
        raise typer.Exit
