"""The lock of a merge: every parent at its commit with the hash of its weights, the settings, the versions."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.adapters.devices import resolve_device
from lora_cli.errors import DataError, Refused, UsageError
from lora_cli.runs import versions
from lora_cli.steps.merge_plan import MergePlan

# What the settings of a merge are in its run.json. Whoever sends one may have written anything into it.
_SETTINGS: Mapping[str, tuple[type, ...]] = {
    "method": (str,),
    "knobs": (dict,),
    "base": (str,),
    "weights": (dict,),
    "scope": (list,),
    "rank": (str,),
    "energy": (float, int, type(None)),
    "lambda": (float, int),
    "norm_match": (bool,),
    "missing": (str,),
    "dense": (bool,),
    "compact": (bool,),
    "for": (str, type(None)),
    "dtype": (str,),
    "device": (str,),
    "coefficients": (str, type(None)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """What a finished merge was made of. `parents` maps `id@commit` to the SHA-256 of the weights."""

    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    versions: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """The settings as the options of `merge_plan.plan`. Refused where this machine lacks the device."""
        named = {"lambda": "scaling", "for": "serve"}
        leave = ("weights", "base", "coefficients", "module_inputs")
        options = {named.get(key, key): value for key, value in self.settings.items() if key not in leave}
        try:
            return options | {"device": resolve_device(options["device"])}
        except (Refused, UsageError):
            raise Refused(
                f"the locked merge was made on {options['device']!r}, which is not here",
                hint="only the same kind of device gives the same bytes",
            ) from None

    def weights(self, pinned: Sequence[str]) -> list[float]:
        """The weight of each parent of `pinned`."""
        return [self.settings["weights"][name] for name in pinned]


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
            settings=_settings(record["settings"], lock["parents"].keys()),
            parents={name: str(parent["sha256"]) for name, parent in lock["parents"].items()},
            versions={str(name): str(version) for name, version in lock["versions"].items()},
            outputs=dict(_not_empty(record["outputs"])),
        )
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(
            f"{file}: not the run.json of a merge", hint="give the run.json beside a merged adapter"
        ) from None


def demand_same_parents(lock: Lock, parents: Mapping[str, str]) -> None:
    """Refused, naming each, where a parent is missing, its weights are not those that were merged, or it was none."""
    changed = [name for name, sha256 in lock.parents.items() if parents.get(name) != sha256]
    if changed:
        raise Refused(
            f"not the adapters that were merged: {', '.join(changed)}",
            hint="their commit or weights changed since; nothing was written",
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
    settings = {**found}
    if settings.keys() - {"module_inputs"} != _SETTINGS.keys():
        raise ValueError("other settings than those of a merge")
    if wrong := [key for key, types in _SETTINGS.items() if type(settings[key]) not in types]:
        raise TypeError(f"{wrong[0]} of another type")
    if not all(isinstance(condition, str) for condition in settings["scope"]):
        raise TypeError("a scope that is no text")
    if settings["weights"].keys() != _not_empty(parents):
        raise ValueError("weights of others than the parents")
    weights = {name: float(weight) for name, weight in settings["weights"].items()}
    return settings | {"lambda": float(settings["lambda"]), "weights": weights}


def _not_empty(found: Any) -> Any:
    if not found:
        raise ValueError("a merge of nothing")
    return found
