"""Outputs that are the expected answer."""

from collections import Counter
from collections.abc import Sequence

from lora_cli.methods import method


@method("output", score="share", better="higher")
def exact(outputs: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Share of exact matches.

    An output matches if it equals the expected answer after both are normalised: the text after the last "####",
    without spaces and outer full stops, in lower case.

    Source: the evaluation of arXiv 2602.12323.
    """
    return [normalise(output) == normalise(answer) for output, answer in zip(outputs, expected, strict=True)]


def normalise(text: str) -> str:
    """The part of a text that is compared."""
    return text.split("####")[-1].replace(" ", "").strip().strip(".").lower()


def usual(answers: Sequence[str]) -> tuple[str, float]:
    """The most frequent answer, normalised, and its share: the score of a model that always gives it."""
    [(answer, times)] = Counter(map(normalise, answers)).most_common(1)
    return answer, times / len(answers)
