"""The results of a study: each system on each pool, in the mean over its seeds, beside its controls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lora_cli.errors import DataError
from lora_cli.metrics import METRICS
from lora_cli.scores import Difference, interval, paired_differences
from lora_cli.steps.study.folder import RESULT_FILE, StudyFolder
from lora_cli.steps.study.plan import Cell, Study

Values = Mapping[str, float]
"""By the id of a test example: the value of an answer, or its mean over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A system on a pool ("" for none): its score in the mean over `cells`, which differ in their seeds.

    `low`..`high` is the 95 % interval over the `n` test examples, each first averaged over the seeds. `against` holds
    the paired difference to each control: "base", "target", and "noise", which is this system on the noise pool.
    `wins` and `losses` count the examples on which it is better or worse than the base.
    """

    system: str
    pool: str
    cells: tuple[Cell, ...]
    n: int
    value: float
    low: float
    high: float
    against: Mapping[str, Difference]
    wins: int | None
    losses: int | None


def lines(folder: StudyFolder, *, seed: int = 0) -> list[Line]:
    """A line for each system on each pool of which at least one cell is done, in the plan's order."""
    groups = grouped(folder)
    values = {key: mean_values([*results.values()]) for key, results in groups.items()}
    return [_line(folder.study, *key, [*results], values, seed) for key, results in groups.items()]


def grouped(folder: StudyFolder) -> dict[tuple[str, str], dict[Cell, dict[str, Any]]]:
    """The results that are there, by (system, pool) and cell, in the plan's order.

    Raises DataError for a result that is damaged, or that answers other examples than the one before.
    """
    cells, results, groups = folder.study.cells(), _Results(folder), dict[tuple[str, str], dict[Cell, dict[str, Any]]]()
    done = folder.done(cells)
    for cell in cells:
        if cell.name in done:
            groups.setdefault((cell.system, cell.pool), {})[cell] = results.of(cell.name)
    return groups


class _Results:
    """The results in a study's folder, which answer the same examples."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder, self._first = folder, frozenset[str]()
        self._is_share = METRICS.get(folder.study.evaluation["metric"]).score == "share"

    def of(self, name: str) -> dict[str, Any]:
        """The result of a cell."""
        found = self._folder.result(name)
        ids = frozenset(answer["id"] for answer in found["answers"])
        self._first = self._first or ids
        if ids != self._first:
            raise self._damaged(name, "answers other examples than the other cells")
        if self._is_share and not all(0 <= answer["value"] <= 1 for answer in found["answers"]):
            raise self._damaged(name, "an answer's value is not between 0 and 1")
        return found

    def _damaged(self, name: str, fault: str) -> DataError:
        file = self._folder.cell(name) / RESULT_FILE
        return DataError(f"{file}: {fault}", hint="remove its folder and run the study again")


def mean_values(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean value of each test example over the results of cells that differ in their seeds."""
    found = [{answer["id"]: answer["value"] for answer in result["answers"]} for result in results]
    return {id: fmean(values[id] for values in found) for id in found[0]}


def score_of(score: str, values: Values) -> str:
    """The score that values have after their mean over seeds: a "share" has Wilson's interval while all are 0 or 1."""
    return score if {*values.values()} <= {0.0, 1.0} else "mean"


def controls(study: Study, system: str, pool: str) -> dict[str, tuple[str, str]]:
    """The controls of a system on a pool, by name: (system, pool) of each."""
    noises = [name for name, rule in study.pools.items() if rule.noise]
    found = {"base": ("base", ""), "target": ("target", "")}
    if noises and pool and not study.pools[pool].noise:
        found["noise"] = system, noises[0]
    return {name: key for name, key in found.items() if key != (system, pool)}


def _line(
    study: Study, system: str, pool: str, cells: Sequence[Cell], values: Mapping[tuple[str, str], Values], seed: int
) -> Line:
    metric, ours = METRICS.get(study.evaluation["metric"]), values[system, pool]
    bounds = interval(score_of(metric.score, ours), [*ours.values()], seed=seed)
    others = {name: values[key] for name, key in controls(study, system, pool).items() if key in values}
    against = {
        name: paired_differences([[*ours.values()]], [theirs[id] for id in ours], seed=seed)[0]
        for name, theirs in others.items()
    }
    sign = -1 if metric.better == "lower" else 1
    moved = [sign * (ours[id] - others["base"][id]) for id in ours] if "base" in others else None
    return Line(
        system=system,
        pool=pool,
        cells=tuple(cells),
        n=len(ours),
        value=fmean(ours.values()),
        low=bounds.low,
        high=bounds.high,
        against=against,
        wins=None if moved is None else sum(one > 0 for one in moved),
        losses=None if moved is None else sum(one < 0 for one in moved),
    )


def row_of(line: Line) -> dict[str, Any]:
    """A line as data."""
    row: dict[str, Any] = {
        "name": "-".join(filter(None, [line.system, line.pool])),
        "system": line.system,
        "pool": line.pool,
        "seeds": len(line.cells),
        "n": line.n,
        "value": line.value,
        "low": line.low,
        "high": line.high,
        "wins": line.wins,
        "losses": line.losses,
    }
    for name in ("base", "target", "noise"):
        row |= _parts(name, line.against.get(name))
    return row


def _parts(name: str, one: Difference | None) -> dict[str, float | None]:
    parts = ("delta", "low", "high", "p")
    return {f"{name}_{part}": None if one is None else getattr(one, part) for part in parts}
