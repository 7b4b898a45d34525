"""Eligible or not, and why: base model, coverage, representability, finite, norm. No torch, no numpy."""

import math
from collections.abc import Collection, Mapping
from typing import Final, TypedDict

from lora_cli.errors import ConfigError, HeaderError
from lora_cli.formats.base_names import canonical_base, is_hub_id, same_base, split_revision
from lora_cli.formats.config import parse_config
from lora_cli.formats.factors import parts_of, whole_reason
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import Header
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME, other_kind
from lora_cli.formats.modules import Located, locate_modules
from lora_cli.formats.skeleton import Skeleton
from lora_cli.names import layers_of, leaves
from lora_cli.records import BaseMatch, Status
from lora_cli.text import shortened

UNDECLARED: Final = "declares no base model"


class Facts(TypedDict):
    """The fields of `records.Adapter` from configuration, header and file names; for their meaning see there."""

    base_declared: str
    revision: str
    base: str
    base_match: BaseMatch
    peft_type: str
    rank: int | None
    alpha: float | None
    scale: float | None
    rslora: bool
    ranks: Mapping[str, int]
    target_modules: tuple[str, ...]
    modules: int
    layers: int
    dtype: str
    parameters: int
    bytes: int
    status: Status
    reason: str
    notes: str


def examine(
    config: bytes | None,
    header: Header | HeaderError | None,
    *,
    file_names: Collection[str] = (),
    base_name: str = "",
    base_aliases: Collection[str] = (),
    skeleton: Skeleton | None = None,
    vouched: bool = False,
    kind: str = "",
) -> Facts:
    """The facts about one adapter, and whether it is usable; never raises on a stranger's files.

    Args:
        config: the bytes of adapter_config.json, None where there is none.
        header: the header of the weights, or the error that parsing gave; None where there are no weights.
        file_names: names of the files beside them, to recognise an adapter of another kind.
        base_name: the base model asked for, `name@revision` for another than its main branch; "" for any.
        base_aliases: further names that the user vouches for.
        skeleton: the modules of the base's class, None if they are not known.
        vouched: the user named this adapter together with `base_name`. This is enough if the adapter declares no base
            and the base's modules are not known.
        kind: the kind of a non-PEFT adapter, if it was found by other means than file names.
    """
    if header is None:
        kind = kind or other_kind(file_names)
    problems = [kind] if kind else []
    settings = _read_config(config, problems)
    said = settings or LoraConfigFacts(peft_type="")
    located = _locate(said, header, skeleton, problems)
    known = skeleton is not None and bool(located.modules or located.missing)
    base_match, base, base_problem = _judge_base(settings, located.conflict, base_name, base_aliases, known, vouched)
    # Modules saved whole come last: the update can be compared and merged in spite of them.
    problems.extend(filter(None, [base_problem, whole_reason(located.whole)]))
    factors = parts_of(located.modules.values())
    ranks = {part.adapted: part.rank for part in factors}
    entries = {entry.name: entry for part in factors for entry in (part.a, part.b)}
    return Facts(
        base_declared=said.base,
        revision=said.revision,
        base=base,
        base_match=base_match,
        peft_type=said.peft_type,
        rank=max(ranks.values(), default=said.rank),
        alpha=said.alpha,
        scale=_common_scale(said, {part.pattern: part.rank for part in factors}),
        rslora=said.rslora,
        ranks=ranks,
        target_modules=_targets(said, ranks),
        modules=len(ranks),
        layers=len(layers_of(ranks)),
        dtype="+".join(sorted({entry.dtype for entry in entries.values()})),
        parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        bytes=header.file_size if isinstance(header, Header) else 0,
        status="unusable" if problems else "ok",
        reason=problems[0] if problems else "",
        notes="; ".join(located.notes),
    )


def _read_config(config: bytes | None, problems: list[str]) -> LoraConfigFacts | None:
    """The configuration, None if there is none that can be read; its faults are added to `problems`."""
    if config is None:
        problems.append(f"no {CONFIG_NAME}")
        return None
    try:
        settings = parse_config(config)
    except ConfigError as error:
        problems.append(error.message)
        return None
    problems.extend(settings.refusals())
    return settings


def _locate(
    config: LoraConfigFacts, header: Header | HeaderError | None, skeleton: Skeleton | None, problems: list[str]
) -> Located:
    """The modules with factors, none where the weights cannot be read; the faults are added to `problems`."""
    if not isinstance(header, Header):
        problems.append(header.message if header is not None else f"no {WEIGHTS_NAME}")
        return Located({})
    try:
        located = locate_modules(config, header, skeleton)
    except (HeaderError, ConfigError) as error:
        problems.append(error.message)
        return Located({})
    problems.extend(located.refusals if config.peft_type == "LORA" else ())
    return located


def _targets(config: LoraConfigFacts, modules: Collection[str]) -> tuple[str, ...]:
    """The last names of the modules with factors; without known factors, the configuration's targets."""
    if modules:
        return tuple(sorted(leaves(modules)))
    declared = config.target_modules
    return (declared,) if isinstance(declared, str) else tuple(sorted(declared))


def _common_scale(config: LoraConfigFacts, ranks: Mapping[str, int]) -> float | None:
    """The scale of every module, None where they differ; `ranks` are by the names that patterns match."""
    if config.peft_type != "LORA":
        return None
    try:
        scales = {*config.scales(ranks.items())}
    except ConfigError:
        return None
    return scales.pop() if len(scales) == 1 else None


def _judge_base(
    config: LoraConfigFacts | None, conflict: str, asked: str, aliases: Collection[str], known: bool, vouched: bool
) -> tuple[BaseMatch, str, str]:
    """(how the declared base matches, the resolved base, the fault or "").

    `known`: the adapter was checked against the base's skeleton; `conflict` is the fault found there.
    """
    if config is None:
        return "unknown", "", ""
    declared = config.pinned_base
    resolved = canonical_base(declared)
    if not asked:
        if not declared:
            return "unknown", "", _undeclared(config)
        return ("exact" if resolved == declared else "alias"), resolved, ""
    if declared == asked:
        return "exact", asked, conflict
    if same_base(declared, asked, aliases):
        return "alias", asked, conflict
    if other := _other_revision(declared, asked, aliases):
        return "mismatch", resolved, other
    if is_hub_id(declared):
        return "mismatch", resolved, f"wrong base: declares {shortened(declared)}, asked for {asked}"
    if conflict:
        said = shortened(declared) if declared else "none"
        return "mismatch", resolved, f"wrong base: declares {said}, asked for {asked}; {conflict}"
    match: BaseMatch = "shape" if known else "unknown"
    if not declared and (known or vouched):
        return match, asked, ""
    if not declared:
        return match, "", f"{_undeclared(config)}; the shapes of {asked} are not known here"
    but = ", but the shapes match" if known else ""
    reason = f"declares base {shortened(declared)}, not {asked}{but}"
    return match, resolved, f"{reason}: if both are the same model, accept it with --alias"


def _other_revision(declared: str, asked: str, aliases: Collection[str]) -> str:
    """The reason if two bases differ only in their revisions, else ""."""
    name, revision = split_revision(declared)
    wanted, at = split_revision(asked)
    if not same_base(name, wanted, [split_revision(alias)[0] for alias in aliases]):
        return ""
    if not revision:
        return f"for {wanted} without a revision, asked for revision {at}"
    return f"for revision {shortened(revision)} of {wanted}" + (f", asked for {at}" if at else "")


def _undeclared(config: LoraConfigFacts) -> str:
    named = config.trained_class
    return UNDECLARED + (f", only the class {shortened(named)}" if named else "")
