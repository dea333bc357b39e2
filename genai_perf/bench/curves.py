"""Loss curves as a small SVG, by hand: no plotting library needed to train."""

from collections.abc import Mapping, Sequence
from html import escape

from .plots import ticks

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#c8472b", "#3f76ad", "#5b8a3c", "#8a5aa8")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str) -> str:
    """One line a name, over steps.

    Args:
        series: name -> (step, value) pairs, steps rising; a name without pairs is left out.
        title: above the drawing.

    Returns:
        str: an SVG document.
    """
    series = {name: pairs for name, pairs in series.items() if pairs}
    steps = [step for pairs in series.values() for step, _ in pairs] or [0, 1]
    values = [value for pairs in series.values() for _, value in pairs] or [0, 1]
    right = max(steps) or 1
    low, high = min(values), max(values)
    high = high if high > low else low + 1

    def x(step: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * step / right, 1)

    def y(value: float) -> float:
        return round(MARGIN + (HEIGHT - 2 * MARGIN) * (high - value) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="20">{escape(title)}</text>',
    ]
    for value in ticks(low, high, 5):
        parts.append(f'<path d="M{x(0)} {y(value)}H{x(right)}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{MARGIN - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
        )
    for step in ticks(0, right, 5):
        place = f'x="{x(step)}" y="{HEIGHT - 24}" text-anchor="middle"'
        parts.append(f"<text {place}>{step:g}</text>")
    for i, (name, pairs) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(f"{x(step)},{y(value)}" for step, value in pairs)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{MARGIN + 120 * i}" y="38" fill="{colour}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>\n"])
