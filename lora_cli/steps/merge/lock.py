"""The lock of a merge: every parent at its commit with the hash of its weights, the settings, the versions."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace as replace_options

from lora_cli.algebra.devices import resolve_device
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import DataError, NothingMatched, Refused, UsageError
from lora_cli.files import read_given
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.run_record import versions
from lora_cli.hashes import sha256_of
from lora_cli.merge_options import MergeOptions
from lora_cli.options import setting
from lora_cli.settings import folder_of
from lora_cli.steps.merge.plan import MergePlan

# Options that run.json of earlier versions lacks, with the values those versions used.
_BEFORE = {"compact": True, "saved_modules": "refuse"}
_ARITHMETIC = 3
"""The way in which merges round. In 2 the leading directions of a sum come from Gram matrices, not from QR; methods of
many ranks work on the shorter side of the update. In 3 dense results are reduced by another search."""
# How far above run.json the folder may be that holds both run.json and a parent.
_MOST_UP = 3


class _Settings(MergeOptions, frozen=True, kw_only=True):
    """The settings of a merge in its run.json, which comes from strangers and may hold anything."""

    base: str
    weights: dict[str, float]
    coefficients: str | None
    module_inputs: Any = msgspec.UNSET
    order: list[str] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """The ingredients of a finished merge. `parents` maps `id@commit` to the SHA-256 of the weights.

    `folders` maps each parent that was a folder to the path that the lock gives for it, if any. `earlier` is true for a
    run.json of a version that wrote the configuration in another form; `outputs` then holds the weights alone.
    `arithmetic` numbers the way in which its version rounded.
    """

    file: Path
    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    folders: Mapping[str, Path | None]
    versions: Mapping[str, str]
    outputs: Mapping[str, str]
    arithmetic: int
    earlier: bool = False

    @property
    def options(self) -> MergeOptions:
        """The options of the locked merge. Refused where this machine lacks the device."""
        names = map(setting, MergeOptions.__struct_fields__)
        options = MergeOptions.of_settings({name: self.settings[name] for name in names})
        try:
            return replace_options(options, device=resolve_device(options.device))
        except (Refused, UsageError):
            raise Refused(
                f"the locked merge was made on {options.device!r}, which this machine lacks",
                hint="only the same kind of device gives the same bytes",
            ) from None

    def weights(self, pinned: Sequence[str]) -> list[float]:
        """The weight of each parent of `pinned`."""
        return [self.settings["weights"][name] for name in pinned]

    def in_order(self, adapters: Sequence[OpenAdapter]) -> list[OpenAdapter]:
        """The parents in the order of the locked merge, if its method has one."""
        order = self.settings.get("order", [])
        return sorted(adapters, key=lambda one: order.index(one.ref.pinned)) if order else list(adapters)


def lock_of(plan: MergePlan, parents: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """The entry `merge.lock` for the run.json in `folder`."""
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
        "arithmetic": _ARITHMETIC,
    }


def read_lock(file: Path) -> Lock:
    """The lock in the run.json of a merge. DataError for a file without a lock."""
    try:
        record = json.loads(read_given(file).decode())
        lock = record["merge.lock"]
        outputs, earlier = dict(_not_empty(record["outputs"])), _is_earlier(record["settings"])
        if earlier:
            # The same configuration is written in another form today; the weights have to come out byte for byte.
            outputs.pop(CONFIG_NAME, None)
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
            outputs=outputs,
            arithmetic=int(lock.get("arithmetic", 1)),
            earlier=earlier,
        )
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(
            f"{file}: not the run.json of a merge", hint="give the run.json beside a merged adapter"
        ) from None


def where_parents_are(lock: Lock, catalogue: Catalogue) -> list[str]:
    """The name under which `gather` finds each parent: its `id@commit`, or its folder if the lock gives its path.

    The Hub is never asked for a parent that was a folder.

    Raises:
        NothingMatched: a parent that was a folder is neither at its path nor in the catalogue.
        Refused: the folder has other weights, or a parent from the Hub has the name of a local folder.
    """
    return [_folder(lock, name, catalogue) if name in lock.folders else _id_on_hub(name, lock) for name in lock.parents]


def _id_on_hub(name: str, lock: Lock) -> str:
    if folder_of(name) is not None:
        raise Refused(f"{name} is a parent from the Hub, but a local folder has the same name", hint=_by_hand(lock))
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
        raise NothingMatched(f"{name} was a folder, which is missing now", hint=_by_hand(lock)) from None


def _by_hand(lock: Lock) -> str:
    return f"name all parents: lora merge --locked {lock.file} FOLDER..."


def under_locked_names(
    lock: Lock, adapters: Sequence[OpenAdapter], inputs: Mapping[str, str]
) -> tuple[list[OpenAdapter], dict[str, str]]:
    """The adapters and their inputs under their names in the lock.

    A folder's commit is a hash of its files: the same commit under another name is a moved adapter.
    """
    free = [name for name in lock.folders if name not in inputs]
    renamed, hashes = [], {}
    for adapter in adapters:
        ref = adapter.ref
        same = [name for name in free if name.endswith(f"@{ref.commit}")]
        if same and ref.pinned not in lock.parents:
            free.remove(same[0])
            ref = replace(ref, id=same[0].removesuffix(f"@{ref.commit}"))
        renamed.append(replace(adapter, files=replace(adapter.files, ref=ref)))
        hashes[ref.pinned] = inputs[adapter.ref.pinned]
    return renamed, hashes


def _path_to(adapter: OpenAdapter, folder: Path) -> dict[str, str]:
    """The path of a parent folder relative to `folder`; empty if the path would reveal details of this machine."""
    here, there = folder.parent.resolve() / folder.name, adapter.folder
    if adapter.ref.source != "folder" or not _in_one_tree(here, there):
        return {}
    return {"path": Path(os.path.relpath(there, here)).as_posix()}


def _place(file: Path, path: Any) -> Path | None:
    """The adapter folder at a lock's path; None if there is none, or if the path must not be followed.

    The path comes from a stranger: follow it only within the tree for which `_path_to` writes paths, and no links.
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
    """Refused, with the names, if a parent is missing, has other weights, or was not part of the merge."""
    changed = [name for name, sha256 in lock.parents.items() if parents.get(name) != sha256]
    if changed:
        raise Refused(
            f"missing or changed since the locked merge: {', '.join(changed)}",
            hint="give each adapter at its locked commit, with the same weights; nothing was written",
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
    """Refused if the written bytes differ from the locked merge's; the hint names possible reasons."""
    wrong: Sequence[str] = [name for name, sha256 in lock.outputs.items() if outputs.get(name) != sha256]
    if wrong:
        reasons = differences(lock)
        if lock.arithmetic != _ARITHMETIC:
            reasons.insert(0, "the version that made it rounds in another way, and the bytes differ by rounding")
        reasons = reasons or ["the versions are the same: the processor may differ"]
        raise Refused(
            f"{', '.join(wrong)} differs from the locked merge (sha256); nothing was written", hint="; ".join(reasons)
        )


def _is_earlier(settings: Mapping[str, Any]) -> bool:
    """Whether a version wrote these settings that had not all options of today."""
    return not settings.keys() >= _BEFORE.keys()


def _settings(found: Any, parents: Collection[str]) -> dict[str, Any]:
    """`found` if it has the form of a merge's settings for `parents`; else ValueError, TypeError and the like."""
    found = {**found}
    if _is_earlier(found) and found["for"] == "":
        found["for"] = None
    settings = _Settings.of_settings({**_BEFORE, **found})
    if settings.weights.keys() != _not_empty(parents):
        raise ValueError("weights of other adapters than the parents")
    if settings.order and sorted(settings.order) != sorted(settings.weights):
        raise ValueError("an order of other adapters than the parents")
    return settings.settings


def _not_empty(found: Any) -> Any:
    if not found:
        raise ValueError("a merge of nothing")
    return found
