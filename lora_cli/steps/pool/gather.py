"""Checks on adapters that are to be used together: files, declared base models, names of modules."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_cli.checks.examine import UNDECLARED
from lora_cli.errors import ConfigError, DataError, HeaderError, Refused
from lora_cli.formats.base_names import same_base, split_revision
from lora_cli.formats.config import parse_config
from lora_cli.formats.kinds import checkpoints_in, kind_in
from lora_cli.formats.router import NO_LORA, router_folder
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import AdapterFiles, folder_ref, locate, read_config
from lora_cli.hashes import sha256_of
from lora_cli.imports import prefixed
from lora_cli.names import by_leaf, leaf
from lora_cli.records import Adapter, AdapterRef
from lora_cli.settings import folder_of, folders_like
from lora_cli.steps.pool.lookup import NAME_THE_BASE
from lora_cli.text import in_words, meant

if TYPE_CHECKING:
    from lora_cli.formats.reader import OpenAdapter

_NOTHING = "no adapter_config.json with adapter_model.safetensors in it"
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv")
# Fused projection → the projections of a model that splits it.
_SPLIT = {
    **dict.fromkeys(
        ("qkv_proj", "qkv", "wqkv", "Wqkv", "W_pack", "query_key_value", "c_attn", "in_proj"), _OF_ATTENTION
    ),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Declared(NamedTuple):
    """An adapter and its base model."""

    ref: AdapterRef
    base: str


def files_of(ref: AdapterRef) -> AdapterFiles:
    """An adapter's two files. Refused for a folder or repository without them, with the reason."""
    try:
        files = locate(ref)
    except (Refused, DataError) as error:
        raise prefixed(ref.id, error) from error
    if files is not None:
        return files
    from lora_cli.formats.delta import dense_folder

    if dense_folder(ref.repo) is not None:
        raise Refused(f"{ref.id}: {_NOTHING}", hint="a dense result: lora bake takes it")
    if router_folder(ref.repo) is not None:
        raise Refused(f"{ref.id} is {NO_LORA}", hint="lora eval applies it; its adapters are in folders of it")
    folder = folder_of(ref.repo) if ref.source == "folder" else None
    kind = "" if folder is None else kind_in(folder, [file.name for file in folder.iterdir()])
    if folder is not None and not kind and (named := checkpoints_in(folder)):
        raise Refused(f"{ref.id} holds checkpoints: {in_words(named[-3:])}", hint=f"name one: {folder / named[-1]}")
    raise Refused(f"{ref.id}: {kind or _NOTHING}")


def declared_base(files: AdapterFiles, row: Adapter | None, named: str | None) -> Declared:
    """An adapter with its declared base, else with the base that the user or the catalogue names.

    Raises:
        Refused: no base is named.
    """
    try:
        base = parse_config(read_config(files.config.parent) or b"").pinned_base
    except ConfigError as error:
        raise ConfigError(f"{files.ref.id}: {error.message}", hint=error.hint) from error
    base = base or named or (row.base if row is not None else "")
    if not base:
        raise Refused(f"{files.ref.id} {UNDECLARED}", hint=NAME_THE_BASE)
    return Declared(files.ref, base)


def needs_fusing(adapters: Sequence["OpenAdapter"], skeleton: Skeleton) -> bool:
    """Whether the parts of experts' matrices have to be taken together.

    True if another adapter has factors of whole matrices, or if PEFT does not apply factors of the parts.
    """
    parts, whole = set[str](), False
    for adapter in adapters:
        for name in skeleton.experts(adapter.modules):
            if adapter.modules[name].parts[0].experts > 1:
                whole = True
            else:
                parts.add(leaf(name))
    return bool(parts) and (whole or not parts <= skeleton.retargeted)


Named = tuple[str, Collection[str]]
"""The id of an adapter and the names of its modules."""


def demand_common_names(adapters: Sequence[Named]) -> None:
    """Refused where two adapters adapt modules of the same last names that are never the same modules.

    Only the base's own class can match their names.
    """
    first, one = adapters[0][0], _kinds_of_names(adapters[0][1])
    for id, modules in adapters[1:]:
        other = _kinds_of_names(modules)
        shared = one.keys() & other.keys()
        if shared and all(one[last].isdisjoint(other[last]) for last in shared):
            last = min(shared)
            raise Refused(
                f"{first} and {id} name their modules differently: {min(one[last])} and {min(other[last])}",
                hint="give --base, a folder or a Hub id, so that the names can be matched by its class",
            )


