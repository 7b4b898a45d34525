"""From what the user named to adapters that are here, readable and of one base model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lora_cli.adapters.base_names import public_base, same_base, split_revision
from lora_cli.adapters.checks import UNDECLARED
from lora_cli.adapters.config import parse_config
from lora_cli.adapters.delta import OpenDelta, dense_folder, open_delta
from lora_cli.adapters.kinds import kind_in
from lora_cli.adapters.reader import OpenAdapter, open_adapter
from lora_cli.adapters.skeleton import Skeleton
from lora_cli.adapters.store import AdapterFiles, folder_ref, locate, read_config, sha256_of
from lora_cli.catalogue import Catalogue
from lora_cli.errors import ConfigError, HeaderError, NothingMatched, Refused
from lora_cli.records import Adapter, AdapterRef, Progress, silent
from lora_cli.settings import folder_of
from lora_cli.steps.bases import skeleton_of
from lora_cli.steps.fetch import bring
from lora_cli.steps.lookup import NAME_THE_BASE, look_up, names_of, of_one_base, usable

MOST_WITHOUT_SELECTION = 50
_NOTHING = "no adapter_config.json with adapter_model.safetensors in it"
_OF_ATTENTION = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv")
# A fused projection, and the projections that a model has in its place if they are split.
_SPLIT = {
    **dict.fromkeys(
        ("qkv_proj", "qkv", "wqkv", "Wqkv", "W_pack", "query_key_value", "c_attn", "in_proj"), _OF_ATTENTION
    ),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Adapters ready to be read.

    `base` is the name under which results declare their base model; `inputs` maps each `id@commit` to the SHA-256 of
    its weights; `skeleton` holds the modules of the base's class, None where the class is not known; `unchecked` then
    says why.
    """

    adapters: tuple[OpenAdapter, ...]
    base: str
    inputs: Mapping[str, str]
    skeleton: Skeleton | None = None
    unchecked: str = ""


def default_names(catalogue: Catalogue, base: str | None, name: str | None = None) -> tuple[list[str], str]:
    """The adapters meant where none are named, and a line that says which these are.

    The last selection (or the last called `name`), else every usable adapter of the base if they are at most 50.

    Raises:
        NothingMatched: no such selection, no usable adapter, or too many of them.
        UsageError: no base named, and the usable adapters are for several.
    """
    selection = catalogue.last_selection(name)
    if selection is not None:
        label = f"selection {name!r}" if name else f"last selection{f' {selection.name!r}' if selection.name else ''}"
        names = [f"{ref.id}@{ref.commit}" for ref in selection.refs]
        return names, f"adapters: the {label}, {len(names)} by {selection.method}"
    if name is not None:
        raise NothingMatched(f"no selection called {name!r}", hint="make one: lora select --by random -k 8 --name NAME")
    usable = of_one_base(catalogue.find(status="ok"), base)
    if not usable:
        raise NothingMatched("no adapters selected, and none usable in the catalogue", hint="run lora pool sync")
    if len(usable) > MOST_WITHOUT_SELECTION:
        raise NothingMatched(
            f"no adapters selected, and {len(usable):,} are usable", hint="choose some: lora select --by random -k 30"
        )
    return [f"{row.id}@{row.commit}" for row in usable], f"adapters: all {len(usable)} usable ones in the catalogue"


