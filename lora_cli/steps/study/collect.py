"""The folders of a study's shards brought together, and the table of its cells."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_cli.errors import DataError, OutputError
from lora_cli.files import open_regular, reading
from lora_cli.outputs import whole_file, writing
from lora_cli.records import Progress, patient, silent
from lora_cli.steps.study.folder import (
    CANDIDATES_FILE,
    DATA_FILE,
    RESULT_FILE,
    STUDY_FILE,
    TABLE_FILE,
    TEST_FILE,
    StudyFolder,
    held,
    parsed_result,
)
from lora_cli.steps.study.plan import Cell, Study, study_text

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
    where two folders differ.

    Raises:
        DataError: a folder without a study, or a damaged result.
        OutputError: folders of different studies, two results of one cell that differ, or a place that cannot be
            written.
    """
    folders = [StudyFolder(path) for path in dict.fromkeys(path.absolute() for path in paths)]
    target = StudyFolder((out or paths[0]).absolute())
    if (target.path / STUDY_FILE).exists() and target.path not in [one.path for one in folders]:
        folders.append(target)
    study = _joined(folders)
    cells = sorted(study.cells())
    if [folder.path for folder in folders] != [target.path]:
        sources = _sources(folders, cells, progress)
        with held(target.path), writing(target.path):
            _bring(folders, target, study, sources, progress)
    return _table(target, cells, progress)


def _joined(folders: Sequence[StudyFolder]) -> Study:
    """The study of all folders. OutputError where they differ."""
    study = folders[0].study
    for folder in folders[1:]:
        try:
            study = study.extended(folder.study)
        except OutputError as error:
            message = error.message.removeprefix("another study: ")
            raise OutputError(
                f"{folders[0].path} and {folder.path} are different studies: {message}",
                hint="collect the shards of one study",
            ) from None
    return study


def _sources(folders: Sequence[StudyFolder], cells: Sequence[Cell], progress: Progress) -> dict[str, StudyFolder]:
    """The folder that has each cell's result. OutputError for two results of one cell that differ."""
    report, found = patient(progress), dict[str, StudyFolder]()
    for done, cell in enumerate(cells, 1):
        having = [folder for folder in folders if folder.has(cell.name)]
        if len(having) > 1:
            first = having[0].result_bytes(cell.name)
            for other in having[1:]:
                if other.result_bytes(cell.name) != first:
                    raise OutputError(
                        f"one cell with different results: {having[0].cell(cell.name)} and {other.cell(cell.name)}",
                        hint="different hardware made them, or one was changed: remove the wrong one",
                    )
        if having:
            found[cell.name] = having[0]
        report("comparing cells", done, len(cells))
    return found


def _bring(
    folders: Sequence[StudyFolder],
    target: StudyFolder,
    study: Study,
    sources: dict[str, StudyFolder],
    progress: Progress,
) -> None:
    """Copy what the target lacks; its study.json comes last."""
    report = patient(progress)
    target.cells.mkdir(exist_ok=True)
    target.shared.mkdir(exist_ok=True)
    for name in (DATA_FILE, TEST_FILE, CANDIDATES_FILE):
        _copy_file(folders[0].path / name, target.path / name)
    for done, (name, source) in enumerate(sources.items(), 1):
        if source.path != target.path and not target.has(name):
            _copy_folder(source.cell(name), target.cell(name))
        report("copying cells", done, len(sources))
    for folder in folders:
        if folder.path != target.path and folder.shared.is_dir():
            for entry in sorted(folder.shared.iterdir()):
                place = target.shared / entry.name
                if not entry.name.startswith(".") and not place.exists():
                    if entry.is_symlink():
                        raise _foreign(entry)
                    (_copy_folder if entry.is_dir() else _copy_file)(entry, place)
    with whole_file(target.path / STUDY_FILE) as file:
        file.write(study_text(study))


def _copy_file(source: Path, target: Path) -> None:
    if source != target and not target.exists():
        with reading(source), open_regular(source) as opened, whole_file(target) as file:
            shutil.copyfileobj(opened, file)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all. Nobody else writes here, so that remains of a killed copy can go."""
    partial = target.parent / f".{target.name}.copy"
    for old in (partial, target):
        if old.exists():
            shutil.rmtree(old)
    _copy_entries(str(source), str(partial))
    partial.rename(target)


def _copy_entries(source: str, target: str) -> None:
    """Copy the contents of a folder: without owners and times, which take longer than a small file itself.

    DataError for anything but files and folders: the target of a link is no part of a study.
    """
    os.mkdir(target)  # noqa: PTH102 - names as texts are what scandir gives
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _copy_entries(entry.path, f"{target}/{entry.name}")
            elif entry.is_file(follow_symlinks=False):
                shutil.copyfile(entry.path, f"{target}/{entry.name}")
            else:
                raise _foreign(Path(entry.path))


def _foreign(place: Path) -> DataError:
    return DataError(f"{place}: neither a file nor a folder; links and pipes are not copied", hint="remove it")


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
