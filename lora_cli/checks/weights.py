"""The facts that need an adapter's weights: finite or not, zero or not, the norm of its update. numpy, not torch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lora_cli.errors import ConfigError, HeaderError, Refused
from lora_cli.files import open_regular
from lora_cli.formats.config import parse_config
from lora_cli.formats.factors import AnyFactors, ModuleFactors, parts_of
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import Header, TensorEntry
from lora_cli.formats.modules import locate_modules
from lora_cli.formats.numbers import KINDS, widened
from lora_cli.formats.skeleton import Skeleton
from lora_cli.hashes import sha256_of
from lora_cli.precision import FACTORS
from lora_cli.records import Adapter, Status
from lora_cli.text import shortened

MAX_NORM: Final = 1000.0

_CHUNK_BYTES = 1 << 22
_MAX_FACTOR_ELEMENTS = 1 << 26


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


def weight_status(facts: WeightFacts, most: float = MAX_NORM) -> tuple[Status, str]:
    """("ok", "") or ("unusable", reason), by the rules of the paper except that a small norm is no fault.

    arXiv 2602.12323 drops NaN, and norms outside (1, 1000]; an adapter that was barely trained is still an adapter.
    """
    if facts.nonfinite_module is not None:
        return "unusable", f"NaN or Inf in {facts.nonfinite_module}"
    if facts.zero_b:
        return "unusable", "every lora_B is zero: changes nothing"
    if facts.zero:
        return "unusable", "the update is zero in every module: changes nothing"
    if facts.norm is None or facts.norm > most:
        shown = "not finite" if facts.norm is None else f"{facts.norm:.3g}"
        return "unusable", f"the norm of its update is {shown}, above {most:g}"
    return "ok", ""


def weighed(
    adapter: Adapter,
    weights: Path,
    header: Header,
    config: bytes,
    skeleton: Skeleton | None = None,
    *,
    most: float = MAX_NORM,
) -> Adapter:
    """`adapter` with the facts from its weights: SHA-256, norm, and whether they are sound (`most` bounds the norm)."""
    try:
        facts = scan_weights(weights, header, parse_config(config), skeleton)
    except (Refused, ConfigError, HeaderError) as error:
        return replace(adapter, status="unusable", reason=error.message)
    return judged(adapter, facts, most)


def judged(adapter: Adapter, facts: WeightFacts, most: float = MAX_NORM) -> Adapter:
    """`adapter` with these facts, unusable if they say so."""
    adapter = replace(adapter, sha256=facts.sha256, norm=facts.norm)
    status, reason = weight_status(facts, most)
    return adapter if status == "ok" else replace(adapter, status=status, reason=reason)


def scan_weights(path: Path, header: Header, config: LoraConfigFacts, skeleton: Skeleton | None = None) -> WeightFacts:
    """SHA-256 of the file, and the norm and finiteness of its factors, in float64.

    The norm needs no product of the size of a layer: ‖s·B·A‖² = s² ⟨BᵀB, AAᵀ⟩, with r×r matrices. Memory: the factors
    A of one place in the file, and chunks of the rest. The factors are read place by place after the hash, from the
    pages that hashing left in the cache. Raises Refused for a file that no longer fits its header, HeaderError,
    ConfigError.
    """
    located = locate_modules(config, header, skeleton)
    stored = [*stored_factors(located.modules.values()).values()]
    scales = config.scales((factors.pattern, factors.rank) for factors in stored)
    square = 0.0
    zero_b = True
    nonfinite: str | None = None
    with open_regular(path) as file:
        if file.seek(0, 2) != header.file_size:
            raise Refused(f"{path.name} has changed: its header was read from a file of {header.file_size:,} bytes")
        sha256 = sha256_of(path)
        for factors, scale in zip(stored, scales, strict=True):
            grams = grams_of(file, factors)
            if grams is None:
                nonfinite = factors.adapted
                break
            zero_b = zero_b and grams.untrained
            # A product of floats overflows to Inf, a power raises.
            square += grams.square * scale * scale
    if nonfinite is not None:
        return WeightFacts(sha256, None, nonfinite, zero=False, zero_b=False)
    norm = math.sqrt(square) if math.isfinite(square) else None
    return WeightFacts(sha256, norm, None, zero=norm == 0.0, zero_b=zero_b and bool(stored))


@dataclass(frozen=True, slots=True, eq=False)
class Grams:
    """BᵀB and AAᵀ of the updates B·A at one place in the file, one per expert, each (experts, rank, rank) float64.

    Where the rank exceeds `in`, ΔWᵀΔW and the identity take their place, (experts, in, in) and (in, in): the
    eigenvalues of `b @ a` are the squared singular values in either case.
    """

    b: NDArray[np.float64]
    a: NDArray[np.float64]
    untrained: bool

    @property
    def square(self) -> float:
        """‖B·A‖² summed over the experts; Inf where it overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            square = float((self.b * self.a).sum())
        return max(square, 0.0) if math.isfinite(square) else math.inf


def stored_factors(modules: Iterable[AnyFactors]) -> Mapping[str, ModuleFactors]:
    """The factors of `modules` by their places in the file. Refused for factors above the safety limit."""
    stored = {part.a.name: part for part in parts_of(modules)}
    for factors in stored.values():
        if (size := math.prod(factors.a.shape)) > _MAX_FACTOR_ELEMENTS:
            raise Refused(f"lora_A of {shortened(factors.adapted)} has {size:,} entries, over the safety limit")
    return stored


def grams_of(file: BufferedReader, factors: ModuleFactors) -> Grams | None:
    """The Grams of one place in the file; None if a factor holds NaN or Inf."""
    experts, rank = factors.experts, factors.rank
    a = np.concatenate(list(rows_of(file, factors.a))).reshape(experts, rank, -1)  # (experts, rank, in)
    if not np.isfinite(a).all():
        return None
    small = rank <= a.shape[2]
    side = min(rank, a.shape[2])
    gram = np.zeros((experts, side, side))
    untrained = True
    with np.errstate(over="ignore", invalid="ignore"):
        for rows in rows_of(file, factors.b):
            if not np.isfinite(rows).all():
                return None
            untrained = untrained and not rows.any()
            b = rows.reshape(len(rows), rank, experts).transpose(2, 0, 1)  # (experts, some of out, rank)
            part = b if small else b @ a
            gram += part.transpose(0, 2, 1) @ part
        return Grams(gram, a @ a.transpose(0, 2, 1) if small else np.eye(side), untrained)


def rows_of(file: BufferedReader, entry: TensorEntry) -> Iterator[NDArray[np.float64]]:
    """The rows of one stored factor in chunks, as float64; a convolution's kernel is part of the columns."""
    if entry.dtype not in FACTORS:
        raise Refused(f"{entry.name} is stored as {entry.dtype}; factors must be floats")
    rows, columns = entry.shape[0], math.prod(entry.shape[1:])
    stored = KINDS[entry.dtype]
    step = max(1, _CHUNK_BYTES // (columns * 8))
    file.seek(entry.begin)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        data = file.read(count * columns * stored.itemsize)
        if len(data) != count * columns * stored.itemsize:
            raise Refused(f"the file ends inside {entry.name}")
        numbers = widened(np.frombuffer(data, stored), entry.dtype)
        yield numbers.astype(np.float64).reshape(count, columns)
