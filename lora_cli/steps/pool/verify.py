"""Check one adapter afresh, ignoring the catalogue, and measure how much of it fits the base model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_cli.catalogue.sketches import StoredSketch
from lora_cli.checks.examine import examine
from lora_cli.checks.weights import MAX_NORM
from lora_cli.errors import ConfigError, HeaderError, NothingMatched, Refused
from lora_cli.files import reading
from lora_cli.formats.config import MAX_CONFIG_BYTES, parse_config
from lora_cli.formats.header import Header, read_header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.remote_header import probe_header
from lora_cli.formats.skeleton import Skeleton
from lora_cli.formats.store import files_in, locate, read_config
from lora_cli.hashes import sha256_of
from lora_cli.hub.cache import hash_in_cache
from lora_cli.hub.client import Hub
from lora_cli.hub.problems import MissingFile
from lora_cli.imports import file_of
from lora_cli.records import Adapter, Status
from lora_cli.settings import folder_of
from lora_cli.steps.pool.fetch import download

if TYPE_CHECKING:
    from lora_cli.checks.spectra import AdapterSpread

_PROBE_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of checking one adapter.

    `coverage` is the share of its modules that the base has in the same shape, None if the base's modules are not
    known. `deep` is True if the weights were read, as they always are if the catalogue lists the adapter as faulty.
    `spreads` are the modules of an adapter whose weights were read and are sound, `sketch` that of its update.
    """

    adapter: Adapter
    coverage: float | None
    deep: bool
    spreads: "AdapterSpread | None" = None
    sketch: StoredSketch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The bounds on the norm of an update: one of at most `least` gets a note, one above `most` is refused.

    The defaults are those of arXiv 2602.12323.
    """

    least: float = 1.0
    most: float = MAX_NORM


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an earlier check found out about weights: it holds for those of the same `sketch.content`."""

    spreads: "AdapterSpread"
    sketch: StoredSketch


_PAPER = Norms()


def verify(
    adapter: Adapter,
    *,
    hub: Hub | None = None,
    base: str = "",
    aliases: Sequence[str] = (),
    skeleton: Skeleton | None = None,
    deep: bool = False,
    norms: Norms = _PAPER,
    known: Measured | None = None,
) -> Verdict:
    """Read configuration and header again and judge them, with `deep` the weights too.

    Args:
        adapter: a row of the catalogue, or one made for a folder.
        hub: the source of files that are not on this machine; None to use local files only.
        base: the base model asked for, "" for any.
        skeleton: the base's modules, None if they are not known.
        known: earlier measures; where the bytes of the files are still those, only their hash is taken again.

    Raises the errors of the Hub, and Refused if the files are not on this machine and `hub` is None.
    """
    config, weights, header, names, kind = _files(adapter, hub, fetch=deep)
    facts = examine(
        config,
        header,
        file_names=names,
        base_name=base,
        base_aliases=aliases,
        skeleton=skeleton,
        kind=kind,
    )
    found = replace(adapter, **facts)
    read, spreads, sketched = False, None, None
    # An adapter with bad weights can have a sound configuration and header.
    deep = deep or adapter.status == "unusable"
    if deep and weights is not None and found.status == "ok" and config is not None and isinstance(header, Header):
        read = True
        found, old = _weighed(found, weights, header, config, skeleton, norms, known)
        wrong = _swapped(adapter, found, weights)
        if wrong:
            found = replace(found, status="unusable", reason=wrong)
        copies = locate_modules(parse_config(config), header, skeleton).copies if found.status == "ok" else {}
        if copies:
            from lora_cli.steps.pool.copies import judge_copies

            wrong, unknown = judge_copies(weights, copies, base or found.base, skeleton)
            status: Status = "unusable" if wrong else "ok"
            notes = "; ".join(filter(None, [found.notes, unknown]))
            found = replace(found, status=status, reason=wrong, notes=notes)
        if found.status == "ok":
            spreads, sketched = old or _measured(found, weights, header, config, skeleton)
    if adapter.status == "quarantined" and found.status == "ok":
        found = replace(found, status=adapter.status, reason=adapter.reason)
    return Verdict(
        adapter=found, coverage=_coverage(config, header, skeleton), deep=read, spreads=spreads, sketch=sketched
    )


