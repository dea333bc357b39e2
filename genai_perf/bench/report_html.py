"""report.html: one page from a report, with nothing outside of it: no font, no network."""

from statistics import median

from .numbers import figures, percent
from .plots import Point, marker, scatter
from .templating import fill

_FAMILIES = {
    "dense": "dense",
    "eight": "8-bit weights",
    "four": "4-bit weights",
    "sparse": "sparse",
    "both": "sparse and 4-bit",
}
_WIDE, _NARROW = (880, 420), (342, 400)


def family(name: str) -> str:
    """Which of the families of the plots a variant belongs to, by its recipe's name."""
    sparse = name.startswith(("sparsegpt", "magnitude", "wanda"))
    if name == "dense":
        return "dense"
    if sparse:
        return "both" if "+" in name else "sparse"
    return "eight" if name.startswith(("int8", "fp8")) else "four"


def render(report: dict) -> str:
    """The page of a valid report (`schema.validate`).

    Raises:
        ImportError: jinja2 is not installed.
    """
    return fill(
        "report.html",
        report=report,
        rows=_rows(report["variants"]),
        cards=_cards(report),
        quality=_quality_plots(report["variants"]),
        legend=[(name, _swatch(name)) for name in _used_families(report["variants"])],
        family_names=_FAMILIES,
        speed=_speed_charts(report["variants"]),
        layer=_layer_charts(report["layer"]),
    )


def _speedup(ratio: dict) -> dict[str, float]:
    """Speed over dense from the time ratio: the interval turns over."""
    return {
        "value": 1 / ratio["ratio"],
        "low": 1 / ratio["high"],
        "high": 1 / ratio["low"],
    }


def _rows(variants: list[dict]) -> list[dict]:
    dense = variants[0]
    return [
        variant
        | {
            "family": family(variant["name"]),
            "smaller": dense["bytes_on_disk"] / variant["bytes_on_disk"],
            "change": None
            if None in (variant["perplexity"], dense["perplexity"])
            else variant["perplexity"] / dense["perplexity"],
            "model_rss_bytes": variant["peak_rss_bytes"] - variant["baseline_rss_bytes"],
        }
        for variant in variants
    ]


def _cards(report: dict) -> list[tuple[str, str, str]]:
    """The findings in large type: (value, what it is, which variant)."""
    rows = _rows(report["variants"])
    cards = []
    smallest = min(rows, key=lambda r: r["bytes_on_disk"])
    cards.append((f"{figures(smallest['smaller'], 2)}× smaller", "the fewest bytes on disk",
                  smallest["name"]))  # fmt: skip
    fours = [r for r in rows if r["family"] == "four" and r["change"]]
    if fours:
        best = min(fours, key=lambda r: r["change"])
        cards.append(
            (percent(best["change"]), "perplexity of the best 4-bit variant", best["name"])
        )
    single = [r for r in report["layer"]["rows"] if r["rows"] == 1 and r["name"] != "dense"]
    if single:
        best = min(single, key=lambda r: r["time_ratio"]["ratio"])
        gain = figures(_speedup(best["time_ratio"])["value"], 2)
        side = f"{report['layer']['out_features']} × {report['layer']['in_features']}"
        cards.append((f"{gain}× as fast", f"one {side} layer, one row, against dense float32",
                      best["name"]))  # fmt: skip
    return cards


def _used_families(variants: list[dict]) -> list[str]:
    used = {family(variant["name"]) for variant in variants}
    return [name for name in _FAMILIES if name in used]


def _swatch(name: str) -> str:
    shape = marker(10, 10, name)
    return f'<svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">{shape}</svg>'


def _quality_plots(variants: list[dict]) -> dict[str, str]:
    """The same plot for a desktop and for a phone."""
    shown = [v for v in variants if v["perplexity"] is not None]
    unit = 1e9 if max(v["bytes_on_disk"] for v in variants) >= 1e9 else 1e6
    points = [
        Point(v["name"], v["bytes_on_disk"] / unit, v["perplexity"], family(v["name"]))
        for v in shown
    ]
    if not points:
        return {}
    said = "; ".join(f"{p.label}: {p.x:.3g} {'GB' if unit == 1e9 else 'MB'}, perplexity {p.y:.4g}"
                     for p in points)  # fmt: skip
    return {
        name: scatter(
            points,
            width=width,
            height=height,
            x_title=f"weights on disk ({'GB' if unit == 1e9 else 'MB'})",
            y_title="perplexity (lower is better)",
            description=f"Perplexity against size on disk. {said}",
        )
        for name, (width, height) in (("wide", _WIDE), ("narrow", _NARROW))
    }


def _speed_charts(variants: list[dict]) -> list[dict]:
    return [
        _chart(
            title,
            f"{phase} tokens per second",
            [
                (
                    v["name"],
                    family(v["name"]),
                    v[f"{phase}_tokens_per_s"],
                    v[f"{phase}_time_ratio"],
                    figures(v[f"{phase}_tokens_per_s"]),
                )
                for v in variants
            ],  # fmt: skip
        )
        for title, phase in (("Prefill, tokens/s", "prefill"), ("Decode, tokens/s", "decode"))
    ]


def _layer_charts(layer: dict) -> list[dict]:
    charts = []
    for rows in sorted({row["rows"] for row in layer["rows"]}):
        bars = []
        for row in (r for r in layer["rows"] if r["rows"] == rows):
            milliseconds = 1000 * median(row["seconds"])
            speed = _speedup(row["time_ratio"])["value"]
            bars.append((row["name"], family(row["name"]), speed, row["time_ratio"],
                         f"{figures(milliseconds)} ms"))  # fmt: skip
        title = f"{rows} row{'s' if rows > 1 else ''}"
        charts.append(_chart(title, f"speed over dense float32 at {title}", bars))
    return charts


def _chart(title: str, what: str, bars: list[tuple[str, str, float, dict, str]]) -> dict:
    """Bars as shares of the widest; each with its speed-up over dense and the interval of that."""
    widest = max(value for _, _, value, _, _ in bars)
    return {
        "title": title,
        "what": what,
        "bars": [
            {
                "name": name,
                "family": kind,
                "width": round(100 * value / widest, 2),
                "label": label,
                "speedup": None if name == "dense" else _speedup(ratio),
            }
            for name, kind, value, ratio, label in bars
        ],
    }
