"""The report of a sequence: what its folder holds, as records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, cast

from lora_cli.errors import DataError, NothingMatched
from lora_cli.metrics import METRICS
from lora_cli.reports.study_facts import Control, Gain, Role, Row, Ruled, SequenceReport, Taught, Trained
from lora_cli.scores import interval
from lora_cli.steps.study.folder import COST_FILE
from lora_cli.steps.study.gains import family_of, mean_noted, noted
from lora_cli.steps.study.sequence.folder import SequenceFolder
from lora_cli.steps.study.sequence.plan import ALONE, BASE, SEQUENTIAL, Cell, Plan, rule_of
from lora_cli.steps.study.sequence.table import SequenceTable, table_of
from lora_cli.steps.study.sequence.verdict import MERGING
from lora_cli.steps.study.table import score_of
from lora_cli.steps.study.verdict import verdict

_ROLES: Mapping[str, Role] = {BASE: "base", ALONE: "alone", SEQUENTIAL: "sequential"}
_CONTROLS: Sequence[tuple[Control, str]] = (("base", BASE), ("sequential", SEQUENTIAL), ("alone", ALONE))
_PINNED = "base:"
Values = Mapping[tuple[str, str], float]
"""By the name of a task and the id of a test example: the value of an answer, or its mean over seeds."""


def sequence_report(folder: SequenceFolder) -> SequenceReport:
    """The report of the sequence in a folder, whether all of its cells are done or not.

    Raises:
        DataError: no sequence, or a damaged result.
        NothingMatched: no rule is done for a whole seed.
    """
    table = table_of(folder)
    if not any(table.runs.values()):
        raise NothingMatched(
            f"{folder.path}: no rule of this sequence is done by any seed", hint="run lora study --sequence -o with it"
        )
    try:
        return _report(folder, table)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder.path}: a damaged result ({type(error).__name__}: {error})",
            hint="remove the folder of its cell and run the sequence again",
        ) from None


def _report(folder: SequenceFolder, table: SequenceTable) -> SequenceReport:
    plan, metric = folder.plan, METRICS.get(table.metric)
    seeds = _seeds(plan, table)
    values = {name: _mean([_values(folder, name, seed) for seed in found]) for name, found in seeds.items() if found}
    order = _order(values, plan, metric.better)
    gains = _gains(values, order, -1.0 if metric.better == "lower" else 1.0)
    rows = tuple(_row(folder, name, seeds[name], values[name], gains) for name in values)
    failed = {name: failure.error for name in table.missing if (failure := folder.failure(name)) is not None}
    return SequenceReport(
        metric=metric.name,
        meaning=metric.summary,
        better=cast("Literal['higher', 'lower']", metric.better),
        n=rows[0].n,
        about=_about(plan),
        planned=len(plan.cells()),
        rows=rows,
        verdict=verdict(rows, better=metric.better, asks=MERGING),
        failed=failed,
        missing=tuple(name for name in table.missing if name not in failed),
        tasks=_tasks(plan, table, values[next(iter(values))]),
        rules=tuple(_ruled(plan, rule, table) for rule in plan.rules if table.runs[rule]),
        order=order,
        loras=tuple(_trained(folder, cell) for seed in table.alone for cell in plan.row(ALONE, seed)),
    )


def _seeds(plan: Plan, table: SequenceTable) -> dict[str, list[int]]:
    """The seeds that are done, by rule; the base has one result for all of them."""
    found = {BASE: [plan.seed] if table.base else [], ALONE: [*table.alone]}
    return {**found, **{rule: [run.seed for run in table.runs[rule]] for rule in plan.rules}}


def _values(folder: SequenceFolder, name: str, seed: int) -> Values:
    """The value of every test example after the last task; of the LoRAs alone, each on its own task."""
    plan = folder.plan
    cells = plan.row(name, seed) if name != BASE else plan.cells()[:1]
    places = zip(plan.tasks, cells if name == ALONE else [cells[-1]] * len(plan.tasks), strict=True)
    found = dict[tuple[str, str], float]()
    for stage, cell in places:
        answers = _result(folder, cell)["tasks"][stage.name]["answers"]
        found.update({(stage.name, str(answer["id"])): float(answer["value"]) for answer in answers})
    return found


def _result(folder: SequenceFolder, cell: Cell) -> dict[str, Any]:
    found = folder.result(cell.name)
    if found is None:
        raise DataError(f"{folder.cell(cell.name)}: it had a result a moment ago")
    return found


def _mean(runs: Sequence[Values]) -> dict[tuple[str, str], float]:
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError("cells that answer different examples")
    return {key: fmean(run[key] for run in runs) for key in runs[0]}


def _weighted(values: Values) -> list[float]:
    """Values whose mean is the mean over tasks, each of which counts the same however many examples it has."""
    counts: dict[str, int] = {}
    for task, _ in values:
        counts[task] = counts.get(task, 0) + 1
    return [value * len(values) / (len(counts) * counts[task]) for (task, _), value in values.items()]


def _order(values: Mapping[str, Values], plan: Plan, better: str) -> tuple[str, ...]:
    sign = 1 if better == "lower" else -1
    return tuple(sorted((rule for rule in plan.rules if rule in values), key=lambda rule: sign * _final(values[rule])))


def _final(values: Values) -> float:
    return fmean(_weighted(values))


def _gains(values: Mapping[str, Values], order: Sequence[str], sign: float) -> dict[str, dict[Control, Gain]]:
    """The gains by rule and control; all that are compared with one control are a family of Holm's correction."""
    families: dict[Control, dict[str, str]] = {
        control: {name: other for name in values if name != other} for control, other in _CONTROLS if other in values
    }
    families["next"] = dict(pairwise(order))
    found: dict[str, dict[Control, Gain]] = {name: {} for name in values}
    for control, others in families.items():
        pairs = {name: _weighted(_less(values[name], values[other], sign)) for name, other in others.items()}
        for name, gain in family_of(pairs).items():
            found[name][control] = gain
    return found


