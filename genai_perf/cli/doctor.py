"""genaiperf doctor: what this machine has, which backends would run and why others would not."""

import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.resources import files
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.numbers import human_bytes


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    support_matrix: Annotated[
        bool, typer.Option("--support-matrix", help="Print only the op x backend matrix, Markdown.")
    ] = False,
) -> None:
    """State what this machine has and which backends would run, and why others would not."""
    if support_matrix:
        typer.echo(support_markdown(), nl=False)
        return
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _show(found, Console())


def examine() -> dict:
    """Everything doctor knows, as JSON values."""
    from .._backends import backends, native
    from ..bench.machine import commit, machine, versions
    from ..neuron.host import topology

    neuron = topology()
    return {
        "versions": versions(),
        "commit": commit(),
        "machine": machine().to_dict(),
        "neuron": neuron.to_dict() | {"summary": str(neuron)},
        "best_isa": None if native.unavailable() else native.lib().best_isa(),
        "backends": backends(),
        "calls": [
            {"call": name, "device": device, "backend": found.backend, "reasons": found.reasons}
            for name, device, found in _explanations()
        ],
    }


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _explanations() -> Iterator[tuple[str, str, object]]:
    """For each typical call on each device of this machine: what would run. Nothing is computed."""
    import genai_perf as gp

    for device in _devices():
        for name, call, arguments in _calls(device):
            yield name, device, gp.explain(call, *arguments)


def _calls(device: str) -> Iterator[tuple[str, Callable, tuple]]:
    import torch

    import genai_perf as gp

    from ..formats import FORMATS, sparse, sparse24
    from ..ops import optimizer_step

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.zeros(1, 16, 4, 64, dtype=dtype, device=device)
        yield f"attention, {str(dtype)[6:]}", gp.attention, (q, q, q)
        decode = partial(gp.decode_attention, cache_seqlens=16)
        yield f"decode_attention, {str(dtype)[6:]}", decode, (q[:, :1], q, q)
    weight = torch.ones(128, 256)
    x = torch.ones(1, 256, device=device)
    for fmt in FORMATS:
        packed = gp.quantize(weight, fmt, backend="reference").to(device)
        yield f"quantize, {fmt}", gp.quantize, (weight.to(device), fmt)
        yield f"dequantize, {fmt}", gp.dequantize, (packed,)
        if fmt != "dynamic8":  # a format of optimizer states: no kernel multiplies by it
            yield f"quant_matmul, {fmt}", gp.quant_matmul, (x, packed)
    pruned = torch.tensor([1.0, 0, 0, 1.0]).repeat(128, 64)
    yield "sparse_matmul, 2:4", gp.sparse_matmul, (x, sparse24.pack(pruned).to(device))
    yield "sparse_matmul, bitmask", gp.sparse_matmul, (x, sparse.pack(pruned).to(device))
    logits, head = torch.zeros(2, 16, device=device), torch.zeros(16, 8, device=device)
    yield "distill_loss, logits", gp.distill.distillation_loss, (logits, logits)
    fused = gp.distill.fused_linear_distillation_loss
    yield "distill_loss, fused with a head", fused, (logits[:, :8], head, logits[:, :8], head)
    p, codes = torch.zeros(256, device=device), torch.zeros(256, dtype=torch.uint8, device=device)
    adamw = partial(optimizer_step.adamw_step, step=1, lr=0.0)
    yield "optimizer_step, AdamW", adamw, (p, p, codes, codes, p[:1], p[:1])
    lion = partial(optimizer_step.lion_step, lr=0.0)
    yield "optimizer_step, Lion", lion, (p, p, codes, p[:1])


