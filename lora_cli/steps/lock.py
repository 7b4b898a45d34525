"""The lock of a merge: every parent at its commit with the hash of its weights, the settings, the versions."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace as replace_options

from lora_cli.adapters.devices import resolve_device
from lora_cli.adapters.kinds import WEIGHTS_NAME
from lora_cli.adapters.reader import OpenAdapter
from lora_cli.adapters.store import sha256_of
from lora_cli.catalogue import Catalogue
from lora_cli.errors import DataError, NothingMatched, Refused, UsageError
from lora_cli.merge_options import MergeOptions
from lora_cli.options import setting
from lora_cli.runs import versions
from lora_cli.settings import folder_of
from lora_cli.steps.merge_plan import MergePlan

# Options that run.json of earlier versions lacks, as these versions worked.
_BEFORE = {"compact": True, "saved_modules": "refuse"}
# How far above run.json the folder may be that holds both run.json and a parent.
_MOST_UP = 3


class _Settings(MergeOptions, frozen=True, kw_only=True):
    """The settings of a merge in its run.json. Whoever sends one may have written anything into it."""

    base: str
    weights: dict[str, float]
    coefficients: str | None
    module_inputs: Any = msgspec.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """What a finished merge was made of. `parents` maps `id@commit` to the SHA-256 of the weights.

    `folders` holds those of them that were folders, with the place where the lock says that they are now, if it does.
    """

    file: Path
    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    folders: Mapping[str, Path | None]
    versions: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def options(self) -> MergeOptions:
        """The options of the locked merge. Refused where this machine lacks the device."""
        names = map(setting, MergeOptions.__struct_fields__)
        options = MergeOptions.of_settings({name: self.settings[name] for name in names})
        try:
            return replace_options(options, device=resolve_device(options.device))
        except (Refused, UsageError):
            raise Refused(
                f"the locked merge was made on {options.device!r}, which is not here",
                hint="only the same kind of device gives the same bytes",
            ) from None

    def weights(self, pinned: Sequence[str]) -> list[float]:
        """The weight of each parent of `pinned`."""
        return [self.settings["weights"][name] for name in pinned]


def lock_of(plan: MergePlan, parents: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """What goes into the run.json in `folder` as `merge.lock`."""
    return {
        "parents": {
            adapter.ref.pinned: {
                "source": adapter.ref.source,
                "sha256": parents[adapter.ref.pinned],
                **_path_to(adapter, folder),
            }
            for adapter in plan.adapters
        },
        "seed": plan.options.knobs.get("seed"),
        "versions": versions(),
    }


def read_lock(file: Path) -> Lock:
    """The lock in the run.json of a merge. DataError for a file that holds none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        lock = record["merge.lock"]
        return Lock(
            file=file,
            settings=_settings(record["settings"], lock["parents"].keys()),
            parents={name: str(parent["sha256"]) for name, parent in lock["parents"].items()},
            folders={
                name: _place(file, parent.get("path"))
                for name, parent in lock["parents"].items()
                if parent["source"] == "folder"
            },
            versions={str(name): str(version) for name, version in lock["versions"].items()},
            outputs=dict(_not_empty(record["outputs"])),
        )
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(
            f"{file}: not the run.json of a merge", hint="give the run.json beside a merged adapter"
        ) from None


def where_parents_are(lock: Lock, catalogue: Catalogue) -> list[str]:
    """What `gather` finds each parent by: its `id@commit`, or its folder where the lock leads to that.

    Nobody asks the Hub for a parent that was a folder.

    Raises:
        NothingMatched: a parent that was a folder is neither there nor in the catalogue.
        Refused: what is there has other weights, or the name of a parent from the Hub is that of a folder.
    """
    return [_folder(lock, name, catalogue) if name in lock.folders else _id_on_hub(name, lock) for name in lock.parents]


def _id_on_hub(name: str, lock: Lock) -> str:
    if folder_of(name) is not None:
        raise Refused(f"{name}: a parent from the Hub, and a folder here", hint=_by_hand(lock))
    return name


def _folder(lock: Lock, name: str, catalogue: Catalogue) -> str:
    folder = lock.folders[name]
    if folder is not None:
        if sha256_of(folder / WEIGHTS_NAME) != lock.parents[name]:
            raise Refused(f"not the adapter that was merged: {name}, in {folder}", hint=_by_hand(lock))
        return str(folder)
    try:
        return catalogue.named(name).ref.pinned
    except NothingMatched:
        raise NothingMatched(f"{name} was a folder, which is not found again", hint=_by_hand(lock)) from None


