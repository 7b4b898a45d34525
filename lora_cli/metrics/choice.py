"""The option to which a model gives the highest likelihood."""

from collections.abc import Sequence
from typing import Annotated, Literal

from lora_cli.methods import Knob, method

# Likelihoods that differ by less than this, relatively, are equal but for rounding.
_EQUAL = 1e-6


@method("choice", score="share", better="higher")
def choice(
    log_likelihoods: Sequence[Sequence[float]],
    tokens: Sequence[Sequence[int]],
    texts: Sequence[Sequence[str]],
    *,
    normalise: Annotated[
        Literal["none", "tokens", "characters"],
        Knob("an option's log-likelihood is divided by its length in these units"),
    ] = "none",
) -> list[list[bool]]:
    """Share of right choices.

    Every example brings its options: `"choices": ["…", "…"]` in its line of the task file, the completion among them.
    Each option is read as the completion would be, by the same chat template, and gets the log-likelihood of all its
    tokens, the end of the turn included. The model takes the option with the highest one. A longer option tends to have
    a lower likelihood; `--normalise` divides it by the number of its tokens, as nll does, or by the characters of its
    text.

    A tie is no choice: the example counts as wrong if another option has the same value, to one part in a million.
    Options that are repeated count once. Nothing is generated; an example takes one pass per option.

    Source: acc (`none`) and acc_norm (`characters`) of EleutherAI's lm-evaluation-harness, which takes the first option
    of a tie and has no end of the turn.
    """
    return [
        _first(_scaled(sums, counts, options, normalise))
        for sums, counts, options in zip(log_likelihoods, tokens, texts, strict=True)
    ]


def _scaled(sums: Sequence[float], counts: Sequence[int], texts: Sequence[str], normalise: str) -> list[float]:
    lengths = {"none": [1] * len(texts), "tokens": counts, "characters": [len(text) for text in texts]}[normalise]
    return [total / length for total, length in zip(sums, lengths, strict=True)]


def _first(values: Sequence[float]) -> list[bool]:
    """Whether each value is above all others."""
    best = max(values)
    near = [best - value <= _EQUAL * max(1.0, abs(best)) for value in values]
    return [one and sum(near) == 1 for one in near]
