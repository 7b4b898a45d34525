"""Folders of one study's shards brought together: their cells compared byte for byte, then copied."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, Self, TypeVar

from lora_cli.errors import DataError, OutputError
from lora_cli.files import open_regular, reading
from lora_cli.outputs import whole_file, writing
from lora_cli.records import Progress, patient
from lora_cli.steps.study.folder import WorkFolder, demand_free, held


class Extendable(Protocol):
    """A plan that takes what another one of the same kind adds."""

    def extended(self, other: Self) -> Self:
        """This plan with the other's parts. OutputError for a plan of other work."""


F = TypeVar("F", bound=WorkFolder)
P = TypeVar("P", bound=Extendable)
_REMAINS = ".copy"
_BLOCK = 1 << 20
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def joined(plans: Iterable[tuple[Path, P]], one: str, several: str) -> P:
    """The plan of all folders. OutputError where they differ.

    Args:
        plans: each folder with its plan, one at least.
        one: what a folder holds, in the singular, as `extended` calls it: "study".
        several: the plural.
    """
    (first, plan), *others = plans
    for folder, other in others:
        try:
            plan = plan.extended(other)
        except OutputError as error:
            message = error.message.removeprefix(f"another {one}: ")
            raise OutputError(
                f"{first} and {folder} are different {several}: {message}", hint=f"collect the shards of one {one}"
            ) from None
    return plan


@contextmanager
def held_target(
    kind: Callable[[Path], F], paths: Sequence[Path], out: Path | None, plan: str, beside: Collection[str],
    what: str = "study",
) -> Iterator[tuple[F, list[F]]]:  # fmt: skip
    """Hold the folder in which `paths` are brought together, by default the first of them.

    Yields it and the folders to bring together, of which it is the last if it holds a plan and is none of `paths`.
    Nobody else collects there or plans there in the meantime.

    Args:
        plan: the name of the plan's file.
        beside: names of what else an unfinished collection may have left there, but its cells.
        what: what the folders hold, for the message.

    Raises:
        OutputError: it cannot be written, or holds something else.
    """
    target = kind((out or paths[0]).absolute())
    with held(target.path), writing(target.path):
        found = dict.fromkeys(path.absolute() for path in paths)
        if (target.path / plan).exists():
            found |= {target.path: None}
        else:
            demand_free(target.path, beside={*beside, target.cells.name}, what=what)
        yield target, [kind(path) for path in found]


def demand_no_links(folders: Iterable[WorkFolder], beside: Collection[str]) -> None:
    """DataError for a link in the place of a cell or of what is `beside` them: it leads to no part of a study."""
    for folder in folders:
        for place in (folder.path / name for name in beside):
            if place.is_symlink():
                raise _foreign(place)
        _listed(folder)


def sources_of(folders: Sequence[F], names: Collection[str], progress: Progress) -> dict[str, F]:
    """By the name of a cell, the first folder that has its result.

    Raises:
        OutputError: two results of one cell that differ.
        DataError: a link in the place of a cell.
    """
    report, found = patient(progress), dict[str, F]()
    there = [(folder, _listed(folder)) for folder in folders]
    for done, name in enumerate(names, 1):
        having = [folder for folder, listed in there if name in listed and folder.has(name)]
        if len(having) > 1:
            first = having[0].result_bytes(name)
            for other in having[1:]:
                if other.result_bytes(name) != first:
                    raise OutputError(
                        f"one cell with different results: {having[0].cell(name)} and {other.cell(name)}",
                        hint="different hardware made them, or one was changed: remove the wrong one",
                    )
        if having:
            found[name] = having[0]
        report("comparing cells", done, len(names))
    return found


def bring_cells(sources: Mapping[str, F], target: F, progress: Progress) -> None:
    """Copy the cells that the target lacks, each whole or not at all. Nobody else writes there at the same time."""
    report = patient(progress)
    target.cells.mkdir(exist_ok=True)
    there = _listed(target)
    for left in [name for name in there if name.startswith(".") and name.endswith(_REMAINS)]:
        shutil.rmtree(target.cells / left)
    for done, (name, source) in enumerate(sources.items(), 1):
        if source.path != target.path and not (name in there and target.has(name)):
            if name in there:
                shutil.rmtree(target.cell(name))  # what a failed or killed cell left
            partial = f"{target.cells}/.{name}{_REMAINS}"
            _copy_folder(f"{source.cells}/{name}", partial)
            os.rename(partial, f"{target.cells}/{name}")  # noqa: PTH104 - texts are faster, for 100,000 cells
        report("copying cells", done, len(sources))


def bring_entries(sources: Iterable[Path], target: Path) -> None:
    """Copy the files and folders in the folders `sources` that `target` lacks, but hidden ones."""
    target.mkdir(exist_ok=True)
    for source in sources:
        if source != target and _is_folder(source):
            for entry in sorted(source.iterdir()):
                place = target / entry.name
                if not entry.name.startswith(".") and not place.exists():
                    if _is_folder(entry):
                        partial = target / f".{entry.name}{_REMAINS}"
                        shutil.rmtree(partial, ignore_errors=True)
                        _copy_folder(str(entry), str(partial))
                        partial.rename(place)
                    else:
                        bring_file(entry, place)


def bring_file(source: Path, target: Path) -> None:
    """Copy a file, unless the target is there. DataError for what is no file."""
    if source != target and not target.exists():
        if source.is_symlink() or (source.exists() and not source.is_file()):
            raise _foreign(source)
        with reading(source), open_regular(source) as opened, whole_file(target) as file:
            shutil.copyfileobj(opened, file)


def _listed(folder: WorkFolder) -> set[str]:
    """The names in the folder of its cells."""
    if not _is_folder(folder.cells):
        return set()
    with reading(folder.cells), os.scandir(folder.cells) as entries:
        found = set()
        for entry in entries:
            if entry.is_symlink():
                raise _foreign(Path(entry.path))
            found.add(entry.name)
        return found


def _is_folder(place: Path) -> bool:
    """Whether it is a folder. DataError for a link: what it leads to is no part of a study."""
    if place.is_symlink():
        raise _foreign(place)
    return place.is_dir()


def _copy_folder(source: str, target: str) -> None:
    """Copy the contents of a folder: without owners and times, which take longer than a small file itself.

    DataError for anything but files and folders.
    """
    os.mkdir(target)  # noqa: PTH102 - names as texts are what scandir gives
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _copy_folder(entry.path, f"{target}/{entry.name}")
            elif entry.is_file(follow_symlinks=False):
                _copy(entry.path, f"{target}/{entry.name}")
            else:
                raise _foreign(Path(entry.path))


def _copy(source: str, target: str) -> None:
    """Copy a file into a new one by as few calls as it takes, for 100,000 small ones."""
    opened = os.open(source, _READ)
    try:
        new = os.open(target, _WRITE, 0o666)
        try:
            while block := os.read(opened, _BLOCK):
                while block:
                    block = block[os.write(new, block) :]
        finally:
            os.close(new)
    finally:
        os.close(opened)


def _foreign(place: Path) -> DataError:
    return DataError(f"{place}: neither a file nor a folder; links and pipes are not copied", hint="remove it")
