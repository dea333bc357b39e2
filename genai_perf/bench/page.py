"""Results as one page, and as CSV, Markdown and PNG: `genaiperf report`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from .charts import SERIES, Mark, Roof, log_log, swatch
from .numbers import figures
from .plots import Point, scatter
from .report_html import family
from .results import load
from .templating import fill

FORMATS = (".html", ".csv", ".md", ".png")
_WIDE, _NARROW = (880, 430), (342, 360)
COLUMNS = ("file", "op", "case", "phase", "dtype", "device", "cache", "variant", "status", "ms",
           "share_of_bound", "bound_by", "tflops", "gb_per_s", "bytes_over_floor", "error",
           "numerics", "verdict", "speed", "speed_low", "speed_high", "against")  # fmt: skip


def read(paths: Sequence[Path]) -> dict[str, dict]:
    """Reports by file name.

    Raises:
        ValueError: no file, one that is not a result, or two of the same name.
    """
    if not paths:
        raise ValueError("report: FILES must name at least one result file")
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"report: FILES must differ in name, got {', '.join(names)}")
    return {path.name: load(path) for path in paths}


def write(paths: Sequence[Path], out: Path) -> None:
    """Write what the result files hold, in the format of `out`'s suffix.

    Raises:
        ValueError: another suffix than those of FORMATS; see `read`.
        ImportError: jinja2 (html) or matplotlib (png) is not installed.
    """
    from .schema import write_text

    if out.suffix not in FORMATS:
        raise ValueError(f"report: -o must end in {', '.join(FORMATS)}, got {out.name}")
    reports = read(paths)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        _png(reports, out)
    else:
        make = {".html": render, ".csv": to_csv, ".md": to_markdown}[out.suffix]
        write_text(out, make(reports))


def table(reports: Mapping[str, dict]) -> list[dict]:
    """One flat row for each variant of each case, with the columns COLUMNS.

    Of an own variant, verdict and speed are against the first peer; of a peer they are empty.
    """
    found = []
    for name, report in reports.items():
        for row in report.get("rows", ()):
            for variant in row["variants"]:
                pair = next((p for p in row["comparisons"] if p["candidate"] == variant["name"]),
                            None)  # fmt: skip
                middle = variant["median"]
                found.append({
                    "file": name,
                    **{k: row[k] for k in ("op", "case", "phase", "dtype", "device", "cache")},
                    "variant": variant["name"],
                    "own": variant["own"],
                    "status": variant["status"],
                    "reason": variant["reason"],
                    "ms": 1e3 * middle if middle else None,
                    "share_of_bound": variant["share_of_bound"],
                    "bound_by": row["bound"]["by"],
                    "tflops": row["flops"] / middle / 1e12 if middle else None,
                    "gb_per_s": row["floor_bytes"] / middle / 1e9 if middle else None,
                    "bytes_over_floor": (variant["memory"] or {}).get("over_floor"),
                    "error": variant["error"],
                    "numerics": variant["numerics"],
                    "verdict": pair["verdict"] if pair else None,
                    "speed": 1 / pair["ratio"] if pair else None,
                    "speed_low": 1 / pair["high"] if pair else None,
                    "speed_high": 1 / pair["low"] if pair else None,
                    "against": pair["baseline"] if pair else None,
                })  # fmt: skip
    return found


def to_csv(reports: Mapping[str, dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(reports))
    return text.getvalue()


def to_markdown(reports: Mapping[str, dict]) -> str:
    """A table an op, one line for each variant."""
    rows, out = table(reports), []
    for op in dict.fromkeys(row["op"] for row in rows):
        out += [f"## {op}", "", "| case | variant | ms | of the bound | bytes / floor | error | "
                "speed (99 % interval) |", "|---|---|---:|---:|---:|---:|---|"]  # fmt: skip
        for row in (row for row in rows if row["op"] == op):
            out.append(f"| {row['case']} {row['phase']} | {row['variant']} | "
                       + " | ".join(_cells(row)) + " |")  # fmt: skip
        out.append("")
    return "\n".join(out)


def _cells(row: dict) -> list[str]:
    if row["status"] != "ok":
        return ["", "", "", "", f"{row['status']}: {row['reason']}".replace("|", "/")]
    return [figures(row["ms"]), f"{row['share_of_bound']:.0%}", _or(row["bytes_over_floor"]),
            f"{row['error']:.1e}", speed_words(row)]  # fmt: skip


def _or(value: float | None) -> str:
    return "" if value is None else figures(value)


def speed_words(row: dict) -> str:
    if row["verdict"] is None:
        return ""
    return (f"{row['verdict']}: {figures(row['speed'])} x {row['against']} "
            f"[{figures(row['speed_low'])}, {figures(row['speed_high'])}]")  # fmt: skip


def render(reports: Mapping[str, dict]) -> str:
    """The page.

    Raises:
        ImportError: jinja2 is not installed.
    """
    rows = table(reports)
    return fill(
        "results.html",
        runs=[_about(name, report) for name, report in reports.items()],
        ops=[_op(op, [row for row in rows if row["op"] == op], reports)
             for op in dict.fromkeys(row["op"] for row in rows)],
        models=[(name, row) for name, report in reports.items()
                for row in report.get("models", ())],
        training=[(name, row) for name, report in reports.items()
                  for row in report.get("training", ())],
        pareto=[_pareto(name, report) for name, report in reports.items()
                if report["kind"] == "demo"],
        counts=_counts(rows),
        speed_words=speed_words,
    )  # fmt: skip


def _counts(rows: list[dict]) -> list[tuple[str, int]]:
    verdicts = [row["verdict"] for row in rows if row["verdict"]]
    found = [(name, verdicts.count(name)) for name in ("faster", "same", "slower", "undecided")]
    failed = sum(row["status"] not in ("ok", "skipped") for row in rows)
    return [(name, count) for name, count in [*found, ("failed", failed)] if count]


def _about(name: str, report: dict) -> dict:
    found = report.get("provenance") or report
    machine = found["machine"]
    busy = machine.get("cores_busy")
    return {
        "name": name,
        "kind": report["kind"],
        "created": report["created"][:16].replace("T", " "),
        "commit": (found.get("commit") or "no commit")[:8],
        "device": next((gpu["name"] for gpu in machine.get("gpus", ())), machine["cpu"]),
        "threads": machine["torch_threads"],
        "busy": busy,
        "versions": ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v),
        "peaks": report.get("peaks"),
    }


def _op(op: str, rows: list[dict], reports: Mapping[str, dict]) -> dict:
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    return {
        "name": op,
        "rows": rows,
        "legend": [(v, swatch(i)) for i, v in enumerate(variants)],
        "roofline": _roofline(op, variants, reports),
        "folded": len(variants) > SERIES,
    }


def _roofline(op: str, variants: list[str], reports: Mapping[str, dict]) -> dict[str, str] | None:
    """Flops a second against flops a byte of each timed variant, under the measured roofs."""
    marks, roofs = [], {}
    for name, report in reports.items():
        rows = [row for row in report.get("rows", ()) if row["op"] == op]
        for row, variant in ((r, v) for r in rows for v in r["variants"] if v["median"]):
            speed = row["flops"] / variant["median"]
            title = (f"{variant['name']}, {row['case']} {row['phase']}: {speed / 1e9:.3g} "
                     f"GFLOP/s, {variant['share_of_bound']:.0%} of the bound")  # fmt: skip
            marks.append(Mark(row["flops"] / row["floor_bytes"], speed,
                              variants.index(variant["name"]), title))  # fmt: skip
        if rows and (peak := report["peaks"]) is not None:
            moved = max(peak["read"], peak["copy"])
            kind, best = max(peak["matmul"].items(), key=lambda item: item[1])
            roofs[name] = Roof(f"{moved / 1e9:.3g} GB/s, {best / 1e9:.3g} GFLOP/s ({kind})",
                               moved, best)  # fmt: skip
    if not marks:
        return None
    return _both(marks, list(roofs.values())[:2], "flops a byte that must be moved", "GFLOP/s",
                 f"Roofline of {op}: {len(marks)} points", unit_y=1e9)  # fmt: skip


def _both(marks, roofs, x_title, y_title, description, unit_x=1.0, unit_y=1.0) -> dict[str, str]:
    return {name: log_log(marks, width=width, height=height, x_title=x_title, y_title=y_title,
                          description=description, roofs=roofs, unit_x=unit_x, unit_y=unit_y)
            for name, (width, height) in (("wide", _WIDE), ("narrow", _NARROW))}  # fmt: skip


def _pareto(name: str, report: dict) -> dict:
    """Quality against bytes, and quality against speed, of a demo's variants."""
    shown = [v for v in report["variants"] if v["perplexity"] is not None]
    axes = (("bytes_on_disk", 1e6, "weights on disk (MB)"),
            ("decode_tokens_per_s", 1.0, "decode, tokens/s"))  # fmt: skip
    plots = []
    for field, unit, title in axes if shown else ():
        points = [Point(v["name"], v[field] / unit, v["perplexity"], family(v["name"]))
                  for v in shown]  # fmt: skip
        said = "; ".join(f"{p.label}: {p.x:.3g}, perplexity {p.y:.4g}" for p in points)
        plots.append({
            kind: scatter(points, width=width, height=height, x_title=title,
                          y_title="perplexity (lower is better)",
                          description=f"Perplexity against {title}. {said}")
            for kind, (width, height) in (("wide", _WIDE), ("narrow", _NARROW))
        })  # fmt: skip
    return {"name": name, "model": report["model"]["name"], "rows": shown, "plots": plots}


