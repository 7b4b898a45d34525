"""A task as a base would read it: lengths, examples that are too long, duplicates, and single examples as tokens."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lora_cli.metrics.exact import usual
from lora_cli.models.encode import UNLIMITED, Encoder
from lora_cli.models.forms import as_turns, content_of, turns_of
from lora_cli.records import Example
from lora_cli.task import HeldOut
from lora_cli.text import counted, percent, shortened

_ONE_CLASS = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths of examples; `p95` is the 95th percentile."""

    median: int
    p95: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFacts:
    """Facts about a task's examples. Without a base the lengths are in characters, and other facts are None.

    `duplicates` counts examples that repeat an earlier one, `across_split` validation prompts that are also training
    prompts, `in_test` test prompts that are also prompts of this task. `usual` is the most frequent answer, in the form
    that exact match compares, and `usual_share` the share of the examples that have it: the score of a constant answer.
    `takes` is the base's token limit, `too_long` names the examples above it. `one_token` counts completions of one
    token, `parted` examples without a right cut, `marked` prompts with control tokens of the chat template, `early`
    answers with an end of turn inside. `unread` names input that has no effect on the rendered prompts: keys of
    messages and lines, `--system`.
    """

    examples: int
    unit: Literal["tokens", "characters"]
    lengths: Lengths
    duplicates: int
    across_split: int | None
    in_test: int | None
    usual: str
    usual_share: float
    takes: int | None = None
    too_long: tuple[str, ...] = ()
    one_token: int | None = None
    parted: int | None = None
    marked: int | None = None
    early: int | None = None
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadExample:
    """One example in pieces: tokens, or turns without a base. Pieces from `start` on are learnt and scored."""

    id: str
    pieces: tuple[str, ...]
    start: int
    ids: tuple[int, ...] = ()
    generated_from: int | None = None


def look(
    examples: Sequence[Example],
    encoder: Encoder | None = None,
    *,
    seed: int | None = None,
    held: HeldOut | None = None,
    test: Sequence[Example] | None = None,
) -> TaskFacts:
    """The facts of a task, at least one example.

    Args:
        encoder: the base's encoder; None uses the text alone.
        seed: the seed of the split into training and validation part, which is checked for repeated prompts.
        held: the validation part, the usual one unless given.
        test: test data, which is checked for prompts of the task.

    Raises:
        DataError: an example that the base cannot read, its length aside; see `Encoder.read`.
    """
    encoded = [] if encoder is None else encoder.read_all(examples)
    lengths = [len(one.ids) for one in encoded] or [len(_text(example)) for example in examples]
    answer, share = usual([example.completion for example in examples])
    facts = TaskFacts(
        examples=len(examples),
        unit="characters" if encoder is None else "tokens",
        lengths=_lengths(lengths),
        duplicates=len(examples) - len({*_identities(examples, whole=True)}),
        across_split=None if seed is None else _across(examples, held or HeldOut(), seed),
        in_test=None if test is None else repeated(examples, test),
        usual=answer,
        usual_share=share,
    )
    if encoder is None:
        return facts
    return replace(
        facts,
        takes=None if encoder.longest == UNLIMITED else encoder.longest,
        too_long=tuple(one.id for one in encoded if len(one.ids) > encoder.longest),
        one_token=encoder.one_token(encoded),
        parted=sum(one.parted for one in encoded),
        marked=sum(one.marked for one in encoded),
        early=sum(one.early for one in encoded),
        unread=tuple(sorted(encoder.unread(examples))),
    )


def read(example: Example, encoder: Encoder | None = None) -> ReadExample:
    """One example in pieces. Raises as `Encoder.read`."""
    if encoder is None:
        turns = [f"{turn['role']}: {content_of(turn)}" for turn in as_turns(example)]
        return ReadExample(id=example.id, pieces=(*turns, example.completion), start=len(turns))
    encoded = encoder.read(example)
    return ReadExample(
        id=example.id,
        pieces=tuple(encoder.texts(encoded.ids)),
        start=encoded.start,
        ids=encoded.ids,
        generated_from=len(encoded.opening.ids),
    )


def _identities(examples: Sequence[Example], *, whole: bool = False) -> list[str]:
    """Of each example a text that is the same for the same prompt, however it is written, or for the same example."""
    return [
        json.dumps([turns, one.extras, [one.completion, one.answer] if whole else []], sort_keys=True)
        for one, turns in zip(examples, turns_of(examples), strict=True)
    ]


def _text(example: Example) -> str:
    return "".join(map(content_of, as_turns(example))) + example.completion


def repeated(these: Sequence[Example], others: Sequence[Example]) -> int:
    """The number of examples in `others` whose prompt is also in `these`."""
    prompts = {*_identities(these)}
    return sum(prompt in prompts for prompt in _identities(others))


def _across(examples: Sequence[Example], held: HeldOut, seed: int) -> int | None:
    """The number of validation prompts that are also training prompts, None without two parts."""
    return repeated(*held.parts(examples, seed=seed)) if held.own or len(examples) > 1 else None


def _lengths(lengths: Sequence[int]) -> Lengths:
    ordered = sorted(lengths)
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Lengths(median=ordered[(len(ordered) - 1) // 2], p95=p95, longest=ordered[-1])


def summary_of(facts: TaskFacts) -> list[str]:
    """The lines that every command prints about its task: a summary, and the input without effect."""
    lengths = facts.lengths
    parts: list[Any] = [
        f"data: {counted(facts.examples, 'example')}",
        f"{facts.unit} median {lengths.median:,}, 95 % {lengths.p95:,}, longest {lengths.longest:,}",
        facts.too_long and f"{len(facts.too_long):,} longer than the base takes ({facts.takes:,})",
        facts.duplicates and counted(facts.duplicates, "duplicate"),
        facts.in_test and f"{counted(facts.in_test, 'test prompt')} also here",
        facts.one_token and f"{percent(facts.one_token / facts.examples)} one-token completions",
        facts.parted and f"{facts.parted:,} without a right cut",
        facts.early and f"{counted(facts.early, 'answer')} with the end of a turn inside",
        facts.marked and f"{counted(facts.marked, 'prompt')} with control tokens, see --no-chat-template",
    ]
    lines = [" · ".join(filter(None, parts))]
    if facts.across_split:
        prompts = "prompt is also a training prompt" if facts.across_split == 1 else "prompts are also training prompts"
        lines.append(
            f"warning: {facts.across_split:,} validation {prompts}, which flatters the best step and its gain: "
            "remove the repeated lines"
        )
    if facts.examples > 1 and facts.usual_share > _ONE_CLASS:
        answers = f"{percent(facts.usual_share)} of the answers are {shortened(facts.usual)!r}"
        lines.append(f"warning: {answers}: a model that gives no other answer seems good")
    if facts.unread:
        unread = ", ".join(facts.unread)
        lines.append(f"warning: prompts are the same without {unread}: the chat template does not read it")
    return lines
