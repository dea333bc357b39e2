"""genaiperf compress: a checkpoint folder in, a compressed one out."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .console import Stages, need, user_errors
from .torchrun import ranks


def command(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Dense checkpoint folder, Hugging Face format.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; must not exist.")
    ],
    recipe: Annotated[str, typer.Option(help="A name such as int4-gptq, or a YAML or JSON file.")],
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text, .txt, .json or .jsonl; else Python's standard library's source."),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            help="Text for the report's KL, top-1 agreement and perplexity; else modules "
            "of Python's standard library that the default calibration leaves "
            "out."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    max_seqlen: Annotated[
        int | None,
        typer.Option(help="Tokens in a window; else 2048, or what the model takes at most."),
    ] = None,
    int8: Annotated[
        str, typer.Option(help="Layout of int8 weights: int-quantized, or pack-quantized for vLLM.")
    ] = "int-quantized",
    activations: Annotated[
        str, typer.Option(help="Where layer inputs live: memory, or disk for files beside DST.")
    ] = "memory",
    pack_sparse: Annotated[
        bool,
        typer.Option("--pack-sparse", help="Write the pruned layers without their zeros, too."),
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop the finished blocks of an earlier run.")
    ] = False,
) -> None:
    """Compress a checkpoint, one decoder block in memory at a time.

    A run that was killed or interrupted goes on from its last finished block when the same command
    is given again. `torchrun --nproc-per-node N -m genai_perf compress ...` shares the calibration
    windows and each block's layers among N processes; all must see the same folders.
    """
    with user_errors("interrupted: the same command goes on from the last finished block"):
        need("hf", "transformers")
        import genai_perf as gp

        from .. import models

        chosen = gp.Recipe.of(recipe)
        steps = (*chosen.steps, *(step for _, those in chosen.rules for step in those))
        if pack_sparse and not any(step.kind == "prune" for step in steps):
            raise ValueError(f"--pack-sparse: recipe {chosen.name} prunes nothing")
        texts = _texts(calibration) if chosen.needs_calibration else None
        unseen = heldout or [text[:20_000] for _, text in models.stdlib_text("heldout")]
        if heldout is None and not any(source.glob("tokenizer*.json")):
            unseen = None  # no text can be read
        with ranks() as first:
            with Stages(quiet=not first) as stages:
                report = gp.compress(
                    source,
                    destination,
                    chosen,
                    calibration=texts,
                    max_seqlen=max_seqlen,
                    n_samples=samples,
                    int8=int8,
                    activations=activations,
                    restart=restart,
                    heldout=unseen,
                    progress=lambda done, total, what: stages.update("Blocks", done, total, what),
                )
            if first:
                Console().print(str(report), markup=False, highlight=False)
                typer.echo(f"{destination}: written")
                if pack_sparse:
                    typer.echo(str(gp.pack_sparse(destination)))
                _say_who_serves(destination)


def _say_who_serves(destination: Path) -> None:
    from .. import io

    for target in ("transformers", "vllm"):
        found = io.validate(destination, target)
        typer.echo(f"{target}: ok" if found.ok else f"{target}: will refuse it: {found.errors[0]}")


def _texts(calibration: Path | None) -> list[str]:
    from .texts import calibration_text

    text = calibration_text(calibration)
    if calibration is None:
        Console(stderr=True).print(
            f"no --calibration given: calibrating on {text.source}; text like what the model will "
            "read gives better results"
        )
    return list(text.documents)
