"""genaiperf bench: list, run, compare, matrix, train.

Exit codes: 0 nothing is slower, 1 something is slower or wrong, 2 no answer: undecided, or the
command could not run.
"""

from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.numbers import figures, human_bytes
from .console import Stages, user_errors

app = typer.Typer(
    help="Measure ops, models and training side by side, with verdicts. Exit code 0: nothing is "
    "slower; 1: something is slower or wrong; 2: no answer.",
    no_args_is_help=True,
)

Case = Annotated[list[str] | None, typer.Option(help="Name or pattern, repeated; else all.")]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Peers, comma-separated or repeated, or all; the first is the baseline."),
]
Dtype = Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16; repeated.")]
Out = Annotated[
    Path | None, typer.Option(help="Result file; else results/<date>-<device>-<commit>.json.")
]
Budget = Annotated[float, typer.Option(help="Seconds for the rounds of one row, at most.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or neuron.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Else as torch has them.")]
Quick = Annotated[bool, typer.Option("--quick", help="The headline cases only.")]


@app.command("list")
def list_command(
    op: Annotated[str | None, typer.Argument(help="An op; else all, without their cases.")] = None,
) -> None:
    """What can be measured: ops, cases, phases, backends, and peers with what they lack."""
    with user_errors():
        from ..bench import peers
        from ..bench.suites import SUITES, suite

        console = Console()
        for name in [op] if op else SUITES:
            room = suite(name)
            cases = room.cases()
            console.print(f"[bold]{name}[/]: {len(cases)} cases; {', '.join(room.PHASES)}; "
                          f"backends {', '.join(room.BACKENDS)}")  # fmt: skip
            for variant, peer in peers.variants(name).items():
                reason = peers.why_not(peer, "cpu")
                said = "[green]ready on the CPU[/]" if reason is None else escape(reason)
                default = ", the baseline" if variant == room.BASELINE else ""
                console.print(f"  against {variant}{default}: {said}", highlight=False)
            for case in cases if op else ():
                mark = ", headline" if case in room.HEADLINE else ""
                console.print(f"  case {escape(case)}{mark}", highlight=False)