def _by_hand(lock: Lock) -> str:
    return f"name all parents: lora merge --locked {lock.file} FOLDER..."


def under_locked_names(
    lock: Lock, adapters: Sequence[OpenAdapter], inputs: Mapping[str, str]
) -> tuple[list[OpenAdapter], dict[str, str]]:
    """The adapters and their inputs under the names that the lock has for them.

    A folder's commit is a hash of its files: the same commit under another name is the same adapter in another place.
    """
    free = [name for name in lock.folders if name not in inputs]
    renamed, hashes = [], {}
    for adapter in adapters:
        ref = adapter.ref
        same = [name for name in free if name.endswith(f"@{ref.commit}")]
        if same and ref.pinned not in lock.parents:
            free.remove(same[0])
            ref = replace(ref, id=same[0].rpartition("@")[0])
        renamed.append(replace(adapter, files=replace(adapter.files, ref=ref)))
        hashes[ref.pinned] = inputs[adapter.ref.pinned]
    return renamed, hashes


def _path_to(adapter: OpenAdapter, folder: Path) -> dict[str, str]:
    """Where a parent that is a folder lies, seen from `folder`; nothing where that would tell of this machine."""
    here, there = folder.parent.resolve() / folder.name, adapter.folder
    if adapter.ref.source != "folder" or not _in_one_tree(here, there):
        return {}
    return {"path": Path(os.path.relpath(there, here)).as_posix()}


def _place(file: Path, path: Any) -> Path | None:
    """The folder of an adapter that a lock's path means; None where there is none, or where none may be looked for.

    The path is a stranger's: it is followed within the tree that `_path_to` would have written it for, through no link.
    """
    if not isinstance(path, str) or "\0" in path or Path(path).is_absolute():
        return None
    here = file.parent.resolve()
    there = Path(os.path.normpath(here / path))
    if not _in_one_tree(here, there) or there.resolve() != there:
        return None
    return there if os.path.isfile(there / WEIGHTS_NAME) else None  # noqa: PTH113 - this one never raises


def _in_one_tree(here: Path, there: Path) -> bool:
    """Whether a folder a few steps above `here`, below the user's home or elsewhere, holds both."""
    common = Path(os.path.commonpath([here, there]))
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111 - this one never raises
    above_home = home.is_relative_to(common) or common == common.parent
    return not above_home and len(here.relative_to(common).parts) <= _MOST_UP


def demand_same_parents(lock: Lock, parents: Mapping[str, str]) -> None:
    """Refused, naming each, where a parent is missing, its weights are not those that were merged, or it was none."""
    changed = [name for name, sha256 in lock.parents.items() if parents.get(name) != sha256]
    if changed:
        raise Refused(
            f"not the adapters that were merged: {', '.join(changed)}",
            hint="their commit or weights changed since, or they are not named; nothing was written",
        )
    if others := sorted(parents.keys() - lock.parents.keys()):
        raise Refused(f"not among the adapters that were merged: {', '.join(others)}", hint="leave them out")


def differences(lock: Lock) -> list[str]:
    """The versions that differ from those of the locked merge, in words."""
    now = versions()
    names = sorted(lock.versions.keys() | now.keys())
    return [
        f"{name} {lock.versions.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in names
        if lock.versions.get(name) != now.get(name)
    ]


def demand_same_outputs(lock: Lock, outputs: Mapping[str, str]) -> None:
    """Refused where the bytes that came out are not those of the locked merge; says what may be the reason."""
    wrong: Sequence[str] = [name for name, sha256 in lock.outputs.items() if outputs.get(name) != sha256]
    if wrong:
        reasons = differences(lock) or ["the same versions: another kind of processor"]
        raise Refused(f"{', '.join(wrong)} came out with other bytes than the locked merge's", hint="; ".join(reasons))


def _settings(found: Any, parents: Collection[str]) -> dict[str, Any]:
    """`found` if it is what the settings of a merge of `parents` look like; else ValueError, TypeError and the like."""
    settings = _Settings.of_settings({**_BEFORE, **found})
    if settings.weights.keys() != _not_empty(parents):
        raise ValueError("weights of other adapters than the parents")
    return settings.settings


def _not_empty(found: Any) -> Any:
    if not found:
        raise ValueError("a merge of nothing")
    return found
