"""What `genaiperf bench` prints: tables that fit into 80 columns."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench.numbers import figures, human_bytes


def verdict_words(pair: dict) -> str:
    """`faster 2.31x [2.25, 2.40]`: speed of the candidate over the baseline."""
    low, high = (figures(1 / pair[name]) for name in ("high", "low"))
    return f"{pair['verdict']} {figures(1 / pair['ratio'])}x [{low}, {high}]"


def show_rows(rows: list[dict], console: Console) -> None:
    """A line that names the case, then one for each variant."""
    headings = ("variant", "ms", "of the\nbound", "bytes\n/ floor", "error", "ours against it\n"
                "[99 % interval]")  # fmt: skip
    for i, row in enumerate(rows):
        words = [row["op"], row["case"], row["phase"], "hot" if row["cache"] == "hot" else ""]
        table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True,
                      show_header=i == 0)  # fmt: skip
        table.add_column(headings[0], overflow="fold", width=18)
        for heading, width in zip(headings[1:5], (7, 6, 7, 7), strict=True):
            table.add_column(heading, justify="right", no_wrap=True, width=width)
        table.add_column(headings[5], overflow="fold", width=29)
        for variant in row["variants"]:
            table.add_row(*_cells(variant, row))
        console.print(f"[bold]{escape(' '.join(words).strip())}[/]", highlight=False)
        console.print(table)


def _cells(variant: dict, row: dict) -> list[str]:
    name = f"[cyan]{variant['name']}[/]" if variant["own"] else variant["name"]
    if variant["status"] != "ok":
        return [name, "-", "", "", "", f"{variant['status']}: {escape(variant['reason'] or '')}"]
    over = (variant["memory"] or {}).get("over_floor")
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


def show_matrix(rows: list[dict], console: Console) -> None:
    """Under each case the own variants: time, or why there is none."""
    for row in rows:
        words = (row["op"], row["case"], row["phase"], row["device"])
        table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
        table.add_column(width=14, no_wrap=True)
        table.add_column(width=11, justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for variant in (v for v in row["variants"] if v["own"]):
            time = f"{figures(1e3 * variant['median'])} ms" if variant["median"] else "-"
            table.add_row(variant["name"], time, escape(variant["reason"] or ""))
        console.print(f"[bold]{' '.join(words)}[/]", highlight=False)
        console.print(table)


def show_models(found: list[dict], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1), collapse_padding=True)
    table.add_column("model", overflow="fold", width=14)
    for heading in ("batch", "len", "prefill\ntok/s", "decode\ntok/s", "first\nms",
                    "peak\nmemory", "train\nms", "MFU", "peak in\ntraining"):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for row in found:
        name, size = row["variant"], [str(row["batch"]), str(row["length"])]
        if row["status"] != "ok":
            table.add_row(name, *size, row["status"])
            notes.append(f"{name}, batch {row['batch']}: {row['status']}: {row['reason']}")
            continue
        step, mfu = row["train_step_seconds"], row["mfu"]
        table.add_row(
            name, *size, figures(row["prefill_tokens_per_s"]), figures(row["decode_tokens_per_s"]),
            figures(1e3 * row["first_token_seconds"]), human_bytes(row["peak_bytes"]),
            figures(1e3 * step) if step else "-", f"{mfu:.0%}" if mfu else "-",
            human_bytes(row["train_peak_bytes"]) if step else "-",
        )  # fmt: skip
        if row["train_reason"]:
            notes.append(f"{name}, batch {row['batch']}: no training step: {row['train_reason']}")
        said = [f"{phase} {verdict_words(row[phase])}" for phase in ("prefill", "decode", "train")
                if row[phase]]  # fmt: skip
        if said:
            notes.append(f"{name}, batch {row['batch']}, length {row['length']}, against the "
                         f"first: {'; '.join(said)}")  # fmt: skip
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def show_training(found: list[dict], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("way", overflow="fold", min_width=20)
    for heading in ("samples/s", "peak\nmemory", "without\nimports", "loss"):
        table.add_column(heading, justify="right")
    table.add_column("or why not", overflow="fold")
    for row in found:
        if row["status"] == "ok":
            table.add_row(row["name"], figures(row["samples_per_s"]),
                          human_bytes(row["peak_bytes"]), human_bytes(row["own_bytes"]),
                          f"{row['loss']:.3f}")  # fmt: skip
        else:
            table.add_row(row["name"], "-", "-", "-", "-",
                          f"{row['status']}: {escape(row['reason'])}")  # fmt: skip
    console.print(table)
