"""Numbers as people read them, the same in the terminal and on the page."""


def human_bytes(count: float) -> str:
    """Decimal units, three significant digits: 7.91 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{figures(count)} {unit}"
        count /= 1000
    return f"{figures(count)} TB"


def figures(value: float | None, digits: int = 3) -> str:
    """Significant digits with no exponent, thousands apart: 12,300, 1.23, 0.0123."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    text = f"{float(f'{value:.{digits}g}'):,.10f}"
    whole, _, part = text.partition(".")
    keep = max(0, digits - len(whole.lstrip("-0").replace(",", "")))
    if keep and not whole.lstrip("-0"):
        keep += len(part) - len(part.lstrip("0"))
    return f"{whole}.{part[:keep]}" if keep else whole


def percent(value: float) -> str:
    """A signed change: +3.1 %, -0.02 %."""
    change = 100 * (value - 1)
    return f"{change:+.2f} %" if abs(change) < 1 else f"{change:+.1f} %"
