"""genaiperf convert, validate and pack-sparse: compressed checkpoints on their way to where they
run."""

from pathlib import Path
from typing import Annotated

import typer

from .console import user_errors

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Quantized checkpoint folder.")]


def convert(
    source: Source,
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to write; must not exist.")
    ],
    to: Annotated[
        str, typer.Option(help="compressed-tensors, gptq, gptq_v2, awq, bitsandbytes, dense.")
    ],
    int8: Annotated[
        str, typer.Option(help="Layout of int8 in compressed-tensors; vLLM needs pack-quantized.")
    ] = "int-quantized",
) -> None:
    """Write a quantized checkpoint in another dialect; codes and scales stay as they are."""
    with user_errors():
        from .. import io

        io.convert(source, destination, to, int8=int8)
        typer.echo(f"{destination}: written")


def validate(
    source: Source,
    target: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    tp: Annotated[int, typer.Option(help="Ranks of tensor parallelism.")] = 1,
) -> None:
    """Say whether a server will load a quantized checkpoint; exit code 1 where it will not."""
    with user_errors():
        from .. import io

        found = io.validate(source, target, tp=tp)
        typer.echo(str(found))
        if not found.ok:
            raise typer.Exit(1)


def pack_sparse(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Pruned checkpoint folder.")],
    layout: Annotated[
        str | None, typer.Option(help="2:4 or bitmask; else, for each layer, 2:4 where it fits.")
    ] = None,
) -> None:
    """Write the pruned layers of a checkpoint without their zeros, in a file beside the others."""
    with user_errors():
        from .. import io

        made = io.pack_sparse(source, layout=layout)
        typer.echo(str(made))
        for layer, reason in made.skipped.items():
            typer.echo(f"skipped {layer}: {reason}")
