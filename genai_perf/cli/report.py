"""genaiperf report: result files as one page, a table or a picture."""

from pathlib import Path
from typing import Annotated

import typer

from .console import need, user_errors


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Result files, any kind.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Ends in .html, .csv, .md or .png.")
    ] = Path("report.html"),
) -> None:
    """Show result files: a self-contained page, or CSV, Markdown or PNG by the ending of --out."""
    with user_errors():
        from ..bench import page

        needed = {".html": "jinja2", ".png": "matplotlib"}.get(out.suffix)
        if needed:
            need("report", needed)
        page.write(files, out)
        typer.echo(str(out))
