"""Hand-made inline SVG: quality against size, with labels that do not overlap.

The colours are CSS variables of the page, so one drawing serves light and dark. Text keeps its size
only if the drawing is not scaled much, so the page carries one drawing for each width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_CHAR = 0.58  # width of a character in em, on the wide side for the system's sans-serif fonts


@dataclass(frozen=True)
class Point:
    """A named point; `family` picks colour and marker: dense, eight, four, sparse or both."""

    label: str
    x: float
    y: float
    family: str


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """Area in common."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, frame: "Box") -> float:
        """Area beyond the frame."""
        area = (self.right - self.left) * (self.bottom - self.top)
        return area - self.overlap(frame)


def ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round values from low to high: 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10**p for p in powers for m in (1, 2, 5) if low <= m * 10**p <= high]


def place_labels(anchors: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box,
                 font: float, avoid: Sequence[Box] = ()) -> list[Box]:  # fmt: skip
    """A box for each label, near its anchor, apart from other labels, markers and the frame.

    Greedy, the most crowded anchor first: each label takes the candidate of least cost, where an
    overlap costs far more than distance.

    Args:
        anchors: pixel positions of the markers.
        labels: texts.
        frame: where labels may stand.
        font: font size in pixels.
        avoid: further boxes to stay clear of.

    Returns:
        list[Box]: in the order of `labels`.
    """
    obstacles = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in anchors] + list(avoid)
    placed: dict[int, Box] = {}

    def crowd(i: int) -> float:
        x, y = anchors[i]
        return sum(1 / (30 + math.hypot(x - u, (y - v) * 2)) for u, v in anchors)

    for i in sorted(range(len(labels)), key=crowd, reverse=True):
        x, y = anchors[i]
        width, height = len(labels[i]) * font * _CHAR, font * 1.25
        best, lowest = None, math.inf
        for distance in range(11, 171, 6):
            for degrees in range(0, 360, 15):
                cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
                # The nearest side or corner of the box stands at `distance`.
                left = x + cos * distance - width * (1 - cos) / 2
                top = y - sin * distance - height * (1 + sin) / 2
                box = Box(left, top, left + width, top + height)
                clash = sum(box.overlap(other) for other in placed.values())
                clash += sum(box.overlap(other) for other in obstacles) + box.outside(frame)
                cost = clash * 50 + distance + (0 if degrees % 90 == 0 else 4)
                if cost < lowest:
                    best, lowest = box, cost
        placed[i] = best
    return [placed[i] for i in range(len(labels))]


def scatter(points: Sequence[Point], *, width: int, height: int, x_title: str, y_title: str,
            description: str, x_format: str = "{:g}") -> str:  # fmt: skip
    """Quality (y, lower is better) against size (x, from 0); y is logarithmic beyond a factor of 4.

    Args:
        points: the first is the reference; a dashed line marks its y.
        width, height: of the viewBox, in the pixels that the page will show it at.
        x_title, y_title: axis titles.
        description: what a screen reader says.
        x_format: of an x tick.
    """
    font = 13
    ys = [p.y for p in points]
    logarithmic = max(ys) > 4 * min(ys)
    to_axis = math.log10 if logarithmic else float
    low, high = to_axis(min(ys)), to_axis(max(ys))
    pad = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    low, high = low - pad, high + pad
    x_high = max(p.x for p in points) * 1.08
    y_ticks = log_ticks(10**low, 10**high) if logarithmic else ticks(low, high, 5)
    left = 20 + max((len(f"{t:g}") for t in y_ticks), default=1) * font * _CHAR + 14
    plot = Box(left, 12, width - 10, height - 46)

    def px(x: float) -> float:
        return plot.left + (plot.right - plot.left) * x / x_high

    def py(y: float) -> float:
        return plot.bottom - (plot.bottom - plot.top) * (to_axis(y) - low) / (high - low)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}" '
           f'font-size="{font}" xmlns="http://www.w3.org/2000/svg">']  # fmt: skip
    for t in ticks(0, x_high, max(4, width // 110)):
        out.append(_line(px(t), plot.top, px(t), plot.bottom, "grid"))
        out.append(_text(px(t), plot.bottom + 17, x_format.format(t), "middle", "muted"))
    for t in y_ticks:
        out.append(_line(plot.left, py(t), plot.right, py(t), "grid"))
        out.append(_text(plot.left - 7, py(t) + 4.5, f"{t:g}", "end", "muted"))
    middle = (plot.left + plot.right) / 2
    out.append(_text(middle, height - 8, x_title, "middle", "muted"))
    out.append(f'<g transform="translate(13 {(plot.top + plot.bottom) / 2:.1f}) rotate(-90)">'
               + _text(0, 0, y_title + (", log scale" if logarithmic else ""), "middle", "muted")
               + "</g>")  # fmt: skip
    out.append(_line(plot.left, py(points[0].y), plot.right, py(points[0].y), "reference"))
    anchors = [(px(p.x), py(p.y)) for p in points]
    reference = Box(plot.left, anchors[0][1] - 1, plot.right, anchors[0][1] + 1)
    boxes = place_labels(anchors, [p.label for p in points], plot, font, [reference])
    for point, (x, y), box in zip(points, anchors, boxes, strict=True):
        near_x = min(max(x, box.left), box.right)
        near_y = min(max(y, box.top), box.bottom)
        if math.hypot(near_x - x, near_y - y) > 14:
            out.append(_line(x, y, near_x, near_y, "leader"))
        out.append(marker(x, y, point.family))
        middle = (box.left + box.right) / 2
        out.append(_text(middle, box.bottom - font * 0.3, point.label, "middle", "label"))
    return "".join([*out, "</svg>"])


def marker(x: float, y: float, family: str) -> str:
    """A marker whose shape tells the family too, for those who do not tell the colours apart."""
    shape = {
        "dense": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6"',
        "eight": f'<rect x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11"',
        "four": f'<path d="M{x:.1f} {y - 7:.1f}l7 7-7 7-7-7z"',
        "sparse": f'<path d="M{x:.1f} {y - 6.5:.1f}l7 12.5h-14z"',
        "both": f'<path d="M{x:.1f} {y + 6.5:.1f}l7-12.5h-14z"',
    }[family]
    return f'{shape} class="mark {family}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(text)}</text>")  # fmt: skip
