"""genaiperf bench: list, run, compare, matrix, train.

Exit codes: 0 nothing is slower, 1 something is slower or wrong, 2 no answer: undecided, or the
command could not run.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import tables
from .console import Stages, user_errors

app = typer.Typer(
    help="Measure ops, models and training side by side, with verdicts. Exit code 0: nothing is "
    "slower; 1: something is slower or wrong; 2: no answer.",
    no_args_is_help=True,
)

Case = Annotated[list[str] | None, typer.Option(help="Names or patterns, as --against; else all.")]
Against = Annotated[
    list[str] | None,
    typer.Option(help="Peers, comma-separated or repeated, or all; the first is the baseline."),
]
Dtype = Annotated[list[str] | None, typer.Option(help="float32, bfloat16, float16.")]
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
        from ..bench.suites import SUITES, own_names, suite

        console = Console()
        for name in [op] if op else SUITES:
            room = suite(name)
            cases = room.cases()
            console.print(f"[bold]{name}[/]: {len(cases)} cases; {', '.join(room.PHASES)}; "
                          f"backends {', '.join(own_names(name))}")  # fmt: skip
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
        list[str] | None, typer.Option(help="Own backends, as --against; else the chosen.")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Checkpoint folder, whose shapes an op takes; `model`: repeated."),
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
    limit: Annotated[
        float | None, typer.Option(help="GB that a model's batch may take; else 80 % of the free.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of the inputs; else fresh, and in the file.")
    ] = None,
    out: Out = None,
) -> None:
    """Measure cases of an op against peers, or whole models."""
    with user_errors():
        from ..bench import results, runner
        from ..bench.suites import SUITES, suite

        settings = runner.Settings(device=device, cache="hot" if hot else "cold", timer=timer,
                                   budget_seconds=budget, memory=memory, threads=threads, pin=pin,
                                   quick=quick, total_seconds=total, seed=seed)  # fmt: skip
        if op == "model":
            report = _models(model, batch, length, limit, settings)
            _finish(report, out, None)
            tables.show_models(report["models"], Console())
            for what in report["left_out"]:
                typer.echo(f"left out, no time: {what}")
            return
        chosen = []
        for name in SUITES if op == "all" else [op]:
            phases = tuple(suite(name).PHASES) if phase == ["all"] else _split(phase)
            chosen.append(runner.Selection(
                name, _split(case), phases, _split(dtype), _split(against), _split(backend),
                _one(model)))  # fmt: skip
        for one in chosen:
            runner.select(one, quick)
        partial = (out or Path("results/partial.json")).with_suffix(".samples.jsonl")
        with Stages() as stages:
            report = runner.run(chosen, settings, samples=partial, progress=stages.update)
        path = _finish(report, out, partial)
        tables.show_rows(report["rows"], Console())
        for name in report["left_out"]:
            typer.echo(f"left out, no time: {name}")
        typer.echo(f"\n{path}\n{results.samples_path(path)}")
        raise typer.Exit(_exit_code(report["rows"], check))


def _one(folders: list[Path] | None) -> Path | None:
    if folders and len(folders) > 1:
        raise ValueError(f"bench run: --model must be one checkpoint for an op, got {len(folders)}")
    return folders[0] if folders else None


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
        from ..bench.suites import SUITES, own_names, suite

        reports = []
        with Stages() as stages:
            for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
                settings = runner.Settings(device=device, budget_seconds=budget, memory=False,
                                           threads=threads)  # fmt: skip
                chosen = [
                    runner.Selection(
                        op, (suite(op).HEADLINE[0],), suite(op).PHASES, backends=own_names(op)
                    )
                    for op in SUITES
                ]
                reports.append(runner.run(chosen, settings, progress=stages.update))
        rows = [row for report in reports for row in report["rows"]]
        tables.show_matrix(rows, Console())
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
        tables.show_training(report["training"], Console())
        typer.echo(str(path))


def _models(folders, batch, length, limit, settings) -> dict:
    from ..bench import models

    if not folders:
        raise ValueError("bench run model: --model must name a checkpoint folder")
    with Stages() as stages:
        return models.run(folders, settings, batches=tuple(batch or ()),
                          lengths=tuple(length or ()), progress=stages.update,
                          limit_bytes=int(limit * 1e9) if limit else None)  # fmt: skip
