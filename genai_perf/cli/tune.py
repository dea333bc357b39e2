"""genaiperf tune: search Triton configurations on this GPU."""

from pathlib import Path
from typing import Annotated

import typer

from .console import Stages, user_errors


def command(
    op: Annotated[str, typer.Argument(help="An op with Triton kernels.")],
    case: Annotated[list[str] | None, typer.Option(help="Case, repeated; else bfloat16's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table; else where the kernels look.")
    ] = None,
) -> None:
    """Search Triton configurations on this GPU and write tuned/<device>.json."""
    with user_errors():
        from ..bench import tune

        with Stages() as stages:
            path = tune.tune(op, cases=tuple(case or ()), folder=out, progress=stages.update)
        typer.echo(str(path))
