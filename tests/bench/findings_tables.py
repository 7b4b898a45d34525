"""The tables of docs/findings.md, in Markdown, from the cells of studies and sequences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.metrics import METRICS
from lora_cli.steps.study.folder import STUDY_FILE, StudyFolder
from lora_cli.steps.study.sequence.folder import SequenceFolder
from lora_cli.steps.study.sequence.plan import ALONE, BASE, SEQUENTIAL
from lora_cli.steps.study.sequence.table import SequenceTable, table_of

_MEASURES = ("final", "forgetting", "backward_transfer", "forward_transfer")
Values = NDArray[np.float64]
"""(seeds, examples): one row where nothing depends on the seed."""
RESAMPLES = 4_000
POWER = 1.959964 + 0.841621
"""A difference of so many standard errors is found in 80 % of repetitions, by a two-sided test at 5 %."""


class Gain(NamedTuple):
    """A difference, positive where the first is better: its 95 % interval, what could have been seen, seeds won."""

    mean: float
    low: float
    high: float
    seen: float
    won: int
    seeds: int

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of a table."""
        interval = f"[{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.mean:+.3f}", interval, f"{self.seen:.3f}", f"{self.won}/{self.seeds}"


def gain(ours: Values, theirs: Values, sign: int = 1) -> Gain:
    """The mean difference over seeds and examples; both are drawn anew, independently, for the interval."""
    difference = np.atleast_2d(sign * (ours - theirs))
    means, by_seed = _resampled(difference), difference.mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Gain(
        float(difference.mean()), float(low), float(high), POWER * float(means.std()),
        int((by_seed > 0).sum()), len(by_seed),
    )  # fmt: skip


def paired(ours: Values, theirs: Values) -> bool:
    """Whether both have the same seeds, or one does not depend on them."""
    return len(ours) == len(theirs) or 1 in (len(ours), len(theirs))


def level(values: Values) -> tuple[float, float, float]:
    """The mean over seeds and examples, and its 95 % interval."""
    low, high = np.quantile(_resampled(np.atleast_2d(values)), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _resampled(values: Values) -> Values:
    """Means over (seeds, examples) drawn with replacement, `RESAMPLES` of them."""
    rng, (seeds, examples) = np.random.default_rng(0), values.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
    of_examples = rng.multinomial(examples, np.full(examples, 1 / examples), size=RESAMPLES) / examples
    return np.asarray(np.einsum("rs,se,re->r", of_seeds, values, of_examples, optimize=True))


class Scored(NamedTuple):
    """The values of a study's systems by one metric, by (system, pool)."""

    name: str
    metric: str
    sign: int
    values: dict[tuple[str, str], Values]

    def gain(self, ours: tuple[str, str], theirs: tuple[str, str]) -> Gain | None:
        """The gain of one system over another, None where one is not done for all seeds."""
        if ours not in self.values or theirs not in self.values or not paired(self.values[ours], self.values[theirs]):
            return None
        return gain(self.values[ours], self.values[theirs], self.sign)


def read(path: Path, metric: str) -> Scored:
    """The study in a folder, as far as it is done. A study by exact matches holds the likelihoods too."""
    folder = StudyFolder(path)
    rows = dict[tuple[str, str], list[list[float]]]()
    for cell in folder.study.cells():
        if folder.has(cell.name):
            answers = {one["id"]: _value(one, metric) for one in folder.result(cell.name)["answers"]}
            rows.setdefault((cell.system, cell.pool), []).append([answers[id] for id in sorted(answers)])
    name = f"{path.parents[1].name}: {path.name.removeprefix('study-')}"
    return Scored(name, metric, _sign(metric), {key: np.asarray(found) for key, found in rows.items()})


def metrics_of(metric: str) -> tuple[str, ...]:
    """The metrics that answers scored by `metric` give."""
    return ("exact", "nll") if metric == "exact" else (metric,)


def _value(answer: Mapping[str, Any], metric: str) -> float:
    return float(-answer["log_likelihood"] if metric == "nll" else answer["value"])


def _sign(metric: str) -> int:
    return -1 if METRICS.get(metric).better == "lower" else 1


CLAIMS: Sequence[tuple[str, Sequence[tuple[tuple[str, str], tuple[str, str]]]]] = (
    ("1. Does adaptive beat the base?", [
        (("adaptive", pool), ("base", "")) for pool in ("relevant", "unrelated", "noise")
    ]),
    ("2. Does it beat a new LoRA on the same data?", [
        (("adaptive", "relevant"), ("target", "")), (("adaptive", "unrelated"), ("target", "")),
        (("adaptive+target", "relevant"), ("target", "")), (("adaptive+target", "unrelated"), ("target", "")),
        (("adaptive+target", "noise"), ("target", "")),
    ]),
    ("3. Does the choice of adapters matter?", [
        (("adaptive", "relevant"), ("adaptive", "unrelated")),
        (("adaptive+target", "relevant"), ("adaptive+target", "unrelated")),
    ]),
    ("4. Are adapters better than random weights?", [
        (("adaptive", "unrelated"), ("adaptive", "noise")), (("adaptive", "relevant"), ("adaptive", "noise")),
        (("adaptive+target", "unrelated"), ("adaptive+target", "noise")),
    ]),
    ("5. Does one relevant adapter do it alone?", [
        (("single", ""), ("base", "")), (("single", ""), ("target", "")), (("adaptive", "relevant"), ("single", "")),
    ]),
    ("6. LEGO, TIES, average: merges without fitting", [
        (("lego", pool), (other, pool)) for pool in ("relevant", "unrelated") for other in ("average", "ties")
    ] + [((one, "relevant"), ("base", "")) for one in ("average", "ties", "lego")]),
)  # fmt: skip
"""Each finding with the pairs that it is about."""


def _called(key: tuple[str, str]) -> str:
    return " ".join(filter(None, key))


def print_studies(folder: Path) -> None:
    """The scores of all studies, then a table for each finding."""
    studies = [
        read(path.parent, metric)
        for path in sorted(folder.glob(f"*/findings/study-*/{STUDY_FILE}"))
        for metric in metrics_of(StudyFolder(path.parent).study.evaluation["metric"])
    ]
    rows = [
        (one.name, one.metric, _called(key), *_level(values), str(values.shape[1]), str(values.shape[0]))
        for one in studies
        for key, values in one.values.items()
    ]
    print_table("Scores", ("task", "metric", "system", "score", "95 %", "n", "seeds"), rows)
    for title, pairs in CLAIMS:
        gains = [
            (one.name, one.metric, f"{_called(ours)} − {_called(theirs)}", *found.cells)
            for ours, theirs in pairs
            for one in studies
            if (found := one.gain(ours, theirs)) is not None
        ]
        print_table(title, ("task", "metric", "difference", "gain", "95 %", "seen from", "seeds won"), gains)


def _level(values: Values) -> tuple[str, str]:
    mean, low, high = level(values)
    return f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]"


