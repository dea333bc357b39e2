"""genaiperf demo: a real model compressed several ways, each compared with the original."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from ..bench.captions import SMALL
from ..bench.numbers import figures, percent
from .console import Stages, need, user_errors


def command(
    model: Annotated[
        Path | None,
        typer.Option(help="A local Hugging Face checkpoint folder; else the embedded model."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and report.html.")] = Path(
        "demo-out"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer windows and rounds: a look, not a measurement.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Calibration text, .txt or .jsonl; else Python's standard library."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Text for perplexity, .txt or .jsonl; else held-out modules of it."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; else one for each core that is free.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the compressed checkpoints, in OUT/models.")
    ] = False,
) -> None:
    """Compress a model several ways and compare each with the original, side by side."""
    with user_errors():
        need("demo", "transformers", "jinja2")
        report = _run(model, out, quick, calibration, evaluation, threads, keep)
        _show(report, Console())
        typer.echo(f"\n{out / 'report.json'}\n{out / 'report.html'}")
        if keep:
            typer.echo(f"{out / 'models'}: the compressed checkpoints")


def _run(model: Path | None, out: Path, quick: bool, calibration: Path | None,
         evaluation: Path | None, threads: int | None, keep: bool) -> dict:  # fmt: skip
    """Measure, then write both files; until then an earlier report stays as it is."""
    from ..bench import report_html, schema
    from ..bench.side_by_side import Settings, measure
    from ..models import tiny_python_lm
    from .texts import demo_texts

    known, measured = demo_texts(calibration, evaluation, embedded=model is None)
    with _folder(out) as work, Stages() as stages:
        report = measure(
            model or tiny_python_lm(),
            work,
            calibration=known,
            evaluation=measured,
            settings=replace(Settings.quick() if quick else Settings(), threads=threads),
            progress=stages.update,
        )
        page = report_html.render(report)
        if keep:
            shutil.rmtree(out / "models", ignore_errors=True)
            work.rename(out / "models")
        schema.write(out / "report.json", report)
        schema.write_text(out / "report.html", page)
    return report


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A working folder inside of `out`, gone afterwards, as is `out` if it is new and empty."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; --out must name a folder")
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=out, prefix=".work-", ignore_cleanup_errors=True) as w:
            work = Path(w) / "models"
            work.mkdir()
            yield work
    finally:
        if new and not any(out.iterdir()):
            out.rmdir()


def _show(report: dict, console: Console) -> None:
    console.print(_variants_table(report))
    console.print(_layer_table(report["layer"]))
    if busy := report["settings"]["busy"]:
        console.print(f"\n[yellow]{busy}[/]")
    if report["model"]["parameters"] < SMALL:
        console.print(
            "\nDecoding a model this small is mostly framework overhead, which compression does\n"
            "not change; the layer shows the kernels at a realistic size."
        )


def _table(title: str) -> Table:
    """Narrow enough that the longest variant and seven numbers fit into 80 columns."""
    return Table(title=f"\n{title}", title_style="bold", title_justify="left", pad_edge=False,
                 box=box.SIMPLE_HEAD, padding=0, show_edge=False)  # fmt: skip


def _variants_table(report: dict) -> Table:
    dense = report["variants"][0]
    large = dense["bytes_on_disk"] >= 1e9
    unit, scale = ("GB", 1e9) if large else ("MB", 1e6)
    table = _table(f"{report['model']['name']} on {report['machine']['cpu']}")
    table.add_column("variant", style="bold", no_wrap=True)
    for heading in (
        f"{unit} on\ndisk", "times\nsmaller", "perplex-\nity", "against\ndense", "prefill\ntok/s",
        "decode\ntok/s", "memory\nMB",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["variants"]:
        finite = row["perplexity"] is not None and dense["perplexity"] is not None
        table.add_row(
            row["name"],
            figures(row["bytes_on_disk"] / scale),
            figures(dense["bytes_on_disk"] / row["bytes_on_disk"]),
            figures(row["perplexity"], 4),
            percent(row["perplexity"] / dense["perplexity"]) if finite and row is not dense else "",
            figures(row["prefill_tokens_per_s"]),
            figures(row["decode_tokens_per_s"]),
            figures(row["peak_rss_bytes"] / 1e6),
        )
    return table


def _layer_table(layer: dict) -> Table:
    counts = sorted({row["rows"] for row in layer["rows"]})
    size = f"{layer['out_features']} x {layer['in_features']}"
    table = _table(f"One {size} layer: ms, and speed over dense float32")
    table.add_column("weights", style="bold")
    for count in counts:
        table.add_column(f"{count} row{'s' if count > 1 else ''}", justify="right")
        table.add_column("speed", justify="right")
    for name in dict.fromkeys(row["name"] for row in layer["rows"]):
        cells = []
        for count in counts:
            found = [r for r in layer["rows"] if (r["name"], r["rows"]) == (name, count)]
            cells += _layer_cells(found[0]) if found else ["failed", "its check"]
        table.add_row(name, *cells)
    return table


def _layer_cells(row: dict) -> list[str]:
    return [figures(1000 * median(row["seconds"])), f"{1 / row['time_ratio']['ratio']:.2f}x"]
