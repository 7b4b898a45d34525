"""How good are several adapters on one loaded base: rows streamed to a file, then scores with paired intervals."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from lora_cli.algebra.lowrank import LowRank
from lora_cli.errors import NothingMatched, OutputError, UsageError
from lora_cli.files import read_regular
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import Method
from lora_cli.metrics import METRICS
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.generate import stream
from lora_cli.outputs import whole_file
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example, Progress, Score, silent
from lora_cli.scores import interval, paired_difference
from lora_cli.steps.evaluate.beside import beside_others
from lora_cli.steps.evaluate.choices import Choices, chosen, read_choices

_SAME_LIKELIHOOD = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class System:
    """Something to evaluate: the base itself (`updates` None) or the base with one update per module applied.

    `version` names the exact adapter (`id@commit`, or any text that changes when the adapter does); rows of another
    version are not reused.
    """

    name: str
    updates: Mapping[str, LowRank] | None = field(default=None, repr=False)
    version: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each module that the system changes."""
        if isinstance(self.updates, Updates):
            return self.updates.shapes
        return {module: update.shape for module, update in (self.updates or {}).items()}


class Updates(Mapping[str, LowRank]):
    """The updates of an adapter, each read on access: of many systems only the current one is in memory."""

    def __init__(self, adapter: OpenAdapter) -> None:
        self._adapter = adapter

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each update; reads none of them."""
        return {name: (module.out_features, module.in_features) for name, module in self._adapter.modules.items()}

    def __getitem__(self, module: str) -> LowRank:
        return self._adapter.read(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.modules)

    def __len__(self) -> int:
        return len(self._adapter.modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One system's answer to one example. `key` identifies all that decides the answer.

    `log_likelihood` is the mean per completion token in nats, `value` the metric's. `text` is the output or the choice,
    None if the metric judges likelihoods.
    """

    system: str
    id: str
    key: str
    log_likelihood: float
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
    progress: Progress = silent,
) -> list[Score]:
    """Score every system on every example, in the order of `systems`.

    A metric that judges outputs has them generated greedily; one that judges likelihoods or choices generates nothing.
    Differences to `baseline` are paired. `changed` counts the examples on which a system's output or choice, or else
    its likelihood, differs from the base's own; `details["moved"]` counts those on which its likelihood differs. 0 of
    both means that an adapter has no effect.

    Args:
        systems: distinct names; one of them is the base itself (`updates` None).
        options: metric (a file of `metrics`), baseline (the name of a system), the longest output, prompts per batch.
        rows_path: JSONL file to which rows are appended as they come; rows it already holds are not computed again, and
            those of other systems stay.

    Raises:
        UsageError: an unknown metric, two systems of one name.
        NothingMatched: no system called `baseline`, no examples.
        Refused: an adapter does not fit. DataError: an example or a prompt is too long, or lacks the choices that the
            metric judges.
        OutputError: the rows cannot be written, or the file holds something else.
    """
    options = options or EvalOptions()
    metric, baseline, max_new_tokens = METRICS.get(options.metric), options.baseline, options.max_new_tokens
    names = [system.name for system in systems]
    demand_systems(names, baseline=baseline)
    if not examples:
        raise NothingMatched("no examples to evaluate on")
    [itself] = [system.name for system in systems if system.updates is None]
    for system in systems:
        base.check(system.shapes, system.name)
    choices = read_choices(base, examples) if metric.kind == "choice" else {}
    encoded = read_for(base, examples, new=max_new_tokens if metric.kind == "output" else 0)
    common = [base.pinned, str(base.dtype), base.encoder.prompting.settings]
    values_of = partial(METRICS.load(metric.name), **options.knobs)
    measured = [metric.name, max_new_tokens if metric.kind == "output" else None, *options.knobs.items()]
    keys = {
        (system.name, example.id): _key([*common, system.version, system.updates is None, *measured, asdict(example)])
        for system in systems
        for example in examples
    }
    with _Rows(rows_path, keys) as rows:
        for system in systems:
            left = [example for example in examples if (system.name, example.id) not in rows.found]
            done = len(examples) - len(left)
            progress(system.name, done, len(examples))
            # All rows are stored already: do not load this system's weights.
            with base.applied(system.updates if left else None, who=system.name):
                for at in range(0, len(left), 4 * options.batch_size):
                    part = [encoded[example.id] for example in left[at : at + 4 * options.batch_size]]
                    for row in _answers(base, system.name, part, keys, choices, metric, values_of, options):
                        rows.add(row)
                        done += 1
                        progress(system.name, done, len(examples))
        found = {name: [rows.found[name, example.id] for example in examples] for name in names}
    alone = [_score(found, name, metric, baseline, itself, seed) for name in names]
    values = {name: [row.value for row in rows] for name, rows in found.items()}
    scores = beside_others(alone, values, metric, itself=itself, seed=seed)
    if metric.kind != "output":
        return scores
    cut = [
        sum(row.tokens >= max_new_tokens and not (metric.score == "share" and row.value) for row in found[name])
        for name in names
    ]
    return [replace(score, cut=count) for score, count in zip(scores, cut, strict=True)]