def _weighed(
    adapter: Adapter,
    weights: Path,
    header: Header,
    config: bytes,
    skeleton: Skeleton | None,
    norms: Norms,
    known: Measured | None,
) -> tuple[Adapter, "tuple[AdapterSpread, StoredSketch] | None"]:
    """The adapter with the facts from its weights, and what is known of these very bytes from an earlier check."""
    from lora_cli.checks.sketch import content_of
    from lora_cli.checks.weights import WeightFacts, judged, weighed

    sha256, old = sha256_of(weights), None
    if known is not None and known.sketch.content == content_of(sha256, config, skeleton):
        norm = math.hypot(*(spread.norm for spread in known.spreads.values()))
        adapter = judged(adapter, WeightFacts(sha256, norm, None, zero=False, zero_b=False), norms.most)
        old = known.spreads, known.sketch
    else:
        adapter = weighed(adapter, weights, header, config, skeleton, most=norms.most)
    if adapter.status == "ok" and adapter.norm is not None and adapter.norm <= norms.least:
        low = f"the norm of its update is {adapter.norm:.3g}, at most {norms.least:g}: hardly trained"
        adapter = replace(adapter, notes="; ".join(filter(None, [adapter.notes, low])))
    return adapter, old


def _measured(
    adapter: Adapter, weights: Path, header: Header, config: bytes, skeleton: Skeleton | None
) -> "tuple[AdapterSpread, StoredSketch]":
    from lora_cli.checks.sketch import content_of, sketch
    from lora_cli.checks.spectra import measure

    facts = parse_config(config)
    numbers = sketch(weights, header, facts, skeleton).astype("<f2").tobytes()
    content = content_of(adapter.sha256, config, skeleton)
    stored = StoredSketch(content=content, by_base=skeleton is not None, numbers=numbers)
    return measure(weights, header, facts, skeleton), stored


def _swapped(adapter: Adapter, found: Adapter, weights: Path) -> str:
    """The reason why these are not the weights that were listed; "" if they are, or if that cannot be known."""
    if adapter.sha256 and found.sha256 and found.sha256 != adapter.sha256:
        return "its weights differ from those in the catalogue (sha256)"
    if adapter.source == "hub" and found.sha256 and (named := hash_in_cache(weights)) and named != found.sha256:
        return "its weights differ from the Hub's (sha256): fetch it again with lora pool fetch --force"
    return ""


def _files(
    adapter: Adapter, hub: Hub | None, *, fetch: bool
) -> tuple[bytes | None, Path | None, Header | HeaderError | None, tuple[str, ...], str]:
    """Configuration, path of the weights if they are local, their header, the names of all files, and their kind."""
    if adapter.source == "folder":
        folder = Path(adapter.repo, adapter.subfolder)
        if folder_of(str(folder)) is None and file_of(str(folder)) is None:
            raise NothingMatched(f"{folder}: no such folder")
        with reading(folder):
            names = tuple(path.name for path in folder.iterdir()) if folder.is_dir() else (folder.name,)
        config, weights, _, kind = files_in(folder, names)
        return config, weights, None if weights is None else _header(weights), names, kind
    files = locate(adapter.ref)
    if files is None and fetch and hub is not None:
        files = download(hub, adapter)
    if files is not None:
        return read_config(files.config.parent), files.weights, _header(files.weights), (CONFIG_NAME, WEIGHTS_NAME), ""
    if hub is None:
        raise Refused(f"{adapter.id}: its files are not on this machine", hint=f"lora pool fetch {adapter.id}")
    prefix = f"{adapter.subfolder}/" if adapter.subfolder else ""
    config = hub.read_file(adapter.repo, prefix + CONFIG_NAME, adapter.commit, MAX_CONFIG_BYTES)
    try:
        header = probe_header(hub, adapter, prefix + WEIGHTS_NAME, _PROBE_BYTES).header
    except MissingFile:
        return config, None, None, (CONFIG_NAME,), ""
    return config, None, header, (CONFIG_NAME, WEIGHTS_NAME), ""


def _header(weights: Path) -> Header | HeaderError:
    try:
        return read_header(weights)
    except HeaderError as error:
        return error


def _coverage(config: bytes | None, header: Header | HeaderError | None, skeleton: Skeleton | None) -> float | None:
    if skeleton is None or config is None or not isinstance(header, Header):
        return None
    try:
        return locate_modules(parse_config(config), header, skeleton).coverage
    except (ConfigError, HeaderError):
        return None
