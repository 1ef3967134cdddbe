"""Numbers of the report as a person reads them."""

from __future__ import annotations

from ...io.console import human_size

# Figure → what the page calls it.
NAMES = {
    "rounded": "after",
    "merged": "before",
    "change": "change: after − before",
    "gptq": "under plain GPTQ",
    "over_gptq": "after − plain GPTQ",
    "quantization": "rounding part",
    "cross": "cross term",
    "solved": "target, before rounding",
    "aim_merged": "aim: before",
    "aim_rounded": "aim: after",
    "aim_change": "aim: after − before",
}


def cut(text: str, length: int) -> str:
    """Text of at most ``length`` characters: its middle goes."""
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def percent(share: float | None) -> str:
    """A share as per cent with three significant digits."""
    return "–" if share is None else f"{_digits(100 * share)}\u00a0%"


def points(change: float | None) -> str:
    """A difference of shares, in percentage points with its sign."""
    if change is None:
        return "–"
    return f"{'+' if change > 0 else '−' if change < 0 else ''}{_digits(abs(100 * change))}"


def number(value: float | None) -> str:
    """Three significant digits; whole numbers in full."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else _digits(value)


def _digits(value: float) -> str:
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.0005:
        return "< 0.001"
    return f"{value:#.3g}".removesuffix(".") if value else "0"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shown_size(size: int | None) -> str:
    """Bytes after a comma, nothing where they are not known."""
    return "" if size is None else f", {human_size(size)}"
