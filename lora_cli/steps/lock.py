"""The lock of a merge: every parent at its commit with the hash of its weights, the settings, the versions."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError, Refused
from lora_cli.runs import versions
from lora_cli.steps.merge_plan import MergePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """What a finished merge was made of. `parents` maps `id@commit` to the SHA-256 of the weights."""

    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    versions: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """The settings as the options of `merge_plan.plan`."""
        settings = dict(self.settings)
        named = {"lambda": "scaling", "for": "serve"}
        leave = ("weights", "base", "coefficients", "module_inputs")
        return {named.get(key, key): value for key, value in settings.items() if key not in leave}

    def weights(self, pinned: Sequence[str]) -> list[float]:
        """The weight of each parent of `pinned`."""
        return [float(self.settings["weights"][name]) for name in pinned]


def lock_of(plan: MergePlan, parents: Mapping[str, str]) -> dict[str, Any]:
    """What goes into run.json as `merge.lock`."""
    return {
        "parents": {
            adapter.ref.pinned: {"source": adapter.ref.source, "sha256": parents[adapter.ref.pinned]}
            for adapter in plan.adapters
        },
        "seed": plan.knobs.get("seed"),
        "versions": versions(),
    }


def read_lock(file: Path) -> Lock:
    """The lock in the run.json of a merge. DataError for a file that holds none."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        lock = record["merge.lock"]
        return Lock(
            settings=dict(record["settings"]),
            parents={str(name): str(parent["sha256"]) for name, parent in lock["parents"].items()},
            versions=dict(lock["versions"]),
            outputs=dict(record["outputs"]),
        )
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            f"{file}: not the run.json of a merge", hint="give the run.json beside a merged adapter"
        ) from None


def demand_same_parents(lock: Lock, parents: Mapping[str, str]) -> None:
    """Refused, naming each, where a parent is missing or its weights are not those that were merged."""
    changed = [name for name, sha256 in lock.parents.items() if parents.get(name) != sha256]
    if changed:
        raise Refused(
            f"not the adapters that were merged: {', '.join(changed)}",
            hint="their commit or weights changed since; nothing was written",
        )


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
        reasons = differences(lock) or ["the same versions: another kind of CPU, or another number of threads"]
        raise Refused(f"{', '.join(wrong)} came out with other bytes than the locked merge's", hint="; ".join(reasons))
