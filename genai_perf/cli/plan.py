"""genaiperf plan: memory, disk and time of a compression or a training run, before it starts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .console import need, user_errors

# Whose words are whose.
_COMPRESS, _TRAIN = "Compression", "Training (with --train)"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Dense checkpoint folder.")],
    recipe: Annotated[
        str | None,
        typer.Option(help="As for genaiperf compress.", rich_help_panel=_COMPRESS),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows.", rich_help_panel=_COMPRESS)] = 128,
    max_seqlen: Annotated[
        int | None, typer.Option(help="Tokens in a window.", rich_help_panel=_COMPRESS)
    ] = None,
    activations: Annotated[
        str, typer.Option(help="memory or disk.", rich_help_panel=_COMPRESS)
    ] = "memory",
    train: Annotated[bool, typer.Option("--train", help="Plan a training step instead.")] = False,
    dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16.", rich_help_panel=_TRAIN)
    ] = "fp32",
    autocast: Annotated[
        bool, typer.Option("--autocast", help="fp32 weights, bf16 maths.", rich_help_panel=_TRAIN)
    ] = False,
    optimizer: Annotated[
        str,
        typer.Option(
            help="adamw, adamw8bit, lion, lion8bit, sgd or sgd-momentum.", rich_help_panel=_TRAIN
        ),
    ] = "adamw",
    batch: Annotated[int, typer.Option(help="Sequences.", rich_help_panel=_TRAIN)] = 1,
    seqlen: Annotated[int, typer.Option(help="Tokens.", rich_help_panel=_TRAIN)] = 2048,
    shards: Annotated[
        int, typer.Option(help="Devices that share weights and states.", rich_help_panel=_TRAIN)
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", rich_help_panel=_TRAIN)
    ] = False,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train LoRA.", rich_help_panel=_TRAIN)
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="With --lora: format of the frozen weights.", rich_help_panel=_TRAIN),
    ] = None,
) -> None:
    """Say what a compression, or with --train a training step, will take. Loads no weight."""
    with user_errors():
        need("hf", "transformers")
        if train == (recipe is not None):
            raise ValueError("plan: give --recipe for a compression, or --train")
        if train:
            from ..integrations.plan_train import plan_training

            plan = plan_training(
                source, dtype=dtype, autocast=autocast, optimizer=optimizer, batch=batch,
                seqlen=seqlen, shards=shards, gradient_checkpointing=gradient_checkpointing,
                lora_rank=lora, quantize=quantize,
            )  # fmt: skip
            trained, total = plan.trained
            rows = {
                "weights": plan.weights,
                "gradients": plan.gradients,
                "optimizer states": plan.optimizer,
                "blocks gathered": plan.gathered,
                "activations": plan.activations,
                "temporary": plan.temporary,
                "peak of a step": plan.peak,
                "peak while loading": plan.loading,
            }
            title = f"{total / 1e6:,.1f} M parameters, {trained / 1e6:,.1f} M trained; each device"
            _print(title, rows)
            return
        from ..integrations.plan_compress import plan_compression

        plan = plan_compression(
            source, recipe, n_samples=samples, max_seqlen=max_seqlen, activations=activations,
            n_heldout=4,  # as compress has it
        )  # fmt: skip
        rows = {
            **plan.parts,
            "peak memory, beside Python": plan.memory,
            "disk": plan.disk,
            "size before": plan.nbytes_before,
            "size after": plan.nbytes_after,
        }
        _print(f"{source.name} -> {recipe}, about {_minutes(plan.seconds)} on this machine", rows)


def _print(title: str, rows: dict[str, int]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(justify="right")
    for name, nbytes in rows.items():
        if nbytes:
            table.add_row(name, f"{nbytes / 1e6:,.1f} MB")
    Console().print(table)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
