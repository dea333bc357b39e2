"""The plots of the results page, as inline SVG: roofline, and times or quality against bytes.

Colours are CSS classes s0 to s7, one for each variant, and each has a marker of its own, so that
the page can be read without telling colours apart and in light and dark. Every mark has a title,
which browsers show on hover and screen readers read.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .plots import Box, log_ticks

SERIES = 8
_FONT = 13


@dataclass(frozen=True)
class Mark:
    """A point of a series; `title` says what it is, with its numbers."""

    x: float
    y: float
    series: int
    title: str


@dataclass(frozen=True)
class Roof:
    """A line y = min(x * slope, level); either may be infinite."""

    label: str
    slope: float
    level: float


def shape(series: int, x: float, y: float, size: float = 5.5) -> str:
    """The marker of a series: a different outline for each of the eight."""
    s, t = size, 1.3 * size
    outlines = (
        f"M{x - s:.1f} {y:.1f}a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}v{2 * s}h{-2 * s}z",
        f"M{x:.1f} {y - t:.1f}l{t} {t}l{-t} {t}l{-t} {-t}z",
        f"M{x:.1f} {y - 1.2 * s:.1f}l{1.2 * s} {2.2 * s}h{-2.4 * s}z",
        f"M{x:.1f} {y + 1.2 * s:.1f}l{1.2 * s} {-2.2 * s}h{-2.4 * s}z",
        f"M{x - s:.1f} {y - s / 3:.1f}h{2 * s}v{s}h{-2 * s}z",
        f"M{x - s / 3:.1f} {y - s:.1f}h{s}v{2 * s}h{-s}z",
        f"M{x - s:.1f} {y - s:.1f}h{2 * s}l{-2 * s} {2 * s}h{2 * s}z",
    )
    return f'<path d="{outlines[series % SERIES]}" class="mark s{series % SERIES}"/>'


def swatch(series: int) -> str:
    drawn = shape(series, 10, 10)
    return f'<svg viewBox="0 0 20 20" width="18" height="18" aria-hidden="true">{drawn}</svg>'


def log_log(marks: Sequence[Mark], *, width: int, height: int, x_title: str, y_title: str,
            description: str, roofs: Sequence[Roof] = (), unit_x: float = 1.0,
            unit_y: float = 1.0) -> str:  # fmt: skip
    """Marks, and lines above which none can lie, on logarithmic axes.

    Args:
        marks: all positive.
        width, height: of the viewBox, in the pixels that the page will show it at.
        roofs: drawn across the plot.
        unit_x, unit_y: what one of the axis' units is, such as 1e9.
    """
    low_x, high_x = _range([mark.x / unit_x for mark in marks])
    tops = [roof.level / unit_y for roof in roofs if math.isfinite(roof.level)]
    low_y, high_y = _range([mark.y / unit_y for mark in marks] + tops)
    y_ticks = _ticks(low_y, high_y, height // 44)
    left = 26 + max(len(f"{t:g}") for t in y_ticks) * _FONT * 0.6
    plot = Box(left, 14, width - 14, height - 48)

    def px(x: float) -> float:
        share = math.log(x / low_x) / math.log(high_x / low_x)
        return plot.left + (plot.right - plot.left) * share

    def py(y: float) -> float:
        share = math.log(y / low_y) / math.log(high_y / low_y)
        return plot.bottom - (plot.bottom - plot.top) * share

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}" '
           f'font-size="{_FONT}" xmlns="http://www.w3.org/2000/svg">']  # fmt: skip
    for t in _ticks(low_x, high_x, width // 84):
        out.append(_line(px(t), plot.top, px(t), plot.bottom, "grid"))
        out.append(_text(px(t), plot.bottom + 18, f"{t:g}", "middle", "muted"))
    for t in y_ticks:
        out.append(_line(plot.left, py(t), plot.right, py(t), "grid"))
        out.append(_text(plot.left - 7, py(t) + 4.5, f"{t:g}", "end", "muted"))
    out.append(_text((plot.left + plot.right) / 2, height - 8, x_title, "middle", "muted"))
    out.append(f'<g transform="translate(13 {(plot.top + plot.bottom) / 2:.1f}) rotate(-90)">'
               + _text(0, 0, y_title, "middle", "muted") + "</g>")  # fmt: skip
    for i, roof in enumerate(roofs):
        out += _roof(roof, i, (low_x, high_x), (low_y, high_y), unit_x, unit_y, px, py, plot)
    for mark in marks:
        drawn = shape(mark.series, px(mark.x / unit_x), py(mark.y / unit_y))
        out.append(f"<g><title>{escape(mark.title)}</title>{drawn}</g>")
    return "".join([*out, "</svg>"])


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values and some air, at least a factor of 4."""
    low, high = min(values), max(values)
    air = max(1.25, math.sqrt(4 / (high / low)) if high < 4 * low else 1.25)
    return low / air, high * air


def _ticks(low: float, high: float, most: int) -> list[float]:
    found = log_ticks(low, high)
    if len(found) > most:
        found = [t for t in found if abs(math.log10(t) - round(math.log10(t))) < 1e-9]
    step = max(1, math.ceil(len(found) / max(1, most)))
    return found[::step] or [math.sqrt(low * high)]


def _roof(roof: Roof, index: int, xs, ys, unit_x, unit_y, px, py, plot: Box) -> list[str]:
    """The line inside of the frame, its label below its right end."""
    (low_x, high_x), (low_y, high_y) = xs, ys
    level = roof.level / unit_y
    slope = roof.slope * unit_x / unit_y
    points = []
    for i in range(65):
        x = low_x * (high_x / low_x) ** (i / 64)
        y = min(x * slope, level) if math.isfinite(slope) else level
        if low_y <= y <= high_y:
            points.append((px(x), py(y)))
    if not points:
        return []
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    down = points[-1][1] + 15 + 16 * (index % 2)
    label = _text(plot.right - 4, min(down, plot.bottom - 4), roof.label, "end", "roof")
    return [f'<path d="{path}" class="reference" fill="none"/>', label]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(text)}</text>")  # fmt: skip