def print_sequences(folder: Path) -> None:
    """For every sequence: each rule at the end, beside the base, the average, TIES and sequential training."""
    for path in sorted(folder.glob("*/findings/sequence-*")):
        found = SequenceFolder(path)
        if not found.result(found.plan.cells()[0].name):
            continue
        table, title = table_of(found), f"{path.parents[1].name}: {path.name.removeprefix('sequence-')}"
        for metric in metrics_of(table.metric):
            _print_finals(f"{title}, {metric}", finals(found, metric), _sign(metric))
        _print_measures(f"{title}, {table.metric}", table)


def finals(folder: SequenceFolder, metric: str) -> dict[str, Values]:
    """After the last task, the values of all tasks' test examples by each rule.

    "each alone" is the LoRA of each task on its own task.
    """
    plan = folder.plan
    tasks = [stage.name for stage in plan.tasks]
    found = dict[str, list[list[float]]]()
    alone = dict[int, list[float]]()
    for cell in plan.cells():
        result = folder.result(cell.name)
        if result is None:
            continue
        if cell.rule == ALONE:
            alone.setdefault(cell.seed, []).extend(_values(result, tasks[cell.step - 1 : cell.step], metric))
        elif cell.rule == BASE or cell.step == len(tasks):
            found.setdefault(cell.rule, []).append(_values(result, tasks, metric))
    learnt = [values for values in alone.values() if len(values) == len(found[BASE][0])]
    return {name: np.asarray(rows) for name, rows in {**found, "each alone": learnt}.items() if rows}


def _values(result: Mapping[str, Any], tasks: Sequence[str], metric: str) -> list[float]:
    """The values of the test examples of some tasks by one LoRA."""
    return [_value(answer, metric) for task in tasks for answer in result["tasks"][task]["answers"]]


def _print_finals(title: str, named: Mapping[str, Values], sign: int) -> None:
    beside = [name for name in (BASE, "average", "ties", SEQUENTIAL) if name in named]
    rows = [
        (rule, *_level(values), *(_beside(values, named[name], sign) if name != rule else "" for name in beside))
        for rule, values in named.items()
    ]
    print_table(
        f"Sequence {title}", ("after the last task", "score", "95 %", *(f"gain over {one}" for one in beside)), rows
    )


def _beside(ours: Values, theirs: Values, sign: int) -> str:
    return " ".join(gain(ours, theirs, sign).cells[:2]) if paired(ours, theirs) else ""


def _print_measures(title: str, table: SequenceTable) -> None:
    rows = [
        (row["rule"], *(f"{row[name]:.3f}" for name in _MEASURES),
         " · ".join(" ".join(f"{value:.2f}" for value in scores) for scores in table.mean(row["rule"])[0]))
        for row in table.rows()
    ]  # fmt: skip
    heading = ("rule", "final", "forgetting", "backward", "forward", "a[i][j], i by i")
    print_table(f"Measures of {title}", heading, rows)


def print_table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown, unless it is empty."""
    if rows:
        print(f"\n### {title}\n\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
