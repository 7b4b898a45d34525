"""Words for people: lists, shares, sizes, durations."""

from collections.abc import Sequence


def in_words(words: Sequence[str]) -> str:
    """Words as a list in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