@app.command("run")
def run_command(
    op: Annotated[str, typer.Argument(help="An op, `all`, or `model` (with --model).")],
    case: Case = None,
    against: Against = None,
    dtype: Dtype = None,
    phase: Annotated[list[str] | None, typer.Option(help="Else the op's first; `all`.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Own backends; else the chosen.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint folder; repeated: compared with the first."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes of a model.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Prompt lengths of a model.")] = None,
    quick: Quick = False,
    hot: Annotated[bool, typer.Option("--hot", help="Hot caches, not cold ones.")] = False,
    device: Device = "cpu",
    timer: Annotated[str | None, typer.Option(help="cpu, cuda-events, cuda-graph, neuron.")] = None,
    budget: Budget = 15.0,
    total: Annotated[
        float | None, typer.Option(help="Seconds in all; rows left out are named.")
    ] = None,
    threads: Threads = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep the threads on as many cores.")] = False,
    memory: Annotated[bool, typer.Option(help="Memory in fresh processes.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Exit 1 where ours is slower, 2 where undecided.")
    ] = False,
    out: Out = None,
) -> None:
    """Measure cases of an op against peers, or whole models."""
    with user_errors():
        from ..bench import results, runner
        from ..bench.suites import SUITES, suite

        settings = runner.Settings(device=device, cache="hot" if hot else "cold", timer=timer,
                                   budget_seconds=budget, memory=memory, threads=threads, pin=pin,
                                   quick=quick, total_seconds=total)  # fmt: skip
        if op == "model" or model:
            report = _models(model, batch, length, settings)
            _finish(report, out, None)
            _show_models(report["models"], Console())
            return
        chosen = []
        for name in SUITES if op == "all" else [op]:
            phases = tuple(suite(name).PHASES) if phase == ["all"] else tuple(phase or ())
            chosen.append(runner.Selection(name, tuple(case or ()), phases, tuple(dtype or ()),
                                           _split(against), tuple(backend or ())))  # fmt: skip
        for one in chosen:
            runner.select(one, quick)
        partial = (out or Path("results/partial.json")).with_suffix(".samples.jsonl")
        with Stages() as stages:
            report = runner.run(chosen, settings, samples=partial, progress=stages.update)
        path = _finish(report, out, partial)
        _show_rows(report["rows"], Console())
        for name in report["left_out"]:
            typer.echo(f"left out, no time: {name}")
        typer.echo(f"\n{path}\n{results.samples_path(path)}")
        raise typer.Exit(_exit_code(report["rows"], check))


def _split(values: list[str] | None) -> tuple[str, ...]:
    return tuple(name for value in values or () for name in value.split(",") if name)


def _finish(report: dict, out: Path | None, samples: Path | None) -> Path:
    from ..bench import results

    path = out or Path("results") / results.file_name(report["created"], report["provenance"])
    results.write(path, report)
    if samples is not None and samples != results.samples_path(path):
        samples.replace(results.samples_path(path))
    return path


def _exit_code(rows: list[dict], check: bool) -> int:
    from ..bench.verdict import Verdict, exit_code

    if any(v["own"] and v["status"] in ("failed", "error") for r in rows for v in r["variants"]):
        return 1
    if not check:
        return 0
    return exit_code([Verdict(pair["verdict"]) for row in rows for pair in row["comparisons"]])


def _show_rows(rows: list[dict], console: Console) -> None:
    """A line with the case, then one for each variant: fits into 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column("variant", overflow="fold", min_width=16)
    for heading in ("ms", "of the\nbound", "bytes\n/ floor", "error"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=6)
    table.add_column("ours against it,\n99 % interval", overflow="fold", min_width=24)
    for row in rows:
        words = [escape(row["case"]), row["phase"], "hot" if row["cache"] == "hot" else ""]
        table.add_row(f"[bold]{' '.join(words).strip()}[/]")
        for variant in row["variants"]:
            table.add_row(*_cells(variant, row))
        table.add_row()
    console.print(table)


def _cells(variant: dict, row: dict) -> list[str]:
    name = f"  [cyan]{variant['name']}[/]" if variant["own"] else f"  {variant['name']}"
    if variant["status"] != "ok":
        return [name, "-", "", "", "", f"{variant['status']}: {escape(variant['reason'] or '')}"]
    memory = variant["memory"] or {}
    over = memory.get("over_floor")
    said = [
        verdict_words(pair) for pair in row["comparisons"] if pair["baseline"] == variant["name"]
    ]
    return [
        name,
        figures(1e3 * variant["median"]),
        f"{variant['share_of_bound']:.0%}",
        figures(over) if over is not None else "",
        f"{variant['error']:.1e}",
        "; ".join(said),
    ]


def verdict_words(pair: dict) -> str:
    """`faster 2.31x [2.25, 2.40]`: speed of the candidate over the baseline."""
    low, high = (figures(1 / pair[name]) for name in ("high", "low"))
    return f"{pair['verdict']} {figures(1 / pair['ratio'])}x [{low}, {high}]"


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json")],
    after: Annotated[Path, typer.Argument(metavar="B.json")],
    peers: Annotated[bool, typer.Option("--peers", help="The peers' variants too.")] = False,
) -> None:
    """Compare two result files; exit 1 if something became slower or failed."""
    with user_errors():
        from ..bench import results
        from ..bench.compare_files import compare_files
        from ..bench.verdict import exit_code

        loaded = [results.load(path) for path in (before, after)]
        for path, report in zip((before, after), loaded, strict=True):
            if report["kind"] != "bench":
                raise ValueError(f"{path}: kind must be 'bench' to be compared, got "
                                 f"{report['kind']!r}")  # fmt: skip
        changes = compare_files(*loaded, peers=peers)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("case", "variant", "verdict", "time B / A", "why"):
            table.add_column(heading)
        for one in changes:
            pair = one.pair
            ratio = "" if pair is None else f"{pair.ratio:.3f} [{pair.low:.3f}, {pair.high:.3f}]"
            by = f"; over {one.against}" if one.against else ""
            table.add_row(escape(" ".join(one.row[:3])), one.variant, str(one.verdict), ratio,
                          escape(one.reason + by))  # fmt: skip
        Console().print(table)
        raise typer.Exit(exit_code([one.verdict for one in changes]))


@app.command("matrix")
def matrix_command(out: Out = None, budget: Budget = 2.0, threads: Threads = None) -> None:
    """Every op on every own backend and device of this machine: time of one case, or why not."""
    with user_errors():
        import torch

        from ..bench import runner
        from ..bench.suites import SUITES, suite

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("op", "case", "backend", "device", "ms", "or why not"):
            table.add_column(heading)
        reports = []
        with Stages() as stages:
            for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
                settings = runner.Settings(device=device, budget_seconds=budget, memory=False,
                                           threads=threads)  # fmt: skip
                chosen = [
                    runner.Selection(
                        op, (suite(op).HEADLINE[0],), backends=tuple(suite(op).BACKENDS)
                    )
                    for op in SUITES
                ]
                reports.append(runner.run(chosen, settings, progress=stages.update))
        rows = [row for report in reports for row in report["rows"]]
        for row in rows:
            for variant in (v for v in row["variants"] if v["own"]):
                time = figures(1e3 * median(variant["seconds"])) if variant["seconds"] else ""
                table.add_row(row["op"], row["case"], variant["name"], row["device"], time,
                              escape(variant["reason"] or ""))  # fmt: skip
        Console().print(table)
        if out:
            reports[0]["rows"] = rows
            _finish(reports[0], out, None)
            typer.echo(str(out))


@app.command("train")
def train_command(
    model: Annotated[
        Path | None, typer.Option(help="A dense checkpoint folder; else the embedded model.")
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="A way by name, repeated; else all.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples an optimizer step.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sample.")] = 128,
    steps: Annotated[int, typer.Option(min=2, help="The first is not timed.")] = 4,
    device: Device = "cpu",
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Compare the ways to fit training on one device: samples/s and peak memory of each."""
    with user_errors():
        from ..bench import runner, training
        from ..models import tiny_python_lm

        work = training.Work(batch=batch, micro=max(1, batch // 4), length=length, steps=steps)
        settings = runner.Settings(device=device, threads=threads)
        with Stages() as stages:
            report = training.run(model or tiny_python_lm(), settings, work=work,
                                  ways=tuple(way or ()), progress=stages.update)  # fmt: skip
        path = _finish(report, out, None)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
        table.add_column("way")
        for heading in ("samples/s", "peak\nmemory", "loss"):
            table.add_column(heading, justify="right")
        for row in report["training"]:
            if row["status"] == "ok":
                table.add_row(row["name"], figures(row["samples_per_s"]),
                              human_bytes(row["peak_bytes"]), f"{row['loss']:.3f}")  # fmt: skip
            else:
                table.add_row(row["name"], "-", "-", f"{row['status']}: {escape(row['reason'])}")
        Console().print(table)
        typer.echo(str(path))


def _models(folders, batch, length, settings) -> dict:
    from ..bench import models

    if not folders:
        raise ValueError("bench run model: --model must name a checkpoint folder")
    with Stages() as stages:
        return models.run(folders, settings, batches=tuple(batch or ()),
                          lengths=tuple(length or ()), progress=stages.update)  # fmt: skip


def _show_models(found: list[dict], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in ("model", "batch", "length"):
        table.add_column(heading)
    for heading in ("prefill\ntok/s", "decode\ntok/s", "first\ntoken ms", "train\nms", "MFU",
                    "peak\nmemory", "decode against the first"):  # fmt: skip
        table.add_column(heading, justify="right")
    for row in found:
        if row["status"] != "ok":
            table.add_row(row["variant"], str(row["batch"]), str(row["length"]),
                          f"{row['status']}: {escape(row['reason'] or '')}")  # fmt: skip
            continue
        mfu = row["mfu"]
        table.add_row(
            row["variant"], str(row["batch"]), str(row["length"]),
            figures(row["prefill_tokens_per_s"]), figures(row["decode_tokens_per_s"]),
            figures(1e3 * row["first_token_seconds"]),
            figures(1e3 * row["train_step_seconds"]) if row["train_step_seconds"] else "-",
            f"{mfu:.0%}" if mfu else "-", human_bytes(row["peak_bytes"]),
            verdict_words(row["decode"]) if row["decode"] else "",
        )  # fmt: skip
    console.print(table)
