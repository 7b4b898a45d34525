"""How good are several adapters on one loaded base: rows streamed to a file, then scores with paired intervals."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lora_cli.errors import NothingMatched, OutputError, Refused, UsageError
from lora_cli.files import read_regular
from lora_cli.methods import Method
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.together import NotByRow
from lora_cli.outputs import whole_file, writing
from lora_cli.precision import remedy
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example, Progress, Score, silent
from lora_cli.scores import Difference, Interval, intervals, paired_differences
from lora_cli.steps.evaluate.beside import beside_others
from lora_cli.steps.evaluate.groups import Judging, System, Updates, groups
from lora_cli.text import counted

__all__ = ["Row", "System", "Updates", "answered", "demand_systems", "evaluate", "measured", "read_rows", "row_keys"]
_SAME_LIKELIHOOD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system's answer to one example. `key` identifies all that decides the answer.

    `log_likelihood` is the mean per completion token in nats, None if a number of the model was not finite, `value` the
    metric's. `text` is the output or the choice, None if the metric judges likelihoods.
    """

    system: str
    id: str
    key: str
    log_likelihood: float | None
    value: float
    text: str | None = None
    tokens: int = 0
    seconds: float = 0.0


def evaluate(
    base: BaseModel,
    systems: Sequence[System],
    examples: Sequence[Example],
    options: EvalOptions | None = None,
    *,
    seed: int = 0,
    rows_path: Path | None = None,
    resume: bool = True,
    progress: Progress = silent,
) -> list[Score]:
    """Score every system on every example, in the order of `systems`.

    A metric that judges outputs has them generated greedily; one that judges likelihoods or choices generates nothing.
    Differences to `baseline` are paired. `changed` counts the examples on which a system's output or choice, or else
    its likelihood, differs from the base's own; `details["moved"]` counts those on which its likelihood differs. 0 of
    both means that an adapter has no effect. `details["not_finite"]` counts those on which a number of the model is not
    finite: they count as failures, with a likelihood of the least number of fp32 or an empty answer.

    Adapters are asked together, in groups; see `groups`.

    Args:
        systems: distinct names; one of them is the base itself (`updates` None).
        options: metric (a file of `metrics`), baseline (the name of a system), the longest output, prompts at once.
        rows_path: JSONL file to which rows are appended as they come; rows it already holds are not computed again, and
            those of other systems stay.
        resume: False to compute the rows that it already holds again.

    Raises:
        UsageError: an unknown metric, two systems of one name.
        NothingMatched: no system called `baseline`, no examples.
        Refused: an adapter does not fit, or a likelihood of the base itself is not finite.
        DataError: an example or a prompt is too long, or lacks the choices that the metric judges.
        OutputError: the rows cannot be written, or the file holds something else.
    """
    options = options or EvalOptions()
    metric, baseline, max_new_tokens = METRICS.get(options.metric), options.baseline, options.max_new_tokens
    names = [system.name for system in systems]
    demand_systems(names, baseline=baseline)
    [itself] = [system.name for system in systems if system.updates is None]
    found = answered(base, systems, examples, options, rows_path=rows_path, resume=resume, progress=progress)
    values = {name: [row.value for row in rows] for name, rows in found.items()}
    alone = _scores(found, values, metric, baseline, itself, seed)
    scores = beside_others(alone, values, metric, itself=itself, seed=seed)
    if metric.kind != "output":
        return scores
    cut = [
        sum(row.tokens >= max_new_tokens and not (metric.score == "share" and row.value) for row in found[name])
        for name in names
    ]
    return [replace(score, cut=count) for score, count in zip(scores, cut, strict=True)]


