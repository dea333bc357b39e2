"""genaiperf distill: a smaller or compressed model learns from a larger one."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import Stages, need, user_errors

app = typer.Typer(help="Train a student on what its teacher predicts.", add_completion=False)

TextFile = Annotated[
    Path | None, typer.Option(help="Training text, .txt, .json or .jsonl; else Python's library.")
]


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; else the embedded model.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the student and its curve.")] = None,
    student: Annotated[Path | None, typer.Option(help="Checkpoint folder to start from.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="config.json of an untrained student.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the teacher to keep.")] = None,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Channels of the teacher's MLPs to keep.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="A teacher cache, instead of the teacher itself.")
    ] = None,
    process_top_k: Annotated[
        int | None, typer.Option(help="Teacher in a process of its own: tokens to take of it.")
    ] = None,
    text: TextFile = None,
    held_out: Annotated[Path | None, typer.Option(help="Text for the held-out loss.")] = None,
    kind: Annotated[str, typer.Option(help="Divergence.")] = "forward_kl",
    temperature: float = 1.0,
    alpha: Annotated[float, typer.Option(help="Weight of the labels, 0 to 1.")] = 0.0,
    beta: Annotated[float | None, typer.Option(help="Of jsd and the skew divergences.")] = None,
    on_policy: Annotated[
        float, typer.Option(help="Share of batches that the student writes itself.")
    ] = 0.0,
    prompt_tokens: int = 32,
    steps: int = 200,
    batch: int = 8,
    accumulate: int = 1,
    seqlen: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    save_every: int = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with OUT.")] = False,
) -> None:
    """Train a student on what its teacher predicts; OUT/model is a checkpoint folder."""
    if context.invoked_subcommand is not None:
        return
    with user_errors():
        need("hf", "transformers", "accelerate")
        if out is None:
            raise ValueError("distill: --out must name the folder to write")
        from ..bench.curves import curves
        from ..distill import DistillationSettings
        from ..integrations.distillation import Schedule, distill
        from ..models import tiny_python_lm

        if teacher is None and (student is None or cache is None):
            teacher = tiny_python_lm()
        training, measured = _texts(text, held_out)
        settings = DistillationSettings(
            kind=kind, temperature=temperature, alpha=alpha, beta=beta, on_policy=on_policy,
            prompt_tokens=prompt_tokens,
        )  # fmt: skip
        schedule = Schedule(steps=steps, batch=batch, accumulate=accumulate, seqlen=seqlen, lr=lr,
                            seed=seed, save_every=save_every)  # fmt: skip
        with Stages() as stages:
            record = distill(
                teacher, out, training, measured, student=student, config=config, layers=layers,
                intermediate_size=intermediate_size, cache=cache, process_top_k=process_top_k,
                settings=settings, schedule=schedule, resume=resume,
                progress=lambda done, total, what: stages.update("Steps", done, total, what),
            )  # fmt: skip
        points = record["curve"]
        series = {name: [(p["step"], p[name]) for p in points if name in p]
                  for name in ("loss", "teacher", "labels", "held_out")}  # fmt: skip
        (out / "loss.svg").write_text(curves(series, title="loss in nats per token, over steps"),
                                      encoding="utf-8")  # fmt: skip
        first, last = series["held_out"][0][1], series["held_out"][-1][1]
        typer.echo(f"held-out loss {first:.4f} -> {last:.4f} nats per token")
        typer.echo(f"{out / 'model'}: the student\n{out / 'loss.svg'}: the curve")


@app.command("cache")
def cache(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Checkpoint folder.")],
    text: Annotated[Path, typer.Argument(metavar="TEXT", help="Text, .txt, .json or .jsonl.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the cache.")],
    top_k: Annotated[int, typer.Option(help="Tokens kept at each position.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of the teacher's softmax.")] = 1.0,
    limit: Annotated[int | None, typer.Option(help="Windows at most.")] = None,
    batch: Annotated[int, typer.Option(help="Windows a call of the teacher.")] = 8,
) -> None:
    """Write a teacher's top-k log-probabilities of a text; run again to go on after a stop."""
    with user_errors():
        need("hf", "transformers")
        from ..compression.calibration import read_texts
        from ..distill import cache_teacher

        with Stages() as stages:
            made = cache_teacher(
                teacher, read_texts(text), out, top_k=top_k, seqlen=seqlen,
                temperature=temperature, limit=limit, batch=batch,
                progress=lambda done, total: stages.update("Windows", done, total),
            )  # fmt: skip
        nbytes = sum(file.stat().st_size for file in out.iterdir())
        typer.echo(f"{out}: {len(made)} windows of {made.identity.seqlen} tokens, top "
                   f"{made.identity.k}, {nbytes / 1e6:.1f} MB")  # fmt: skip


def _texts(text: Path | None, held_out: Path | None) -> tuple[list[str], list[str]]:
    """Training and held-out text; the last tenth of the training text where none is held out."""
    from ..compression.calibration import read_texts
    from ..models import stdlib_text

    if text is None:
        training = [one for _, one in stdlib_text("train")]
        known = [one for _, one in stdlib_text("heldout")]
        Console(stderr=True).print("no --text given: Python's standard library")
    else:
        whole = "\n".join(read_texts(text))
        cut = len(whole) if held_out is not None else len(whole) * 9 // 10
        training, known = [whole[:cut]], [whole[cut:]]
    return training, read_texts(held_out) if held_out is not None else known
