"""Words for people: lists, counts, hints, shares, intervals, scores, sizes, durations."""

import difflib
from collections.abc import Iterable, Sequence


def in_words(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def counted(number: int, what: str) -> str:
    """A number with its noun, given in the singular: 1 adapter, 1,200 adapters."""
    return f"{number:,} {what}{'s'[: number != 1]}"


def nearest(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """The hint for an unknown word: the nearest known one, or `otherwise`."""
    return meant([repr(one) for one in difflib.get_close_matches(word, list(known), n=1)], otherwise)


def meant(near: Sequence[str], otherwise: str = "") -> str:
    """The hint that offers the words of `near`, or `otherwise` if there are none."""
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def percent(share: float) -> str:
    """A share in percent that never rounds a difference away: "100 %" means all of it, to rounding noise."""
    if abs(share - 1) < 1e-6:
        return "100 %"
    if 0 < share < 1e-4:
        return "under 0.01 %"
    shown = min(share, 0.999) if share < 1 else share
    return f"{100 * shown:.{2 if share < 0.01 else 1}f}".rstrip("0").rstrip(".") + " %"


def interval(low: float, high: float, *, places: int = 3, signed: bool = False) -> str:
    """The two ends of an interval; `signed` gives both their sign, as differences have."""
    sign = "+" if signed else ""
    return f"[{low:{sign}.{places}f}, {high:{sign}.{places}f}]"


def difference(delta: float, low: float, high: float, *, places: int = 3) -> str:
    """A difference with its interval, all with their signs."""
    return f"{delta:+.{places}f} {interval(low, high, places=places, signed=True)}"


def score(value: float) -> str:
    """A number of any size: four digits, and from 1,000 on as many as it takes to tell its neighbour apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(count: float) -> str:
    """A number of bytes, to a tenth of its unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def about(seconds: float) -> str:
    """An estimated time, rounded to one or two digits."""
    if seconds < 1.5:
        return "about a second"
    count, unit = (seconds, "s") if seconds < 90 else (seconds / 60, "min") if seconds < 5400 else (seconds / 3600, "h")
    return f"about {count:.1g} {unit}" if count < 10 else f"about {round(count / 5) * 5} {unit}"


def duration(seconds: float) -> str:
    """A time, to a tenth of a second below a minute."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def shortened(value: object) -> str:
    """`value` as text of at most 120 characters, for a sentence. Escaping is the screen's work."""
    shown = str(value)
    return shown if len(shown) <= 120 else shown[:120] + "…"