def answered(
    base: BaseModel,
    systems: Sequence[System],
    examples: Sequence[Example],
    options: EvalOptions,
    *,
    rows_path: Path | None = None,
    resume: bool = True,
    part: int | None = None,
    progress: Progress = silent,
) -> dict[str, list[Row]]:
    """The row of every system for every example, in the order of both.

    Args:
        rows_path, resume: as in `evaluate`.
        part: so many examples are asked together, and again together where rows of them are missing. What stands in
            one batch moves the last bit of a likelihood: with parts and a `batch_size`, a resumed evaluation ends with
            the same bits.

    Raises as `evaluate` does about examples, adapters and rows.
    """
    if not examples:
        raise NothingMatched("no examples to evaluate on")
    names = [system.name for system in systems]
    for system in systems:
        if system.updates is not None:
            base.check(system.shapes, system.name)
    judging = Judging.of(base, examples, options)
    metric = judging.metric
    common = [base.pinned, base.arithmetic, base.encoder.prompting.settings]
    keys = row_keys(systems, examples, common, measured(metric, options, judging.values_of.keywords))
    ids = [*judging.encoded]
    with _Rows(rows_path, keys, resume) as rows:
        report = partial(progress, names[0] if len(names) == 1 else counted(len(names), "system"))
        report(len(rows.found), len(keys))
        for start in range(0, len(ids), part or len(ids)):
            together = ids[start : start + (part or len(ids))]
            if part is not None:
                rows.keep_whole(names, together)
            # The weights of a system whose rows are all stored already are not loaded.
            waiting = [system for system in systems if any((system.name, id) not in rows.found for id in together)]
            for group in groups(base, waiting, generates=metric.kind == "output"):
                try:
                    _fill(rows, group, judging, together, report)
                except NotByRow:
                    for system in group:
                        _fill(rows, [system], judging, together, report)
        return {name: [rows.found[name, example.id] for example in examples] for name in names}


def demand_systems(names: Sequence[str], *, baseline: str) -> None:
    """Raise the errors of `evaluate` about names of systems and the baseline."""
    if len(set(names)) < len(names):
        raise UsageError(f"two systems are called {max(names, key=names.count)!r}")
    if baseline not in names:
        raise NothingMatched(f"no system {baseline!r} to be the baseline", hint=f"one of {', '.join(names)}")


def _fill(
    rows: "_Rows",
    group: Sequence[System],
    judging: Judging,
    ids: Sequence[str],
    report: Callable[[int, int], None],
) -> None:
    """Have the systems answer all of `ids` that is not among the rows. Refused if the base itself cannot."""
    left = {system.name: [id for id in ids if (system.name, id) not in rows.found] for system in group}
    for ended in judging.outcomes(group, left):
        for system, id, outcome in ended:
            if outcome.log_likelihood is None and system.updates is None:
                raise Refused(
                    f"the likelihood of example {id} is not finite in {judging.base.dtype_name}",
                    hint=remedy(judging.base.dtype_name, "check the weights of the base"),
                )
            rows.add(Row(system=system.name, id=id, key=rows.keys[system.name, id], **outcome._asdict()))
            report(len(rows.found), len(rows.keys))


def measured(metric: Method, options: EvalOptions, knobs: Mapping[str, Any]) -> list[Any]:
    """What decides an answer beside the base: the metric, its knobs, and the tokens that may be generated."""
    return [metric.name, options.max_new_tokens if metric.kind == "output" else None, *knobs.items()]


def row_keys(
    systems: Sequence[System], examples: Sequence[Example], common: Sequence[Any], measured: Sequence[Any]
) -> dict[tuple[str, str], str]:
    """By system and example the first 16 digits of the SHA-256 of all that decides the answer, as JSON.

    Args:
        common: the base at its version, its arithmetic, and the settings of its prompting.
        measured: what of it is measured, by `measured`.
    """
    last = {example.id: json.dumps(asdict(example), sort_keys=True) for example in examples}
    found = {}
    for system in systems:
        first = json.dumps([*common, system.version, system.updates is None, *measured], sort_keys=True)[:-1]
        for id, text in last.items():
            found[system.name, id] = hashlib.sha256(f"{first}, {text}]".encode()).hexdigest()[:16]
    return found


def _scores(
    found: Mapping[str, Sequence[Row]],
    values: Mapping[str, Sequence[float]],
    metric: Method,
    baseline: str,
    itself: str,
    seed: int,
) -> list[Score]:
    bounds = intervals(metric.score, list(values.values()), seed=seed)
    compared = [name for name in found if name != baseline]
    differences = paired_differences([values[name] for name in compared], values[baseline], seed=seed)
    by_name = dict(zip(compared, differences, strict=True))
    return [
        _score(found, name, metric, baseline, itself, interval, by_name.get(name))
        for name, interval in zip(found, bounds, strict=True)
    ]