def read_for(base: BaseModel, examples: Sequence[Example], *, new: int) -> dict[str, Encoded]:
    """The examples as the base reads them, by id. DataError, which counts them, for those without room for `new` more
    tokens behind their prompt."""
    encoded = {one.id: one for one in base.encoder.read_all(examples)}
    lengths = {id: max(len(one.ids), len(one.opening.ids) + new) for id, one in encoded.items()}
    base.encoder.demand_room(lengths, new=new)
    return encoded


def demand_systems(names: Sequence[str], *, baseline: str) -> None:
    """Raise the errors of `evaluate` about names of systems and the baseline."""
    if len(set(names)) < len(names):
        raise UsageError(f"two systems are called {max(names, key=names.count)!r}")
    if baseline not in names:
        raise NothingMatched(f"no system {baseline!r} to be the baseline", hint=f"one of {', '.join(names)}")


def _answers(
    base: BaseModel,
    name: str,
    examples: Sequence[Encoded],
    keys: Mapping[tuple[str, str], str],
    choices: Mapping[str, Choices],
    metric: Method,
    values_of: Callable[..., Sequence[Any]],
    options: EvalOptions,
) -> Iterator[Row]:
    batch_size = options.batch_size
    if metric.kind == "choice":
        taken = chosen(base, [choices[example.id] for example in examples], values_of, batch_size=batch_size)
        for example, one in zip(examples, taken, strict=True):
            yield Row(system=name, id=example.id, key=keys[name, example.id], **one._asdict())
        return
    likelihoods = base.mean_log_likelihoods(examples, batch_size=batch_size)
    if metric.kind == "likelihood":
        for example, likelihood, value in zip(examples, likelihoods, values_of(likelihoods), strict=True):
            yield Row(
                system=name, id=example.id, key=keys[name, example.id], log_likelihood=likelihood, value=float(value)
            )
        return
    openings = [example.opening for example in examples]
    for place, written in stream(base, openings, max_new_tokens=options.max_new_tokens, batch_size=batch_size):
        example = examples[place]
        [value] = values_of([written.text if written.continues else ""], [example.answer])
        yield Row(
            system=name,
            id=example.id,
            key=keys[name, example.id],
            log_likelihood=likelihoods[place],
            value=float(value),
            text=written.text,
            tokens=written.tokens,
            seconds=written.seconds,
        )


def _score(
    found: Mapping[str, Sequence[Row]], name: str, metric: Method, baseline: str, itself: str, seed: int
) -> Score:
    rows, of_base = found[name], found[itself]
    values = [row.value for row in rows]
    n = len(rows)
    low, high = interval(metric.score, values, seed=seed)
    others = [row.value for row in found[baseline]]
    difference = None if name == baseline else paired_difference(values, others, seed=seed)
    moved = sum(
        abs(row.log_likelihood - other.log_likelihood) > _SAME_LIKELIHOOD * max(1.0, abs(other.log_likelihood))
        for row, other in zip(rows, of_base, strict=True)
    )
    rewritten = sum(row.text != other.text for row, other in zip(rows, of_base, strict=True))
    seconds = math.fsum(row.seconds for row in rows)
    return Score(
        system=name,
        metric=metric.name,
        value=math.fsum(values) / n,
        low=low,
        high=high,
        n=n,
        baseline="" if difference is None else baseline,
        delta=None if difference is None else difference.delta,
        delta_low=None if difference is None else difference.low,
        delta_high=None if difference is None else difference.high,
        p=None if difference is None else difference.p,
        changed=None if name == itself else moved if metric.kind == "likelihood" else rewritten,
        log_likelihood=math.fsum(row.log_likelihood for row in rows) / n,
        tokens_per_second=sum(row.tokens for row in rows) / seconds if seconds else None,
        details={} if name == itself else {"moved": moved},
    )


def _key(deciding: Sequence[Any]) -> str:
    """The first 16 digits of the SHA-256 of all that decides an answer."""
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


class _Rows:
    """The rows so far. With a path each one is on disk before the next batch begins."""

    def __init__(self, path: Path | None, keys: Mapping[tuple[str, str], str]) -> None:
        self.found: dict[tuple[str, str], Row] = {}
        self._others: list[Row] = []
        self._path = path
        self._keys = keys
        self._file: Any = None

    def __enter__(self) -> "_Rows":
        if self._path is not None:
            systems = {system for system, _ in self._keys}
            for row in read_rows(self._path):
                if row.system not in systems:
                    self._others.append(row)
                elif self._keys.get((row.system, row.id)) == row.key:
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
            self._file.write(_line(row))
            self._file.flush()

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
    return json.dumps(asdict(row)) + "\n"