def _png(reports: Mapping[str, dict], out: Path) -> None:
    """The rooflines of all ops, and quality against bytes of the demos, one below the other."""
    from matplotlib.figure import Figure

    rows = table(reports)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    demos = [(name, report) for name, report in reports.items() if report["kind"] == "demo"]
    panels = len(ops) + len(demos)
    if not panels:
        raise ValueError("report: the files hold no rows that a picture could show")
    figure = Figure(figsize=(9, 4.6 * panels), layout="constrained")
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    for op, axis in zip(ops, axes, strict=False):
        _png_roofline(axis, op, reports)
    for (name, report), axis in zip(demos, axes[len(ops) :], strict=True):
        for variant in (v for v in report["variants"] if v["perplexity"] is not None):
            axis.scatter(variant["bytes_on_disk"] / 1e6, variant["perplexity"],
                         label=variant["name"])  # fmt: skip
        axis.set(title=f"{report['model']['name']}: quality against bytes ({name})",
                 xlabel="MB on disk", ylabel="perplexity")  # fmt: skip
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=120)


def _png_roofline(axis, op: str, reports: Mapping[str, dict]) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for report in reports.values():
        for row in (row for row in report.get("rows", ()) if row["op"] == op):
            for variant in (v for v in row["variants"] if v["median"]):
                speed = row["flops"] / variant["median"] / 1e9
                points.setdefault(variant["name"], []).append(
                    (row["flops"] / row["floor_bytes"], speed))  # fmt: skip
        if (peak := report.get("peaks")) is not None:
            moved, best = max(peak["read"], peak["copy"]), max(peak["matmul"].values())
            xs = [best / moved / 1e4, best / moved, best / moved * 1e3]
            axis.plot(xs, [min(x * moved, best) / 1e9 for x in xs], "--", color="gray")
    for name, found in points.items():
        axis.scatter(*zip(*found, strict=True), label=name, s=22)
    axis.set(xscale="log", yscale="log", title=f"{op}: roofline", xlabel="flops a byte",
             ylabel="GFLOP/s")  # fmt: skip
    if points:
        axis.legend(fontsize=7)