def _kinds_of_names(modules: Collection[str]) -> dict[str, set[str]]:
    """Last name → the names that end with it, whatever the numbers of their layers."""
    return {
        last: {re.sub(r"(?<=\.)\d+(?=\.)", "N", f".{name}")[1:] for name in names}
        for last, names in by_leaf(modules).items()
    }


def opened(files: AdapterFiles, skeleton: Skeleton | None, *, whole: bool, fuse: bool = False) -> "OpenAdapter":
    """`open_adapter`, with the adapter's name in errors about malformed files."""
    from lora_cli.formats.reader import open_adapter

    try:
        return open_adapter(files, skeleton, fuse=fuse, whole=whole)
    except (ConfigError, HeaderError) as error:
        raise type(error)(f"{files.ref.id}: {error.message}", hint=error.hint) from error


def opened_folder(folder: Path) -> "OpenAdapter":
    """The adapter in a folder. NothingMatched, Refused: there is none, or it cannot be used."""
    return opened(files_of(folder_ref(folder)), None, whole=False)


def sha256_of_weights(files: AdapterFiles, row: Adapter | None) -> str:
    """SHA-256 of the weights. Refused if they differ from the catalogued weights."""
    ref = files.ref
    if ref.source == "folder":
        # The commit is a hash of both files: if it is unchanged, the row's SHA-256 still holds.
        if folder_ref(Path(ref.repo, ref.subfolder), ref.id).commit != ref.commit:
            raise Refused(
                f"{ref.id}: its files changed since the last sync", hint="run lora pool sync, then select again"
            )
        return row.sha256 if row is not None and row.sha256 else sha256_of(files.weights)
    sha256 = sha256_of(files.weights)
    if row is not None and row.sha256 and row.sha256 != sha256:
        raise Refused(
            f"{ref.id}: its weights differ from the catalogued ones (sha256)", hint=f"lora pool fetch {ref.id} --force"
        )
    return sha256


def base_of_rows(rows: Sequence[Adapter]) -> str | None:
    """The base for which the catalogue lists all rows as usable, whatever they declare; None for several bases."""
    bases = {row.base for row in rows}
    return bases.pop() or None if len(bases) == 1 else None


def check_bases(adapters: Sequence[Declared], base: str | None, aliases: Sequence[str]) -> None:
    """Refused if the adapters' bases differ from each other or from `base`."""
    first, first_base = adapters[0]
    asked = base if base is not None else first_base
    for ref, declared in adapters:
        if declared == asked or same_base(declared, asked, aliases):
            continue
        if base is None:
            raise Refused(
                f"two base models: {first.id} is for {asked}, {ref.id} for {declared}",
                hint=_of_revisions(declared, asked)
                or "if these are one model, give --base, and add the other name to base_aliases in lora.toml",
            )
        like = [] if folder_of(base) is not None else folders_like(base)
        aliased = "if these are one model, add the name to base_aliases in lora.toml"
        raise Refused(
            f"{ref.id} is for {declared}, not for {base}",
            hint=_of_revisions(declared, asked) or meant(like, aliased),
        )


def demand_one_form_of_projections(adapters: Sequence[Named]) -> None:
    """Refused if one adapter has a fused projection and another its parts: no base has both in one place."""
    owners = {module: id for id, modules in reversed(adapters) for module in modules}
    for module, owner in owners.items():
        parent, dot, name = module.rpartition(".")
        for part in _SPLIT.get(name, ()):
            if other := owners.get(f"{parent}{dot}{part}"):
                raise Refused(
                    f"{owner} adapts {name} and {other} adapts {part} in {parent}: one base has only one of them",
                    hint="one of these adapters is for a copy of the base with other modules: leave it out",
                )


def _of_revisions(one: str, other: str) -> str:
    """A hint for two bases that are revisions of one model, "" for others."""
    if not same_base(split_revision(one)[0], split_revision(other)[0]):
        return ""
    return "two revisions of a model are two bases: use adapters of one, and name it by --base NAME@REVISION"
