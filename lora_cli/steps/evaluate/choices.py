"""Examples with options to choose from: their encodings, and the option that the model takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_cli.errors import DataError
from lora_cli.models.encode import Encoded, Encoder
from lora_cli.records import Example
from lora_cli.text import counted

ValuesOf = Callable[..., Sequence[Sequence[float]]]
"""A metric of kind choice, with its knobs: the value of each option of each example as the answer."""


class Choices(NamedTuple):
    """The options of one example, as texts and as the model reads them; `right` is the place of the answer."""

    texts: tuple[str, ...]
    encoded: tuple[Encoded, ...]
    right: int


class Chosen(NamedTuple):
    """What became of one example.

    `log_likelihood` is that of the answer, the mean per token in nats, `value` the metric's. `text` is the option that
    the model took, "" if none is above all others.
    """

    log_likelihood: float
    value: float
    text: str


def demand_choices(examples: Sequence[Example], *, file: str = "") -> None:
    """Raise DataError, with the name of the file, if an example brings no options."""
    lacking = [example.id for example in examples if not example.choices]
    if lacking:
        raise DataError(
            f"{file and f'{file}: '}no choices in {len(lacking):,} of {counted(len(examples), 'example')}, "
            f"first in {lacking[0]}",
            hint='add "choices": ["…", "…"] to each line, the completion among them, or take --metric exact or nll',
        )


def read_choices(encoder: Encoder, examples: Sequence[Example]) -> dict[str, Choices]:
    """The options of each example by its id, a repeated one once. Raises as `demand_choices` and `Encoder.encode`."""
    demand_choices(examples)
    found = {}
    for example in examples:
        texts = tuple(dict.fromkeys(example.choices))
        right = texts.index(example.completion)
        read = [example if place == right else replace(example, completion=text) for place, text in enumerate(texts)]
        found[example.id] = Choices(texts, tuple(encoder.read_all(read)), right)
    encoder.demand_room({id: max(len(one.ids) for one in options.encoded) for id, options in found.items()})
    return found


def judged(asked: Choices, likelihoods: Sequence[float], values_of: ValuesOf) -> Chosen:
    """The option that the model takes of an example, by the mean log-likelihoods per token of its options."""
    tokens = [option.tokens for option in asked.encoded]
    sums = [mean * count for mean, count in zip(likelihoods, tokens, strict=True)]
    [values] = values_of([sums], [tokens], [asked.texts])
    best = max(values)
    taken = asked.texts[values.index(best)] if values.count(best) == 1 else ""
    return Chosen(likelihoods[asked.right], float(values[asked.right]), taken)
