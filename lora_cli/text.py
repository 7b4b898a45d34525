"""Words for people: lists, shares, sizes, durations."""

from collections.abc import Sequence


def in_words(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def percent(share: float) -> str:
    """A share in percent that never rounds a loss away: "100 %" means all of it, to rounding noise."""
    return "100 %" if share >= 1 - 1e-6 else f"{min(share, 0.999):.1%}".replace("%", " %")


def size(count: int) -> str:
    """A number of bytes, to a tenth of its unit."""
    left = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if left < 999.5:
            return f"{left:.0f} {unit}" if unit == "B" else f"{left:.1f} {unit}"
        left /= 1000
    return f"{left:.1f} TB"


def duration(seconds: float) -> str:
    """A time, to a tenth of a second below a minute."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
