"""The answers of a recorded evaluation beside their prompts and the expected answers, and what changes between two."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_cli.catalogue import runs
from lora_cli.errors import DataError, NothingMatched, OutputError
from lora_cli.metrics import METRICS
from lora_cli.records import Prompt
from lora_cli.steps.evaluate.evaluate import read_rows
from lora_cli.task import Task, read_task, task_sha256

_MOST_RUNS = 1000
DATA_FILE = "data_file"
"""The result of an evaluation that is the place of its data on this machine, for `answers_of`."""
ChangeKind = Literal["broken", "fixed", "different", "same"]
_KINDS: tuple[ChangeKind, ...] = ("broken", "fixed", "different", "same")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One system's answer to one example; `log_likelihood` is that of the expected answer, per token in nats.

    It is None if a number of the model was not finite.
    """

    id: str
    system: str
    prompt: Prompt
    expected: str
    given: str
    correct: bool
    log_likelihood: float | None
    tokens: int


def answers_of(run: Mapping[str, Any], files: Sequence[Path | None]) -> list[Answer]:
    """Every answer of an evaluation, in the order of its systems and of the rows.

    Args:
        run: a run as `catalogue.runs.find` returns it.
        files: the places where its data may be, besides that where it was and the working folder.

    Raises:
        NothingMatched: no evaluation, or one without answers.
        DataError: the data is missing or has changed. OutputError: the rows cannot be read.
    """
    settings = run["record"]["settings"]
    evaluated = run["command"] in ("eval", "pool-evaluate")
    if not evaluated or METRICS.get(settings["metric"]).kind == "likelihood":
        scored = "scored likelihoods alone" if evaluated else "is no evaluation"
        raise NothingMatched(f"{run['id']} {scored}: it has no answers", hint="lora eval --metric exact has some")
    name = settings["data"]
    place = run["record"]["results"].get(DATA_FILE, name)
    task = unchanged(name, run["record"]["inputs"][name], [*files, Path(place)])
    if task is None:
        raise DataError(f"{place}, the data of {run['id']}, is missing or has changed", hint="give --data FILE.jsonl")
    examples = {example.id: example for example in task.examples}
    systems = list(dict.fromkeys(score["system"] for score in run["scores"]))
    try:
        found = read_rows(Path(run["out"]))
    except OutputError as error:
        raise OutputError(error.message, hint="name another run: see lora runs list --command eval") from error
    rows = [row for row in found if row.id in examples and row.text is not None]
    if systems:
        # Rows of earlier evaluations stay in a file.
        rows = sorted((row for row in rows if row.system in systems), key=lambda row: systems.index(row.system))
    return [
        Answer(
            id=row.id,
            system=row.system,
            prompt=examples[row.id].prompt,
            expected=examples[row.id].completion,
            given=row.text or "",
            correct=bool(row.value),
            log_likelihood=row.log_likelihood,
            tokens=row.tokens,
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The answers of two systems to one example.

    `change` is "fixed" if only the second is right, "broken" if only the first is, "different" if the texts differ and
    both are right or both wrong, "same" if the texts are the same.
    """

    id: str
    change: ChangeKind
    prompt: Prompt
    expected: str
    before: str
    after: str
    before_correct: bool
    after_correct: bool
    before_log_likelihood: float | None
    after_log_likelihood: float | None


def changes(answers: Sequence[Answer], before: str, after: str) -> list[Change]:
    """What changes from the answers of system `before` to those of `after`.

    The broken ones come first, then the fixed and the different ones; those of one kind are in the order of the rows.

    Raises:
        NothingMatched: no answers of one of them.
    """
    for system in (before, after):
        demand_answers_of(answers, system)
    first = {one.id: one for one in answers if one.system == before}
    pairs = [(first[one.id], one) for one in answers if one.system == after and one.id in first]
    found = [
        Change(
            id=one.id,
            change=_kind(one, two),
            prompt=one.prompt,
            expected=one.expected,
            before=one.given,
            after=two.given,
            before_correct=one.correct,
            after_correct=two.correct,
            before_log_likelihood=one.log_likelihood,
            after_log_likelihood=two.log_likelihood,
        )
        for one, two in pairs
    ]
    return sorted(found, key=lambda one: _KINDS.index(one.change))


def demand_answers_of(answers: Sequence[Answer], system: str) -> None:
    """Raise NothingMatched, with the systems that there are, if no answer is of `system`."""
    systems = list(dict.fromkeys(one.system for one in answers))
    if system not in systems:
        raise NothingMatched(f"no answers of {system!r}", hint=f"one of {', '.join(systems)}")


def _kind(one: Answer, two: Answer) -> ChangeKind:
    if one.correct != two.correct:
        return "fixed" if two.correct else "broken"
    return "same" if one.given == two.given else "different"


def last_run(db: Path) -> str:
    """The id of the last evaluation with answers. NothingMatched if there is none.

    A failed one counts if its file holds rows, as after an interruption or the refusal of an adapter without effect.
    """
    for run in runs.all_runs(db, command="eval", limit=_MOST_RUNS):
        if METRICS.get(json.loads(run["record"])["settings"]["metric"]).kind == "likelihood":
            continue
        if run["status"] == "done" or _holds_rows(Path(run["out"])):
            return str(run["id"])
    raise NothingMatched("no evaluation with answers yet", hint="run lora eval")


def _holds_rows(path: Path) -> bool:
    try:
        return bool(read_rows(path))
    except OutputError:
        return False


def unchanged(name: str, sha256: str, files: Sequence[Path | None]) -> Task | None:
    """The task of this hash in one of `files` or in `name`; None if none of them holds it."""
    for file in (*files, Path(name)):
        if file is not None and file.is_file() and task_sha256(file) == sha256:
            return read_task(file)
    return None