def _show(found: dict, console: Console) -> None:
    machine, versions = found["machine"], found["versions"]
    commit = f" at {found['commit'][:9]}" if found["commit"] else ""
    console.print(f"[bold]genaiperf {versions['genai_perf']}[/]{commit}, "
                  f"Python {versions['python']}, {machine['system']}\n")  # fmt: skip

    about = Table(box=None, show_header=False, padding=(0, 2))
    about.add_column(style="bold", no_wrap=True)
    about.add_column()
    quota = (
        f", limited to {machine['cpu_quota']:g} by its container" if machine["cpu_quota"] else ""
    )
    about.add_row("processor", f"{machine['cpu']}, {machine['cores_usable']} cores usable{quota}")
    about.add_row("flags", " ".join(machine["cpu_flags"]) or "unknown")
    if machine["isa"]:
        best = "" if machine["isa"] == found["best_isa"] else f" (best: {found['best_isa']})"
        about.add_row("kernels use", f"{machine['isa']}{best}, {machine['torch_threads']} threads")
    available = human_bytes(machine["memory_available_bytes"])
    about.add_row("memory", f"{human_bytes(machine['memory_bytes'])}, {available} available")
    gpus = [f"{g['name']}, {human_bytes(g['memory_bytes'])}, {g['capability']}"
            for g in machine["gpus"]]  # fmt: skip
    about.add_row("GPUs", "; ".join(gpus) or "none that torch sees")
    about.add_row("Neuron", found["neuron"]["summary"])
    about.add_row("nvcc", machine["nvcc"] or "not found")
    packages = [f"{k} {v}" for k, v in versions.items() if v and k not in ("genai_perf", "python")]
    about.add_row("packages", ", ".join(packages))
    missing = [name for name, number in versions.items() if number is None]
    if missing:
        about.add_row("not installed", ", ".join(missing))
    console.print(about)

    console.print("\n[bold]Backends[/]")
    for name, reason in found["backends"].items():
        said = "[green]ready[/]" if reason is None else f"no: {escape(reason)}"
        console.print(f"  {name:<10} {said}")

    table = Table(title="\nWhat a call would run", title_justify="left", title_style="bold")
    for heading in ("call", "device", "runs", "why not the others"):
        table.add_column(heading)
    for calls, device, backend, why in _grouped(found["calls"]):
        table.add_row(calls, device, backend, escape(why))
    console.print(table)


def _grouped(calls: list[dict]) -> Iterator[tuple[str, str, str, str]]:
    """One row for all calls of an op that run the same for the same reasons."""
    groups: dict[tuple, list[str]] = {}
    for call in calls:
        op, _, what = call["call"].partition(", ")
        others = dict.fromkeys(reason for reason in call["reasons"].values() if reason)
        why = "; ".join(others) or "all could run"
        groups.setdefault((op, call["device"], call["backend"], why), []).append(what)
    for op in dict.fromkeys(key[0] for key in groups):
        for (name, device, backend, why), whats in groups.items():
            if name == op:
                yield f"{op}: {', '.join(whats)}", device, backend, why


# --- the support matrix -------------------------------------------------------------------------


def registry() -> dict[str, tuple[str, ...]]:
    """Every registered op and its backends in order of preference, by package in OPS' order."""
    from .._dispatch import Op
    from ..ops import OPS

    found = {}
    for name in OPS:
        package = f"genai_perf.ops.{name}"
        import_module(package)
        inside = [m for key, m in sys.modules.items() if f"{key}.".startswith(f"{package}.")]
        for value in (value for module in inside for value in vars(module).values()):
            if isinstance(value, Op):
                found[value.name] = value.backends
    return found


def support() -> dict[str, dict[str, dict[str, str]]]:
    """support.toml: op -> backend -> where it runs and how that was proven."""
    return tomllib.loads(files("genai_perf").joinpath("support.toml").read_text(encoding="utf-8"))


def support_markdown() -> str:
    """The matrix of every op and backend in the registry, with its entry in support.toml.

    Raises:
        ValueError: registry and file disagree; names the entries.
    """
    ops, entries = registry(), support()
    registered = {(op, backend) for op, names in ops.items() for backend in names}
    written = {(op, backend) for op, names in entries.items() for backend in names}
    if registered != written:
        missing = ", ".join(f"[{op}.{b}]" for op, b in sorted(registered - written)) or "nothing"
        unknown = ", ".join(f"[{op}.{b}]" for op, b in sorted(written - registered)) or "nothing"
        raise ValueError(f"support.toml lacks {missing}, and has {unknown} that is not registered")
    lines = ["| op | backend | device | types | proven by |", "|---|---|---|---|---|"]
    for op, names in ops.items():
        for backend in names:
            entry = entries[op][backend]
            lines.append(f"| {op} | {backend} | {entry['device']} | {entry['types']} | "
                         f"{entry['proven']} |")  # fmt: skip
    return "\n".join(lines) + "\n"
