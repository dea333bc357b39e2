"""The loss curve as a small SVG, by hand: no plotting library needed to train."""

WIDTH, HEIGHT, MARGIN = 640, 320, 44
STYLE = {"train_loss": "#8fb3d9", "heldout_loss": "#c8472b"}
NAMES = {"train_loss": "training", "heldout_loss": "held-out"}


def loss_svg(curve: list[dict]) -> str:
    """Training and held-out loss in nats per token over millions of tokens."""
    right = max(entry["tokens"] for entry in curve)
    values = [entry[key] for entry in curve for key in STYLE if key in entry]
    low, high = int(min(values)), int(max(values)) + 1

    def x(tokens: float) -> float:
        return round(MARGIN + (WIDTH - 2 * MARGIN) * tokens / right, 1)

    def y(loss: float) -> float:
        return round(MARGIN + (HEIGHT - 2 * MARGIN) * (high - loss) / (high - low), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{MARGIN}" y="24">loss in nats per token, over millions of tokens</text>',
    ]
    for loss in range(low, high + 1):
        parts.append(f'<path d="M{x(0)} {y(loss)}H{x(right)}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{MARGIN - 18}" y="{y(loss) + 4}">{loss}</text>')
    for tokens in (right * quarter / 4 for quarter in range(5)):
        place = f'x="{x(tokens)}" y="{HEIGHT - 22}" text-anchor="middle"'
        parts.append(f"<text {place}>{tokens / 1e6:.2g}</text>")
    for i, (key, colour) in enumerate(STYLE.items()):
        points = " ".join(f"{x(e['tokens'])},{y(e[key])}" for e in curve if key in e)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{WIDTH - 200 + 90 * i}" y="24" fill="{colour}">{NAMES[key]}</text>')
    return "\n".join([*parts, "</svg>\n"])
