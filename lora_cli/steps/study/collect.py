"""The folders of a study's shards brought together, and the table of its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_cli.errors import DataError
from lora_cli.outputs import whole_file
from lora_cli.records import Progress, patient, silent
from lora_cli.steps.study.folder import (
    CANDIDATES_FILE,
    DATA_FILE,
    RESULT_FILE,
    STUDY_FILE,
    TABLE_FILE,
    TEST_FILE,
    StudyFolder,
    parsed_result,
)
from lora_cli.steps.study.plan import Cell, Study, study_text
from lora_cli.steps.study.shards import (
    bring_cells,
    bring_entries,
    bring_file,
    demand_no_links,
    held_target,
    joined,
    sources_of,
)

_PARTS = (DATA_FILE, TEST_FILE, CANDIDATES_FILE, "shared")
"""What a study's folder holds beside its plan and its cells."""
_COLUMNS = ("cell", "system", "pool", "seed", "metric", "value", "n", "results")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """The table of a study: its file, and the cells that are done, that failed, and all of the plan."""

    folder: StudyFolder
    table: Path
    done: int
    failed: tuple[str, ...]
    planned: int


def collect(paths: Sequence[Path], out: Path | None = None, *, progress: Progress = silent) -> Collected:
    """Bring folders of one study together in `out`, by default the first of them, and write its table.

    Whatever the order of the folders, and however often it is done, the table has the same bytes. Nothing is written
    where two folders differ. Two processes that collect in one folder wait for each other, so that both are compared.

    Raises:
        DataError: a folder without a study, or a damaged result.
        OutputError: folders of different studies, two results of one cell that differ, or a place that cannot be
            written or holds something else.
    """
    _joined([StudyFolder(path.absolute()) for path in paths])
    with held_target(StudyFolder, paths, out, STUDY_FILE, _PARTS) as (target, folders):
        study = _joined(folders)
        cells = sorted(study.cells())
        demand_no_links(folders, _PARTS)
        if [folder.path for folder in folders] != [target.path]:
            sources = sources_of(folders, [cell.name for cell in cells], progress)
            _bring(folders, target, study, sources, progress)
        return _table(target, cells, progress)


def _joined(folders: Sequence[StudyFolder]) -> Study:
    return joined([(folder.path, folder.study) for folder in folders], "study", "studies")


def _bring(
    folders: Sequence[StudyFolder],
    target: StudyFolder,
    study: Study,
    sources: Mapping[str, StudyFolder],
    progress: Progress,
) -> None:
    """Copy what the target lacks; its study.json comes last."""
    for name in (DATA_FILE, TEST_FILE, CANDIDATES_FILE):
        bring_file(folders[0].path / name, target.path / name)
    bring_cells(sources, target, progress)
    bring_entries([folder.shared for folder in folders], target.shared)
    with whole_file(target.path / STUDY_FILE) as file:
        file.write(study_text(study))


def _table(folder: StudyFolder, cells: Sequence[Cell], progress: Progress) -> Collected:
    """Write a line for each cell with a result, sorted by name."""
    report, failed, done = patient(progress), list[str](), 0
    with whole_file(folder.path / TABLE_FILE) as file:
        for place, cell in enumerate(cells, 1):
            if (line := _line(folder, cell.name)) is not None:
                file.write(line)
                done += 1
            elif folder.failure(cell.name) is not None:
                failed.append(cell.name)
            report("reading cells", place, len(cells))
    return Collected(folder=folder, table=folder.path / TABLE_FILE, done=done, failed=tuple(failed), planned=len(cells))


def _line(folder: StudyFolder, name: str) -> bytes | None:
    try:
        data = folder.result_bytes(name)
    except FileNotFoundError:
        return None
    found = parsed_result(data, folder, name)
    try:
        row = {column: found[column] for column in _COLUMNS} | {"adapters": [*found["adapters"]]}
    except (KeyError, TypeError):
        raise DataError(f"{folder.cell(name) / RESULT_FILE}: a damaged result") from None
    return msgspec.json.encode(row) + b"\n"
