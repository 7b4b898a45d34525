"""The verdict on a study, by the rules of docs/study.md: a function of its scores and gains, and of nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_cli.reports.study_facts import CONTROLS, Answer, Control, Gain, Outcome, Row, Verdict, needed_in_words
from lora_cli.scores import fewest_pairs, honest_best, too_few
from lora_cli.text import difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks:
    """What a verdict asks, in order: a question for each control, and what follows from every outcome.

    `absent` is said where a control has no result, and `nothing` where there is nothing to ask about. `own` are
    the controls of which every system has its own. `summary` is the sentence of all outcomes.
    """

    questions: Mapping[Control, str]
    absent: Mapping[Control, str]
    follows: Mapping[tuple[Control, Outcome], str]
    nothing: str
    summary: Callable[[Mapping[Control, Outcome]], str]
    own: tuple[Control, ...] = ()


def _summary(outcomes: Mapping[Control, Outcome]) -> str:
    base, target, noise = (outcomes[control] for control in CONTROLS)
    if base in ("few", "missing"):
        return "This study cannot say whether recycling helps."
    if base == "worse":
        return "Recycling does harm here: the base is better."
    if base == "open":
        return "Recycling is not shown to help here."
    if target == "worse":
        return "Recycling helps, but a new LoRA on the same data is better."
    if target != "better":
        return "Recycling helps, but is not shown to be better than a new LoRA on the same data."
    if noise != "better":
        return "Recycling helps, but what the adapters hold is not shown to be the reason."
    return "Recycling is worth it here: it beats the base, a new LoRA on the same data, and random weights."


RECYCLING = Asks(
    questions={
        "base": "Better than the base?",
        "target": "Better than a new LoRA on the same data?",
        "noise": "Better than random weights?",
    },
    absent={
        "base": "The base has no result: add base to --systems.",
        "target": "A LoRA trained on the same data has no result: add target to --systems.",
        "noise": "No fit has a result on random weights: add a fit like adaptive to --systems, and noise to --pools.",
    },
    follows={
        ("base", "better"): "Recycling helps on these test examples.",
        ("base", "worse"): "Use the base as it is.",
        ("base", "open"): "Nothing here says that recycling helps. Test on more examples, or use the base as it is.",
        ("target", "better"): "The pool adds something that training on the same data does not.",
        ("target", "worse"): "Train a LoRA on the data instead.",
        ("target", "open"): "The pool is not shown to add anything to the data: training a LoRA on them needs no pool.",
        ("noise", "better"): "What the adapters hold matters: random weights of the same size do worse.",
        ("noise", "worse"): "What the adapters hold does harm: random weights of the same size do better.",
        ("noise", "open"): "The gain is not shown to come from what the adapters hold: random weights may do as well.",
    },
    nothing="Nothing was recycled: no merge, fit or single adapter has a result.",
    summary=_summary,
    own=("noise",),
)
"""The questions of a study that compares systems over pools."""
_FEW = "Test on more examples before anything is concluded."
_ONE_SEED = "It rests on one seed, and the interval does not hold the chance of that: add seeds."
_MISSING = "This question stays open."


def verdict(rows: Sequence[Row], *, better: str, asks: Asks = RECYCLING) -> Verdict:
    """What a study says.

    Args:
        rows: all systems on all pools, each with its gains over its controls.
        better: the direction of the metric.
    """
    if not any(row.is_asked for row in rows):
        return Verdict(summary=asks.nothing, answers=())
    answers = tuple(_answer(rows, control, better, asks) for control in asks.questions)
    return Verdict(summary=asks.summary({one.control: one.outcome for one in answers}), answers=answers)


def best_recycled(rows: Sequence[Row], better: str, control: Control | None = None) -> Row | None:
    """The system with the best score that is no control, of those that have a gain over `control`."""
    found = [row for row in rows if row.is_asked and (control is None or control in row.gains)]
    sign = -1 if better == "lower" else 1
    return max(found, key=lambda row: sign * row.value, default=None)


def _answer(rows: Sequence[Row], control: Control, better: str, asks: Asks) -> Answer:
    best, question = best_recycled(rows, better, control), asks.questions[control]
    if best is None:
        return Answer(
            control=control, question=question, outcome="missing", row="", found=asks.absent[control], follows=_MISSING
        )
    gain = best.gains[control]
    family = sum(control in row.gains for row in rows)
    outcome = _outcome(gain, family)
    if outcome == "few":
        found, follows = _too_few(len(gain.pairs), family), _FEW
    else:
        rivals = [] if control in asks.own else _rivals(rows, control)
        found, follows = _found(best, gain, outcome, family, rivals), asks.follows[control, outcome]
        if (first := best_recycled(rows, better)) not in (None, best):
            found = f"{found} {first.name}, which scores best, has no such control."
        if outcome != "open" and any(row.is_one_draw for row in (best, *_controls(rows, best, control, asks))):
            follows = f"{follows} {_ONE_SEED}"
    return Answer(control=control, question=question, outcome=outcome, row=best.name, found=found, follows=follows)


def _controls(rows: Sequence[Row], best: Row, control: Control, asks: Asks) -> list[Row]:
    return [row for row in rows if row.role == control and (control not in asks.own or row.system == best.system)]


def _rivals(rows: Sequence[Row], control: Control) -> list[Sequence[float]]:
    """The gains over a control that all systems share, of which the best score has the largest."""
    return [row.gains[control].pairs for row in rows if row.is_asked and control in row.gains]


def _outcome(gain: Gain, family: int) -> Outcome:
    if len(gain.pairs) < fewest_pairs(family):
        return "few"
    if not gain.shown:
        return "open"
    return "better" if gain.found.delta > 0 else "worse"


def _too_few(n: int, family: int) -> str:
    return f"Too few examples: {too_few(n, 'test example', family)}."


def _found(best: Row, gain: Gain, outcome: Outcome, family: int, rivals: Sequence[Sequence[float]]) -> str:
    """What was found of the best system, which was picked among its rivals by the same examples."""
    begin = {"better": "Yes", "worse": "No, it is worse", "open": "Not separable"}[outcome]
    delta = difference(gain.found.delta, gain.found.low, gain.found.high)
    corrected = f" after Holm's correction for {family:,} comparisons" if family > 1 else ""
    said = [f"{begin}: {best.name} gains {delta}, p {_p(gain.p_holm)}{corrected}."]
    if len(rivals) > 1:
        said.append(
            f"It is the best of {len(rivals):,} on these examples, which flatters it: picked on one half of them and "
            f"scored on the other, the best one gains {honest_best(rivals):+.3f}."
        )
    return " ".join([*said, *(_power(gain) if outcome == "open" else ())])


def _power(gain: Gain) -> list[str]:
    """What more examples would show, and what these could have shown."""
    if gain.needed is None:
        return ["No number of examples follows from a difference of 0."]
    return [
        f"If the true difference is the one seen, about {needed_in_words(gain.needed)} test examples show it in 80 % "
        f"of studies that compare nothing else; the {len(gain.pairs):,} of this one show {gain.least:.3f} or more."
    ]


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
