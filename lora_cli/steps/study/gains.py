"""The rows of a study's report: scores, costs, and gains over each control with their p values corrected."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar, cast

from lora_cli.files import read_regular
from lora_cli.metrics import METRICS
from lora_cli.reports.study_facts import CONTROLS, Control, Gain, Role, Row
from lora_cli.scores import holm, interval, paired_differences
from lora_cli.steps.study.folder import COST_FILE, StudyFolder
from lora_cli.steps.study.plan import Cell, Need, Study
from lora_cli.steps.study.table import controls, mean_values, score_of

K = TypeVar("K")
Key = tuple[str, str]
Results = Mapping[Key, Mapping[Cell, Mapping[str, Any]]]
"""By (system, pool) and cell."""


def report_rows(folder: StudyFolder, results: Results) -> tuple[Row, ...]:
    """A row for each system on each pool of which a cell is done, in the plan's order."""
    study, metric = folder.study, METRICS.get(folder.study.evaluation["metric"])
    values = {key: mean_values([*cells.values()]) for key, cells in results.items()}
    gains = _gains(study, values, -1.0 if metric.better == "lower" else 1.0)
    needs = study.needs(cell for cells in results.values() for cell in cells)
    rows = []
    for key, cells in results.items():
        bounds = interval(score_of(metric.score, values[key]), [*values[key].values()])
        rows.append(
            Row(
                system=key[0],
                pool=key[1],
                role=_role(study, *key),
                value=fmean(values[key].values()),
                low=bounds.low,
                high=bounds.high,
                n=len(values[key]),
                by_seed=tuple(float(result["value"]) for result in cells.values()),
                drawn=any(cell.seed is not None for cell in cells),
                gains={control: found[key] for control, found in gains.items() if key in found},
                seconds=mean_noted([_cost(folder, cell, needs, "seconds") for cell in cells]),
                tokens=mean_noted([_cost(folder, cell, needs, "tokens") for cell in cells]),
            )
        )
    return tuple(rows)


def _role(study: Study, system: str, pool: str) -> Role:
    if pool and study.pools[pool].noise:
        return "noise"
    kind = study.systems[system].kind
    return kind if kind in ("base", "target") else "recycled"


def _gains(study: Study, values: Mapping[Key, Mapping[str, float]], sign: float) -> dict[Control, dict[Key, Gain]]:
    """The gains over each control; all that are compared with one control are a family of Holm's correction."""
    found: dict[Control, dict[Key, Gain]] = {}
    for control in CONTROLS:
        pairs = {}
        for key, ours in values.items():
            other = controls(study, *key).get(control)
            if other is not None and other in values:
                theirs = values[other]
                pairs[key] = tuple(sign * (value - theirs[id]) for id, value in ours.items())
        found[control] = family_of(pairs)
    return found


def family_of(pairs: Mapping[K, Sequence[float]]) -> dict[K, Gain]:
    """The gains behind paired differences on the same examples, corrected for their number by Holm."""
    if not pairs:
        return {}
    n = len(next(iter(pairs.values())))
    differences = paired_differences([*pairs.values()], [0.0] * n)
    corrected = holm([one.p for one in differences])
    return {
        key: Gain(pairs=tuple(gains), found=found, p_holm=p)
        for (key, gains), found, p in zip(pairs.items(), differences, corrected, strict=True)
    }


def _cost(folder: StudyFolder, cell: Cell, needs: Mapping[str, Need], what: str) -> float | None:
    """What a cell took, with all of the shared work that it needs; None where some of it is not noted."""
    wanted, files = [*cell.needs], [folder.cell(cell.name) / COST_FILE]
    for name in wanted:
        files.append(folder.cost(name))
        wanted += [one for one in needs[name].needs if one not in wanted]
    return noted(files, what)


def noted(files: Sequence[Path], what: str) -> float | None:
    """The sum of "seconds" or "tokens" in files about what work took; None where one does not tell."""
    try:
        return sum(float(json.loads(read_regular(file))[what]) for file in files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def mean_noted(found: Sequence[float | None]) -> float | None:
    """The mean, None where one is not known."""
    return None if None in found else fmean(cast("Sequence[float]", found))