def _score(
    found: Mapping[str, Sequence[Row]],
    name: str,
    metric: Method,
    baseline: str,
    itself: str,
    interval: Interval,
    difference: Difference | None,
) -> Score:
    rows, of_base = found[name], found[itself]
    n = len(rows)
    moved = sum(_differ(row.log_likelihood, other.log_likelihood) for row, other in zip(rows, of_base, strict=True))
    finite = [row.log_likelihood for row in rows if row.log_likelihood is not None]
    rewritten = sum(row.text != other.text for row, other in zip(rows, of_base, strict=True))
    seconds = math.fsum(row.seconds for row in rows)
    return Score(
        system=name,
        metric=metric.name,
        value=math.fsum(row.value for row in rows) / n,
        low=interval.low,
        high=interval.high,
        n=n,
        baseline="" if difference is None else baseline,
        delta=None if difference is None else difference.delta,
        delta_low=None if difference is None else difference.low,
        delta_high=None if difference is None else difference.high,
        p=None if difference is None else difference.p,
        changed=None if name == itself else moved if metric.kind == "likelihood" else rewritten,
        log_likelihood=math.fsum(finite) / n if len(finite) == n else None,
        tokens_per_second=sum(row.tokens for row in rows) / seconds if seconds else None,
        details=({} if name == itself else {"moved": moved})
        | ({} if len(finite) == n else {"not_finite": n - len(finite)}),
    )


def _differ(one: float | None, other: float | None) -> bool:
    """Whether two likelihoods differ by more than rounding does."""
    if one is None or other is None:
        return one is not other
    return abs(one - other) > _SAME_LIKELIHOOD * max(1.0, abs(other))


class _Rows:
    """The rows so far. With a path each one is on disk before the next batch begins."""

    def __init__(self, path: Path | None, keys: Mapping[tuple[str, str], str], resume: bool = True) -> None:
        self.found: dict[tuple[str, str], Row] = {}
        self._others: list[Row] = []
        self._path, self._resume = path, resume
        self.keys = keys
        self._file: Any = None

    def __enter__(self) -> "_Rows":
        if self._path is not None:
            systems = {system for system, _ in self.keys}
            for row in read_rows(self._path):
                if row.system not in systems:
                    self._others.append(row)
                elif self._resume and self.keys.get((row.system, row.id)) == row.key:
                    self.found[row.system, row.id] = row
            self._file = self._rewritten(self._path)
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, row: Row) -> None:
        """Add one row."""
        self.found[row.system, row.id] = row
        if self._file is not None:
            assert self._path is not None
            try:
                self._file.write(_line(row))
                self._file.flush()
            except OSError:
                with writing(self._path):
                    raise

    def keep_whole(self, systems: Sequence[str], ids: Sequence[str]) -> None:
        """Forget the rows of each system that lacks one of `ids`."""
        for name in systems:
            if any((name, id) not in self.found for id in ids):
                for id in ids:
                    self.found.pop((name, id), None)

    def _rewritten(self, path: Path) -> Any:
        """The file opened for appending, without the outdated rows of these systems."""
        with whole_file(path) as file:
            file.write("".join(map(_line, [*self._others, *self.found.values()])).encode())
        try:
            # Without following a link that was put there meanwhile.
            return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW), "a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def read_rows(path: Path) -> list[Row]:
    """The rows in a file, none if there is no file. OutputError for a file that holds something else."""
    try:
        lines = read_regular(path).decode().split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: not a file of evaluation rows", hint="choose another file with -o") from error
    rows = []
    # Text after the last line break is a row whose writing was interrupted.
    for line in lines[:-1]:
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise OutputError(f"{path}: not a file of evaluation rows", hint="choose another file with -o") from error
    return rows


def _row(fields: Any) -> Row:
    if isinstance(fields, dict) and "correct" in fields:  # written when there were exact and nll, without a value
        correct, log_likelihood = fields.pop("correct"), fields["log_likelihood"]
        fields["value"] = -log_likelihood if correct is None else float(correct)
    return msgspec.convert(fields, Row)


def _line(row: Row) -> str:
    return msgspec.json.encode(row).decode() + "\n"
