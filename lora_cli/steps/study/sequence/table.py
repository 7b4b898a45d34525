"""What came of a sequence: a[i][j] of every rule and seed, and the measures of continual learning."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_cli.metrics import METRICS
from lora_cli.plots.sequence import draw_sequence
from lora_cli.steps.study.folder import held, write_json
from lora_cli.steps.study.sequence.folder import SequenceFolder
from lora_cli.steps.study.sequence.measures import Continual, Matrix, continual, mean, mean_matrix
from lora_cli.steps.study.sequence.plan import ALONE, Cell, Plan

TABLE_FILE, PICTURE = "table.json", "heat.png"
SCHEMA = "lora.sequence.table/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One rule by one seed: its scores a[i][j] on task j after learning task i, and their measures."""

    seed: int
    a: Matrix
    measures: Continual


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTable:
    """The results of a sequence.

    `runs` holds, by rule, those of every seed whose cells are all done; `alone` the score of each seed's LoRA of each
    task on this task; `base` the bare base model's on every task, empty if it is not scored. `missing` are the names of
    the cells that are not done.
    """

    tasks: tuple[str, ...]
    metric: str
    better: str
    base: tuple[float, ...]
    alone: Mapping[int, Sequence[float]]
    runs: Mapping[str, Sequence[Run]]
    missing: tuple[str, ...]

    def mean(self, rule: str) -> tuple[list[list[float]], Continual]:
        """The mean over the seeds of a rule's scores, and of its measures."""
        runs = self.runs[rule]
        of_each = [asdict(run.measures) for run in runs]
        averaged = {name: mean([one[name] for one in of_each]) for name in of_each[0]}
        return mean_matrix([run.a for run in runs]), Continual(**averaged)

    def rows(self) -> list[dict[str, Any]]:
        """A row per rule: the mean of each measure over the seeds, and how many seeds there are."""
        return [
            {"rule": rule, "seeds": len(runs), **asdict(self.mean(rule)[1])} for rule, runs in self.runs.items() if runs
        ]

    def record(self) -> dict[str, Any]:
        """All of it as data."""
        return {
            "schema": SCHEMA,
            "tasks": [*self.tasks],
            "metric": self.metric,
            "better": self.better,
            "base": [*self.base],
            "alone": {str(seed): [*scores] for seed, scores in self.alone.items()},
            "rules": {rule: self._record(rule) for rule, runs in self.runs.items() if runs},
            "missing": [*self.missing],
        }

    def _record(self, rule: str) -> dict[str, Any]:
        a, measures = self.mean(rule)
        return {
            "mean": {"a": a, **asdict(measures)},
            "seeds": {str(run.seed): {"a": run.a, **asdict(run.measures)} for run in self.runs[rule]},
        }


def table_of(folder: SequenceFolder) -> SequenceTable:
    """The results in a sequence's folder, as far as they are there.

    Raises DataError for a folder without a sequence, or a damaged result.
    """
    plan = folder.plan
    scores = {cell.name: _scores(folder, cell) for cell in plan.cells()}
    metric = METRICS.get(plan.options.metric)
    alone = {}
    for seed in plan.every_seed:
        found = [scores[cell.name] for cell in plan.row(ALONE, seed)]
        if all(found):
            alone[seed] = [row[j] for j, row in enumerate(found)]
    return SequenceTable(
        tasks=tuple(stage.name for stage in plan.tasks),
        metric=metric.name,
        better=metric.better,
        base=tuple(scores[plan.cells()[0].name]),
        alone=alone,
        runs={rule: _runs(rule, plan, scores, alone, metric.better) for rule in plan.rules},
        missing=tuple(name for name, found in scores.items() if not found),
    )


def write_table(folder: SequenceFolder) -> SequenceTable:
    """Write the results into a sequence's folder: table.json, and heat.png of the rules that have any."""
    with held(folder.path):  # a process that adds cells in the meantime writes its table after this one
        table = table_of(folder)
        write_json(folder.path / TABLE_FILE, table.record())
        grids = {rule: table.mean(rule)[0] for rule, runs in table.runs.items() if runs}
        if grids:
            draw_sequence(folder.path / PICTURE, table.tasks, grids, METRICS.get(table.metric).summary[:-1])
    return table


def _scores(folder: SequenceFolder, cell: Cell) -> list[float]:
    """A cell's score on every task, none if the cell is not done."""
    found = folder.result(cell.name)
    return [] if found is None else [float(found["tasks"][stage.name]["value"]) for stage in folder.plan.tasks]


def _runs(
    rule: str, plan: Plan, scores: Mapping[str, list[float]], alone: Mapping[int, Sequence[float]], better: str
) -> list[Run]:
    runs = []
    for seed, singles in alone.items():
        a = [scores[cell.name] for cell in plan.row(rule, seed)]
        if all(a):
            runs.append(Run(seed=seed, a=a, measures=continual(a, singles, better=better)))
    return runs