def _less(ours: Values, theirs: Values, sign: float) -> Values:
    return {key: sign * (value - theirs[key]) for key, value in ours.items()}


def _row(
    folder: SequenceFolder,
    name: str,
    seeds: Sequence[int],
    values: Values,
    gains: Mapping[str, Mapping[Control, Gain]],
) -> Row:
    metric, weighted = METRICS.get(folder.plan.options.metric), _weighted(values)
    kind = score_of(metric.score, {str(place): value for place, value in enumerate(weighted)})
    bounds = interval(kind, weighted)
    return Row(
        system=name,
        pool="",
        role=_ROLES.get(name, "merge"),
        value=fmean(weighted),
        low=bounds.low,
        high=bounds.high,
        n=len(weighted),
        by_seed=tuple(_final(_values(folder, name, seed)) for seed in seeds),
        drawn=name != BASE,
        gains=gains[name],
        seconds=mean_noted([noted(_costs(folder, name, seed), "seconds") for seed in seeds]),
        tokens=mean_noted([noted(_costs(folder, name, seed), "tokens") for seed in seeds]),
    )


def _costs(folder: SequenceFolder, name: str, seed: int) -> list[Path]:
    """The files about what all cells of a rule and a seed took, with the LoRAs alone that they are made of."""
    cells = folder.plan.row(name, seed) if name != BASE else folder.plan.cells()[:1]
    wanted = dict.fromkeys([need for cell in cells for need in cell.needs] + [cell.name for cell in cells])
    return [folder.cell(one) / COST_FILE for one in wanted]


def _ruled(plan: Plan, rule: str, table: SequenceTable) -> Ruled:
    runs, of_each = table.runs[rule], [asdict(run.measures) for run in table.runs[rule]]
    method, weights = "none: it is trained on", ""
    if rule != SEQUENTIAL:
        merge = plan.merge(rule, plan.seed)
        clusters = f", {merge.knobs['clusters']} clusters" if "clusters" in merge.knobs else ""
        method, weights = f"{merge.method}{clusters}", "(t − 1)/t and 1/t" if rule_of(rule).mean else "1 and 1"
    return Ruled(
        rule=rule,
        method=method,
        weights=weights,
        seeds=tuple(run.seed for run in runs),
        a=tuple(tuple(row) for row in table.mean(rule)[0]),
        measures={name: tuple(one[name] for one in of_each) for name in of_each[0]},
    )


def _tasks(plan: Plan, table: SequenceTable, values: Values) -> tuple[Taught, ...]:
    counts = [sum(task == stage.name for task, _ in values) for stage in plan.tasks]
    bases: Sequence[float | None] = table.base or [None] * len(plan.tasks)
    return tuple(
        Taught(name=stage.name, n=n, train=stage.train, test=stage.test, base=base)
        for stage, n, base in zip(plan.tasks, counts, bases, strict=True)
    )


def _trained(folder: SequenceFolder, cell: Cell) -> Trained:
    outputs = _result(folder, cell)["outputs"]
    weights = next((str(sha256) for name, sha256 in outputs.items() if name.endswith(".safetensors")), "")
    return Trained(cell=cell.name, task=folder.plan.tasks[cell.step - 1].name, sha256=weights)


def _about(plan: Plan) -> dict[str, str]:
    """What all cells share, for people."""

    def told(given: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in given.items() if value not in (None, ""))

    base = plan.shared["base"]
    pinned = [name.removeprefix(_PINNED) for name in base if name.startswith(_PINNED)]
    return {
        "Base": ", ".join(pinned) or plan.base.place,
        "Precision": str(base["dtype"]),
        "Device": str(base["device"]),
        "New LoRA": told(plan.lora),
        "Its training": told(plan.recipe),
        "Rank of the running LoRA": plan.rank,
        "Scored by": told(plan.evaluation),
        "Versions": told(plan.shared["versions"]),
    }
