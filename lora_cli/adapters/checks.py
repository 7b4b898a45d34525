"""Eligible or not, and why: base model, coverage, representability, finite, norm. Knows numpy, not torch."""

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from lora_cli.adapters.base_names import canonical_base, is_hub_id, same_base, split_revision
from lora_cli.adapters.config import LoraConfigFacts, parse_config, shortened
from lora_cli.adapters.factors import ModuleFactors, whole_reason
from lora_cli.adapters.header import FACTOR_DTYPES, FLOAT8_DTYPES, Header, TensorEntry
from lora_cli.adapters.kinds import CONFIG_NAME, WEIGHTS_NAME, other_kind
from lora_cli.adapters.modules import Located, locate_modules
from lora_cli.adapters.skeleton import Skeleton
from lora_cli.errors import ConfigError, HeaderError, Refused
from lora_cli.records import BaseMatch, Status

__all__ = [
    "CONFIG_NAME",
    "MAX_NORM",
    "UNDECLARED",
    "WEIGHTS_NAME",
    "Facts",
    "WeightFacts",
    "examine",
    "scan_weights",
    "weight_status",
]

UNDECLARED: Final = "declares no base model"
MAX_NORM: Final = 1000.0

_CHUNK_BYTES = 1 << 22
_MAX_FACTOR_ELEMENTS = 1 << 26
_DECODED = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"} | dict.fromkeys(FLOAT8_DTYPES, "u1")
# Of 8-bit floats with a sign: bits of the mantissa, bias of the exponent, bytes that are NaN or Inf.
_FLOAT8: Mapping[str, tuple[int, int, Sequence[int]]] = {
    "F8_E4M3": (3, 7, (127, 255)),
    "F8_E5M2": (2, 15, (124, 125, 126, 127, 252, 253, 254, 255)),
    "F8_E4M3FNUZ": (3, 8, (128,)),
    "F8_E5M2FNUZ": (2, 16, (128,)),
}


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


@dataclass(frozen=True)
class WeightFacts:
    """The facts from the weights: `norm` is the Frobenius norm of s·B·A over all modules, None if not finite.

    `nonfinite_module` names the first module with a NaN or an infinity. `zero`: the update is 0 everywhere;
    `zero_b`: because every lora_B is.
    """

    sha256: str
    norm: float | None
    nonfinite_module: str | None
    zero: bool
    zero_b: bool


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
    settings = None
    if config is None:
        problems.append(f"no {CONFIG_NAME}")
    else:
        try:
            settings = parse_config(config)
        except ConfigError as error:
            problems.append(error.message)
    said = settings or LoraConfigFacts(peft_type="")
    problems.extend(said.refusals() if settings is not None else ())
    located = Located({})
    if not isinstance(header, Header):
        problems.append(header.message if header is not None else f"no {WEIGHTS_NAME}")
    else:
        try:
            located = locate_modules(said, header, skeleton)
        except (HeaderError, ConfigError) as error:
            problems.append(error.message)
        else:
            problems.extend(located.refusals if said.peft_type == "LORA" else ())
    known = skeleton is not None and bool(located.modules or located.missing)
    base_match, base, base_problem = _judge_base(settings, located.conflict, base_name, base_aliases, known, vouched)
    # Modules saved whole come last: the update can be compared and merged in spite of them.
    problems.extend(filter(None, [base_problem, whole_reason(located.whole)]))
    factors = [part for found in located.modules.values() for part in found.parts]
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
        layers=len({layer for name in ranks if (layer := _layer(name))}),
        dtype="+".join(sorted({entry.dtype for entry in entries.values()})),
        parameters=sum(math.prod(entry.shape) for entry in entries.values()),
        bytes=header.file_size if isinstance(header, Header) else 0,
        status="unusable" if problems else "ok",
        reason=problems[0] if problems else "",
        notes="; ".join(located.notes),
    )


def weight_status(facts: WeightFacts) -> tuple[Status, str]:
    """("ok", "") or ("unusable", reason), by the rules of the paper except that a small norm is no fault.

    arXiv 2602.12323 drops NaN, and norms outside (1, 1000]; an adapter that was barely trained is still an adapter.
    """
    if facts.nonfinite_module is not None:
        return "unusable", f"NaN or Inf in {facts.nonfinite_module}"
    if facts.zero_b:
        return "unusable", "every lora_B is zero: changes nothing"
    if facts.zero:
        return "unusable", "the update is zero in every module: changes nothing"
    if facts.norm is None or facts.norm > MAX_NORM:
        shown = "not finite" if facts.norm is None else f"{facts.norm:.3g}"
        return "unusable", f"the norm of its update is {shown}, above {MAX_NORM:g}"
    return "ok", ""


