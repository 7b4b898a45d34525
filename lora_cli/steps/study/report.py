"""The report of a study: what its folder holds, as records."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, cast

from lora_cli.errors import DataError, NothingMatched
from lora_cli.formats.coefficients import COEFFICIENTS_FILE, read_coefficients
from lora_cli.metrics import METRICS
from lora_cli.models.forms import as_turns, content_of
from lora_cli.records import Coefficients, Example
from lora_cli.reports.study_facts import Change, Changes, Learnt, Row, StudyReport, Used
from lora_cli.steps.study.folder import StudyFolder
from lora_cli.steps.study.gains import Results, report_rows
from lora_cli.steps.study.plan import Cell, Study
from lora_cli.steps.study.table import grouped
from lora_cli.steps.study.verdict import best_recycled, verdict
from lora_cli.task import read_task

_SHOWN = 5
"""The changed answers of either kind that are shown."""


def study_report(folder: StudyFolder) -> StudyReport:
    """The report of the study in a folder, whether all of its cells are done or not.

    Raises:
        DataError: no study, or a damaged result.
        NothingMatched: no cell is done.
    """
    study, results = folder.study, grouped(folder)
    if not results:
        raise NothingMatched(f"{folder.path}: no cell of this study is done", hint="run lora study -o with this folder")
    metric = METRICS.get(study.evaluation["metric"])
    try:
        rows = report_rows(folder, results)
        best = best_recycled(rows, metric.better)
        undone = _undone(folder, results)
        return StudyReport(
            metric=metric.name,
            meaning=metric.summary,
            better=cast("Literal['higher', 'lower']", metric.better),
            n=rows[0].n,
            about=_about(study),
            planned=len(study.cells()),
            rows=rows,
            verdict=verdict(rows, better=metric.better),
            changes=None if best is None else _changes(folder, results, best, metric.better),
            learnt=_learnt(folder, results, best),
            adapters=_used(results),
            failed={name: error for name, error in undone.items() if error is not None},
            missing=tuple(name for name, error in undone.items() if error is None),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder.path}: a damaged result ({type(error).__name__}: {error})",
            hint="remove the folder of its cell and run the study again",
        ) from None


def _about(study: Study) -> dict[str, str]:
    """What all cells share, for people."""
    shared = study.shared
    scored = ", ".join(f"{name} {value}" for name, value in shared["evaluation"].items())
    versions = ", ".join(f"{name} {value}" for name, value in shared["versions"].items())
    return {
        "Base": f"{shared['base']}@{shared['base_version']}",
        "Precision": str(shared["dtype"]),
        "Device": str(shared["device"]),
        "Training data (sha256)": str(shared["data"]),
        "Test data (sha256)": str(shared["test"]),
        "Candidates (sha256 of their list)": str(shared["candidates"]),
        "Scored by": scored,
        "Versions": versions,
    }


def _undone(folder: StudyFolder, results: Results) -> dict[str, str | None]:
    """The cells without a result, each with its error, None if nobody tried it."""
    done, found = {cell.name for cells in results.values() for cell in cells}, dict[str, str | None]()
    for cell in folder.study.cells():
        if cell.name not in done:
            failure = folder.failure(cell.name)
            found[cell.name] = None if failure is None else failure.error
    return found


def _changes(folder: StudyFolder, results: Results, best: Row, better: str) -> Changes | None:
    """The first cell of the best system beside the base, None without a base."""
    if ("base", "") not in results:
        return None
    [base] = results["base", ""].values()
    cell, ours = next(iter(results[best.system, best.pool].items()))
    examples = {example.id: example for example in read_task(folder.test).examples}
    sign = -1 if better == "lower" else 1
    before = {answer["id"]: answer for answer in base["answers"]}
    gains = {answer["id"]: sign * (answer["value"] - before[answer["id"]]["value"]) for answer in ours["answers"]}
    after = {answer["id"]: answer for answer in ours["answers"]}

    def shown(ids: Sequence[str]) -> tuple[Change, ...]:
        return tuple(_change(examples[id], before[id], after[id]) for id in ids[:_SHOWN])

    ranked = sorted(gains, key=gains.__getitem__)
    better_ids = [id for id in reversed(ranked) if gains[id] > 0]
    worse_ids = [id for id in ranked if gains[id] < 0]
    return Changes(
        name=best.name,
        cell=cell.name,
        gained=len(better_ids),
        lost=len(worse_ids),
        same=len(gains) - len(better_ids) - len(worse_ids),
        gains=shown(better_ids),
        losses=shown(worse_ids),
    )


def _change(example: Example, before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    turns = as_turns(example)
    chat = not isinstance(example.prompt, str)
    prompt = "\n".join(f"{turn['role']}: {content_of(turn)}" if chat else content_of(turn) for turn in turns)
    return Change(
        id=example.id,
        prompt=prompt,
        expected=example.completion,
        base=before["text"],
        system=after["text"],
        base_value=float(before["value"]),
        system_value=float(after["value"]),
    )


def _learnt(folder: StudyFolder, results: Results, best: Row | None) -> tuple[Learnt, ...]:
    """The coefficients of one fit on each pool, by its first cell: of the best system, else of the first fit."""
    fits = [system for system, _ in results if folder.study.systems[system].kind == "fit"]
    system = next((one for one in [best.system if best else "", *fits] if one in fits), None)
    found = []
    for (name, _), cells in results.items():
        cell = next(iter(cells))
        file = folder.cell(cell.name) / COEFFICIENTS_FILE
        if name == system and file.is_file():
            found.append(_of_cell(cell, read_coefficients(file)))
    return tuple(found)


def _of_cell(cell: Cell, coefficients: Coefficients) -> Learnt:
    modules = coefficients.values
    return Learnt(
        cell=cell.name,
        adapters=coefficients.adapters,
        modules=tuple(modules),
        values=tuple(
            tuple(fmean(rows[place]) if place < len(rows) and rows[place] else None for rows in modules.values())
            for place in range(len(coefficients.adapters))
        ),
        by_rank=any(len(row) > 1 for rows in modules.values() for row in rows),
    )


def _used(results: Results) -> tuple[Used, ...]:
    """Every adapter that a cell was made of."""
    facts, cells = dict[str, tuple[str, str]](), dict[str, list[str]]()
    for group in results.values():
        for cell, result in group.items():
            for pinned, sha256 in result["adapters"].items():
                facts[pinned] = str(result["licences"].get(pinned) or ""), str(sha256)
                cells.setdefault(pinned, []).append(cell.name)
    return tuple(
        Used(pinned=pinned, licence=licence, sha256=sha256, cells=tuple(cells[pinned]))
        for pinned, (licence, sha256) in sorted(facts.items())
    )
