"""From the user's names to systems: adapters, and routers over the adapters that lie beside their router.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.algebra.routing import Routing
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.router import ROUTER_FILE, RouterFile, read_router, router_folder, router_ref
from lora_cli.hashes import sha256_of
from lora_cli.models.router import Router
from lora_cli.recipes import FIT_METHODS
from lora_cli.records import AdapterRef
from lora_cli.steps.evaluate.groups import System, Updates
from lora_cli.steps.opened_pool import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """Systems ready to be applied, each with the reference of its adapter or router; the others as in `Gathered`."""

    systems: Sequence[System]
    refs: Sequence[AdapterRef]
    base: str
    inputs: Mapping[str, str]


def opened_systems(pool: Pool, names: Sequence[str]) -> Opened:
    """The systems of the user's names, called as `distinct` has it.

    Raises:
        DataError: a malformed router.json.
        Refused: an adapter of a router that has changed since. Else as `Pool.adapters` does.
    """
    routers = [_router_at(name) for name in names]
    parts = [_parts(name, found) for name, found in zip(names, routers, strict=True)]
    gathered = pool.adapters([part for own in parts for part in own])
    waiting, inputs = iter(gathered.adapters), dict(gathered.inputs)
    systems, refs = [], []
    for name, found, own in zip(distinct(names), routers, parts, strict=True):
        adapters = [next(waiting) for _ in own]
        updates: Updates | Router = Updates(adapters[0], checked=False)
        ref = adapters[0].ref
        if found is not None:
            folder, router = found
            updates = _router(folder, router, adapters, gathered.inputs)
            ref = router_ref(folder, [adapter.ref for adapter in adapters])
            inputs[ref.pinned] = sha256_of(folder / ROUTER_FILE)
        systems.append(System(name=name, updates=updates, version=ref.pinned))
        refs.append(ref)
    return Opened(systems=systems, refs=refs, base=gathered.base, inputs=inputs)


def parts_of(name: str) -> list[str]:
    """The adapters of a system: itself, or those of a router. DataError for a malformed router.json."""
    return _parts(name, _router_at(name))


def _router_at(name: str) -> tuple[Path, RouterFile] | None:
    folder = router_folder(name)
    return None if folder is None else (folder, read_router(folder))


def _parts(name: str, found: tuple[Path, RouterFile] | None) -> list[str]:
    return [name] if found is None else [str(found[0] / member.folder) for member in found[1].adapters]


def _router(folder: Path, found: RouterFile, adapters: Sequence[OpenAdapter], inputs: Mapping[str, str]) -> Router:
    """The router of router.json over its opened adapters. Refused if their weights are not those that it names."""
    for member, adapter in zip(found.adapters, adapters, strict=True):
        if inputs[adapter.ref.pinned] != member.sha256:
            raise Refused(
                f"{folder}: the weights of {member.folder} have changed since they were written",
                hint="make the router anew by lora fit with --force",
            )
    routing: Routing = FIT_METHODS.load(found.preset)(len(adapters), **FIT_METHODS.check(found.preset, found.knobs))
    return Router(adapters, routing)


def distinct(names: Sequence[str]) -> list[str]:
    """Names for the systems: as given, a full path by its last part, numbered where two are alike."""
    short = [Path(name).name if Path(name).is_absolute() else name for name in names]
    return [
        name if short.count(name) == 1 and name != "base" else f"{name}#{short[: place + 1].count(name)}"
        for place, name in enumerate(short)
    ]