def scan_weights(path: Path, header: Header, config: LoraConfigFacts, skeleton: Skeleton | None = None) -> WeightFacts:
    """SHA-256 of the file, and the norm and finiteness of its factors, in float64.

    The norm needs no product of the size of a layer: ‖s·B·A‖² = s² ⟨BᵀB, AAᵀ⟩, with r×r matrices. Memory: the factors
    A of one place in the file, and chunks of the rest. The factors are read place by place after the hash, from the
    pages that hashing left in the cache. Raises Refused for a file that no longer fits its header, HeaderError,
    ConfigError.
    """
    located = locate_modules(config, header, skeleton)
    stored = {part.a.name: part for factors in located.modules.values() for part in factors.parts}
    for factors in stored.values():
        if (size := math.prod(factors.a.shape)) > _MAX_FACTOR_ELEMENTS:
            raise Refused(f"lora_A of {shortened(factors.adapted)} has {size:,} entries, over the safety limit")
    square = 0.0
    zero_b = True
    nonfinite: str | None = None
    with path.open("rb") as file:
        if file.seek(0, 2) != header.file_size:
            raise Refused(f"{path.name} has changed: its header was read from a file of {header.file_size:,} bytes")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for factors in stored.values():
            finite, untrained, update = _square_of(file, factors)
            if not finite:
                nonfinite = factors.adapted
                break
            zero_b = zero_b and untrained
            scale = config.scale(factors.pattern, factors.rank)
            # A product of floats overflows to Inf, a power raises.
            square += update * scale * scale
    if nonfinite is not None:
        return WeightFacts(sha256, None, nonfinite, zero=False, zero_b=False)
    norm = math.sqrt(square) if math.isfinite(square) else None
    return WeightFacts(sha256, norm, None, zero=norm == 0.0, zero_b=zero_b and bool(stored))


def _square_of(file: BufferedReader, factors: ModuleFactors) -> tuple[bool, bool, float]:
    """(all finite, B is zero, ‖B·A‖² summed over the experts) of one place in the file."""
    experts, rank = factors.experts, factors.rank
    a = np.concatenate(list(_rows(file, factors.a))).reshape(experts, rank, -1)  # (experts, rank, in)
    if not np.isfinite(a).all():
        return False, False, 0.0
    small = rank <= a.shape[2]
    gram_b = np.zeros((experts, rank, rank) if small else (0, 0, 0))
    square = 0.0
    zero_b = True
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in _rows(file, factors.b):
            if not np.isfinite(rows).all():
                return False, False, 0.0
            zero_b = zero_b and not rows.any()
            b = rows.reshape(len(rows), rank, experts).transpose(2, 0, 1)  # (experts, some of out, rank)
            if small:
                gram_b += b.transpose(0, 2, 1) @ b
            else:
                update = b @ a
                square += float(np.vdot(update, update))
        if small:
            square = float(np.vdot(gram_b, a @ a.transpose(0, 2, 1)))
    return True, zero_b, max(square, 0.0) if math.isfinite(square) else math.inf


def _rows(file: BufferedReader, entry: TensorEntry) -> Iterator[NDArray[np.float64]]:
    """The rows of one stored factor in chunks, as float64; a convolution's kernel is part of the columns."""
    if entry.dtype not in FACTOR_DTYPES:
        raise Refused(f"{entry.name} is stored as {entry.dtype}; factors must be floats")
    rows, columns = entry.shape[0], math.prod(entry.shape[1:])
    stored = np.dtype(_DECODED[entry.dtype])
    step = max(1, _CHUNK_BYTES // (columns * 8))
    file.seek(entry.begin)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        data = file.read(count * columns * stored.itemsize)
        if len(data) != count * columns * stored.itemsize:
            raise Refused(f"the file ends inside {entry.name}")
        numbers = np.frombuffer(data, stored)
        if entry.dtype == "BF16":
            numbers = (numbers.astype("<u4") << 16).view("<f4")
        elif entry.dtype in FLOAT8_DTYPES:
            numbers = _float8_values(entry.dtype)[numbers]
        yield numbers.astype(np.float64).reshape(count, columns)


@cache
def _float8_values(dtype: str) -> NDArray[np.float64]:
    """The value of each byte, (256,), NaN for non-finite ones.

    Source: OCP 8-bit Floating Point Specification 1.0; FNUZ: arXiv 2206.02915; E8M0: OCP Microscaling Formats 1.0.
    """
    byte = np.arange(256)
    values: NDArray[np.float64] = np.exp2(byte - 127.0)
    not_finite: Sequence[int] = (255,)
    if dtype in _FLOAT8:
        width, bias, not_finite = _FLOAT8[dtype]
        exponent = (byte & 127) >> width
        mantissa = (byte & ((1 << width) - 1)) / (1 << width) + (exponent > 0)
        values = np.where(byte < 128, 1.0, -1.0) * np.ldexp(mantissa, np.maximum(exponent, 1) - bias)
    values[list(not_finite)] = np.nan
    return values


def _targets(config: LoraConfigFacts, modules: Collection[str]) -> tuple[str, ...]:
    """The last names of the modules with factors; without known factors, the configuration's targets."""
    if modules:
        return tuple(sorted({name.rpartition(".")[2] for name in modules}))
    declared = config.target_modules
    return (declared,) if isinstance(declared, str) else tuple(sorted(declared))


def _layer(module: str) -> str:
    """The part of a module's name up to its first number, "" if it has none."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return ""


def _common_scale(config: LoraConfigFacts, ranks: Mapping[str, int]) -> float | None:
    """The scale of every module, None where they differ; `ranks` are by the names that patterns match."""
    if config.peft_type != "LORA":
        return None
    try:
        scales = {config.scale(name, rank) for name, rank in ranks.items()}
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