def gather(
    catalogue: Catalogue,
    names: Sequence[str],
    *,
    base: str | None = None,
    aliases: Sequence[str] = (),
    whole: bool = False,
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> Gathered:
    """Find, fetch where needed, open and check adapters.

    Args:
        names: catalogue ids, `id@commit` (or the start of one), local folders, or ids that only the Hub knows.
        base: the base model they must belong to; None takes the one for which the catalogue found them usable, else
            the one they declare. An adapter that declares none is for this one if its shapes fit.
        aliases: other names of that base.
        whole: take the updates of adapters that hold modules saved whole as well.
        announce: is told what was looked up on the Hub and, before weights are downloaded, how many bytes.

    Raises:
        NothingMatched: an id nobody knows.
        AccessDenied: a gated adapter.
        NetworkError: an id that the catalogue does not know, or weights that are not here, and no Hub to ask.
        Refused: an adapter that cannot be used, weights that changed since they were catalogued, or two bases.
    """
    if not names:
        raise NothingMatched("no adapters selected", hint="name some, or run lora select")
    look = partial(look_up, catalogue, base=base or "", aliases=aliases, announce=announce, progress=progress)
    look = partial(look, whole=whole)
    found = [_find(catalogue, name, look, whole=whole) for name in names]
    named, base = base, base or _judged_for([row for _, row in found if row is not None])
    bring(catalogue, [ref for ref, row in found if row is not None], announce, progress, whole=whole)
    here = [_files(ref) for ref, _ in found]
    known = names_of(catalogue, base, aliases)
    judged = [_declared(files, row, named) for files, (_, row) in zip(here, found, strict=True)]
    # In an order of their own: the same adapters named in another order are the same work.
    declared = sorted(judged, key=lambda one: one.ref.pinned)
    _check_bases(declared, base, known)
    skeleton, unchecked = skeleton_of(base or declared[0].base)
    opened, inputs = [], {}
    for files, (ref, row) in zip(here, found, strict=True):
        # Opened first: what changes after it was hashed is then noticed when it is read.
        opened.append(_open(files, skeleton, whole=whole))
        inputs[ref.pinned] = _sha256(files, row)
    if skeleton is None:
        _demand_common_names(opened)
        _demand_one_form_of_projections(opened)
    elif needs_fusing(opened, skeleton):
        opened = [_open(files, skeleton, whole=whole, fuse=True) for files in here]
    for adapter, one in zip(opened, judged, strict=True):
        taken = "" if adapter.base or skeleton is not None else f"{UNDECLARED}: taken to be for {one.base}"
        for note in filter(None, [taken, *adapter.notes]):
            announce(f"{adapter.ref.id}: {note}")
    public = public_base(base or "", known, [one.base for one in declared])
    return Gathered(adapters=tuple(opened), base=public, inputs=inputs, skeleton=skeleton, unchecked=unchecked)


def gather_update(
    catalogue: Catalogue,
    name: str,
    *,
    base: str | None = None,
    aliases: Sequence[str] = (),
    announce: Callable[[str], None],
    progress: Progress = silent,
) -> tuple[OpenAdapter | OpenDelta, str, Mapping[str, str]]:
    """One adapter, or the dense result of a merge in a folder, with `base` and `inputs` as in `Gathered`.

    Raises:
        DataError: the record of a dense result is missing or malformed. Else as `gather` does.
    """
    folder = dense_folder(name)
    if folder is None:
        found = gather(catalogue, [name], base=base, aliases=aliases, announce=announce, progress=progress)
        return found.adapters[0], found.base, found.inputs
    delta = open_delta(folder)
    known = names_of(catalogue, base, aliases)
    _check_bases([_Declared(delta.ref, delta.base)], base, known)
    return delta, public_base(base or "", known, [delta.base]), {delta.ref.pinned: delta.sha256}


def to_fetch(
    catalogue: Catalogue,
    names: Sequence[str],
    *,
    base: str | None = None,
    aliases: Sequence[str] = (),
    announce: Callable[[str], None],
) -> list[Adapter]:
    """The adapters of `names` whose weights `gather` would have to download, storing nothing. Raises as it does."""
    look = partial(look_up, catalogue, base=base or "", aliases=aliases, announce=announce, store=False)
    found = [_find(catalogue, name, look) for name in names]
    return [row for ref, row in found if row is not None and locate(ref) is None]


class _Declared(NamedTuple):
    """An adapter and the base model that it is for."""

    ref: AdapterRef
    base: str


def _files(ref: AdapterRef) -> AdapterFiles:
    """An adapter's two files. Refused for a folder or repository without them, with the reason."""
    files = locate(ref)
    if files is not None:
        return files
    if dense_folder(ref.repo) is not None:
        raise Refused(f"{ref.id}: {_NOTHING}", hint="a dense result: lora bake takes it")
    folder = folder_of(ref.repo) if ref.source == "folder" else None
    kind = "" if folder is None else kind_in(folder, [file.name for file in folder.iterdir()])
    raise Refused(f"{ref.id}: {kind or _NOTHING}")


def _declared(files: AdapterFiles, row: Adapter | None, named: str | None) -> _Declared:
    """An adapter with the base that it declares; one that declares none is for that of the user or the catalogue.

    Raises:
        Refused: nobody names one.
    """
    try:
        base = parse_config(read_config(files.config.parent) or b"").pinned_base
    except ConfigError as error:
        raise ConfigError(f"{files.ref.id}: {error.message}", hint=error.hint) from error
    base = base or named or (row.base if row is not None else "")
    if not base:
        raise Refused(f"{files.ref.id} {UNDECLARED}", hint=NAME_THE_BASE)
    return _Declared(files.ref, base)


def needs_fusing(adapters: Sequence[OpenAdapter], skeleton: Skeleton) -> bool:
    """Whether the parts of experts' matrices have to be taken together.

    They have where another adapter has factors of whole matrices, or where PEFT does not apply factors of the parts.
    """
    parts, whole = set[str](), False
    for adapter in adapters:
        for name, factors in adapter.modules.items():
            matrix = skeleton.get(name)
            if matrix is not None and matrix.expert is not None:
                whole |= factors.parts[0].experts > 1
                if factors.parts[0].experts == 1:
                    parts.add(name.rpartition(".")[2])
    return bool(parts) and (whole or not parts <= skeleton.retargeted)


def _demand_common_names(adapters: Sequence[OpenAdapter]) -> None:
    """Refused where two adapters adapt modules of the same last names that are never the same modules.

    Which of them are the same only the base's own class can say.
    """
    first = adapters[0]
    for adapter in adapters[1:]:
        one, other = _kinds_of_names(first), _kinds_of_names(adapter)
        shared = one.keys() & other.keys()
        if shared and all(one[last].isdisjoint(other[last]) for last in shared):
            last = min(shared)
            raise Refused(
                f"{first.ref.id} and {adapter.ref.id} name their modules differently: "
                f"{min(one[last])} and {min(other[last])}",
                hint="give --base, a folder or a Hub id, so that they can be held against its class",
            )


def _kinds_of_names(adapter: OpenAdapter) -> dict[str, set[str]]:
    """Last name → the names that end with it, whatever the numbers of their layers."""
    found: dict[str, set[str]] = {}
    for name in adapter.modules:
        found.setdefault(name.rpartition(".")[2], set()).add(re.sub(r"(?<=\.)\d+(?=\.)", "N", f".{name}")[1:])
    return found


def _open(files: AdapterFiles, skeleton: Skeleton | None, *, whole: bool, fuse: bool = False) -> OpenAdapter:
    """`open_adapter`, with the adapter's name in what it says of malformed files."""
    try:
        return open_adapter(files, skeleton, fuse=fuse, whole=whole)
    except (ConfigError, HeaderError) as error:
        raise type(error)(f"{files.ref.id}: {error.message}", hint=error.hint) from error


def _sha256(files: AdapterFiles, row: Adapter | None) -> str:
    """SHA-256 of the weights, which must be those that were catalogued."""
    ref = files.ref
    if ref.source == "folder":
        # One hash covers both files; a row whose commit still holds need not have its weights hashed again.
        if folder_ref(Path(ref.repo, ref.subfolder), ref.id).commit != ref.commit:
            raise Refused(
                f"{ref.id}: its files changed since the last sync", hint="run lora pool sync, then select again"
            )
        return row.sha256 if row is not None and row.sha256 else sha256_of(files.weights)
    sha256 = sha256_of(files.weights)
    if row is not None and row.sha256 and row.sha256 != sha256:
        raise Refused(
            f"{ref.id}: its weights are not those that were catalogued", hint=f"lora pool fetch {ref.id} --force"
        )
    return sha256


def _find(
    catalogue: Catalogue, name: str, look: Callable[[str], Adapter], *, whole: bool = False
) -> tuple[AdapterRef, Adapter | None]:
    folder = folder_of(name)
    if folder is None:
        row = usable(look(name), whole=whole)
        return row.ref, row
    ref, here = folder_ref(folder), catalogue.at(folder)
    # What is wrong with it may be wrong for the base of the last sync only: its files are judged anew.
    if here is None or here.commit != ref.commit or here.status != "ok":
        return ref, None
    return here.ref, here


def _judged_for(rows: Sequence[Adapter]) -> str | None:
    """The one base for which the catalogue has them as usable, under whatever names they declare; None for several."""
    bases = {row.base for row in rows}
    return bases.pop() or None if len(bases) == 1 else None


def _check_bases(adapters: Sequence[_Declared], base: str | None, aliases: Sequence[str]) -> None:
    """Refused where one of the adapters, each with its base, is for another than the others or than `base`."""
    first, first_base = adapters[0]
    asked = base if base is not None else first_base
    for ref, declared in adapters:
        if declared == asked or same_base(declared, asked, aliases):
            continue
        if base is None:
            raise Refused(
                f"two base models: {first.id} is for {asked}, {ref.id} for {declared}",
                hint=_of_revisions(declared, asked)
                or "if these are one model, say so: --base, and base_aliases in lora.toml",
            )
        raise Refused(
            f"{ref.id} is for {declared}, not for {base}",
            hint=_of_revisions(declared, asked) or "if these are one model, add the name to base_aliases in lora.toml",
        )


def _demand_one_form_of_projections(adapters: Sequence[OpenAdapter]) -> None:
    """Refused where one adapter is for a fused projection and another for its parts: no base has both in one place."""
    owners = {module: adapter.ref.id for adapter in reversed(adapters) for module in adapter.modules}
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
