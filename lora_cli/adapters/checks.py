"""Eligible or not, and why: base model, coverage, representability, finite, norm. Knows numpy, not torch."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

from lora_cli.adapters.config import LoraConfigFacts, parse_config, shortened
from lora_cli.adapters.factors import ModuleFactors, whole_reason
from lora_cli.adapters.header import FLOAT_DTYPES, Header, TensorEntry
from lora_cli.adapters.modules import Located, locate_modules
from lora_cli.adapters.skeleton import Skeleton
from lora_cli.errors import ConfigError, HeaderError, Refused
from lora_cli.records import BaseMatch, Status
from lora_cli.settings import folder_of

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_NORM: Final = 1000.0

_CHUNK_BYTES = 1 << 22
_MAX_FACTOR_ELEMENTS = 1 << 26
_DECODED = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


class Facts(TypedDict):
    """The fields of `records.Adapter` that configuration, header and file names give; see there for their meaning."""

    base_declared: str
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
    """What only the weights tell: `norm` is the Frobenius norm of s·B·A over all modules, None if not finite.

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
) -> Facts:
    """What one adapter is, and whether it can be used; never raises on what a stranger wrote.

    `config` holds the bytes of adapter_config.json (None: there is none), `header` the parsed header of its weights,
    or the error that parsing gave (None: no weights). `file_names` are the names beside them, to tell a pickle from
    nothing. `base_name` is the base model asked for ("" for any), `base_aliases` are further names that the user
    vouches for, `skeleton` is what the base's class is made of, where that is known.
    """
    problems: list[str] = []
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
        problems.append(header.message if header is not None else _no_weights(file_names))
    else:
        try:
            located = locate_modules(said, header, skeleton)
        except (HeaderError, ConfigError) as error:
            problems.append(error.message)
        else:
            problems.extend(located.refusals if said.peft_type == "LORA" else ())
    known = skeleton is not None and bool(located.modules or located.missing)
    base_match, base, base_problem = _judge_base(settings, located.conflict, base_name, base_aliases, known)
    # Modules saved whole come last: they alone leave an update that can be compared and merged.
    problems.extend(filter(None, [base_problem, whole_reason(located.whole)]))
    factors = [part for found in located.modules.values() for part in found.parts]
    ranks = {part.pattern: part.rank for part in factors}
    entries = {entry.name: entry for part in factors for entry in (part.a, part.b)}
    return Facts(
        base_declared=said.base,
        base=base,
        base_match=base_match,
        peft_type=said.peft_type,
        rank=max(ranks.values(), default=said.rank),
        alpha=said.alpha,
        scale=_common_scale(said, ranks),
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


def only_saved_whole(reason: str) -> bool:
    """Whether all that is wrong with an adapter is that modules were saved whole beside its update."""
    return reason.startswith(("tensors of a full head saved (", "full weights saved ("))


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
            raise Refused(f"lora_A of {shortened(factors.pattern)} has {size:,} entries, over the safety limit")
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
                nonfinite = factors.pattern
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
    if entry.dtype not in FLOAT_DTYPES:
        raise Refused(f"{entry.name} is {entry.dtype}: factors are read as floats only")
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
        yield numbers.astype(np.float64).reshape(count, columns)


def _targets(config: LoraConfigFacts, modules: Collection[str]) -> tuple[str, ...]:
    """The last names of the modules with factors; where none are known, what the configuration says."""
    if modules:
        return tuple(sorted({name.rpartition(".")[2] for name in modules}))
    declared = config.target_modules
    return (declared,) if isinstance(declared, str) else tuple(sorted(declared))


def _layer(module: str) -> str:
    """The part of a module's name up to its first number, "" where it has none."""
    parts = module.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return ""


def _common_scale(config: LoraConfigFacts, ranks: Mapping[str, int]) -> float | None:
    if config.peft_type != "LORA":
        return None
    try:
        scales = {config.scale(name, rank) for name, rank in ranks.items()}
    except ConfigError:
        return None
    return scales.pop() if len(scales) == 1 else None


def _no_weights(file_names: Collection[str]) -> str:
    for path in sorted(file_names):
        name = path.replace("\\", "/").rpartition("/")[2]
        if name.startswith("adapter_model") and name.lower().endswith(PICKLE_SUFFIXES):
            return f"pickle only ({shortened(name)}): never opened"
    return f"no {WEIGHTS_NAME}"


# Bare ids of the Hub's early days, and where they live now.
_MOVED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
    "distilbert-base-cased": "distilbert/distilbert-base-cased",
    "distilroberta-base": "distilbert/distilroberta-base",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "xlm-roberta-large": "FacebookAI/xlm-roberta-large",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large-uncased": "google-bert/bert-large-uncased",
    "bert-base-multilingual-cased": "google-bert/bert-base-multilingual-cased",
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
    "t5-large": "google-t5/t5-large",
    "albert-base-v2": "albert/albert-base-v2",
}
# Owners that republish other people's models, quantised or as they are, under the model's own name.
_MIRRORS = frozenset(
    ("unsloth", "thebloke", "nousresearch", "mlx-community", "neuralmagic", "redhatai", "hugging-quants", "modelcloud")
) | frozenset(("lmstudio-community", "llm-research", "ai-modelscope", "solidrust", "ista-daslab", "lonestriker"))
# First parts of a path of two that is a folder and no owner.
_FOLDERS = frozenset(("model", "models", "base", "base_model", "checkpoint", "checkpoints", "weights", "pretrained"))
_QUANTISED = re.compile(
    r"[-_.](?:(?:unsloth[-_])?bnb[-_][48]bit|[48]bit|int[48]|w\da\d{1,2}|nf4|gptq|awq|fp8|fp16|bf16|dynamic|"
    r"gptq[-_]int[48]|quantized|hqq|exl2|gguf|mlx)$"
)
_TOKEN = re.compile(r"[a-z]+|\d+")
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")
_MAX_BASE_NAME = 1_000


def canonical_base(name: str) -> str:
    """`name` as base models are compared and shown: an id of the Hub where it is one, of a path the last part.

    Moved ids get their owner (`gpt2` → `openai-community/gpt2`), suffixes of quantised twins go, a path into the
    Hub's cache becomes the id it holds. Two names may still mean one base: compare with `same_base`.
    """
    owner, model, _ = _split(name)
    return f"{owner}/{model}" if owner else model


def public_base(base: str, aliases: Sequence[str] = (), declared: Iterable[str] = ()) -> str:
    """The name of a base model for other people: never a place on this machine.

    An id of the Hub is its own name. A folder goes by its first alias, else by what most adapters have `declared`, else
    by the last part of its path. Without a base, what the adapters declare decides.
    """
    folder = folder_of(base)
    if base and folder is None and not base.startswith(("/", "~", ".")):
        return base
    if base and aliases:
        return aliases[0]
    names = Counter(map(canonical_base, declared))
    if names:
        return min(names, key=lambda name: (-names[name], name))
    return canonical_base(str(folder.resolve()) if folder is not None else base)


def same_base(a: str, b: str, aliases: Collection[str] = ()) -> bool:
    """Do the names `a` and `b` mean one base model, or does `a` mean one of the `aliases`?

    Case, punctuation, known mirrors (unsloth/…), quantised twins (…-bnb-4bit) and folders on someone's disk make no
    difference; any other part of the name does: neither …-it nor …-abliterated is its base.
    """
    return any(_same(a, other) for other in (b, *aliases))


def _same(a: str, b: str) -> bool:
    if not a or not b:
        return False
    (owner_a, model_a, _), (owner_b, model_b, _) = _split(a), _split(b)
    if not _key(model_a) or _key(model_a) != _key(model_b):
        return False
    owners = {owner_a.lower(), owner_b.lower()}
    return len(owners) == 1 or "" in owners or bool(owners & _MIRRORS)


def _split(name: str) -> tuple[str, str, bool]:
    """(owner, model, is an id of the Hub): owner "" for a bare name or a path."""
    path = name[:_MAX_BASE_NAME].strip().replace("\\", "/").rstrip("/")
    if cached := _CACHED.search(path):
        return cached[1], _plain_twin(cached[2]), True
    path = re.sub(r"^https?://(?:huggingface\.co|hf\.co)/", "", path)
    parts = path.split("/")
    if len(parts) == 1 and path.lower() in _MOVED:
        parts = _MOVED[path.lower()].split("/")
    local = path.startswith(("/", ".", "~")) or ":" in parts[0] or len(parts) > 2
    if len(parts) == 2 and not local and parts[0].lower() not in _FOLDERS:
        return parts[0], _plain_twin(parts[1]), True
    return "", _plain_twin(parts[-1]), False


def _plain_twin(model: str) -> str:
    while found := _QUANTISED.search(model.lower()):
        model = model[: found.start()]
    return model


def _key(model: str) -> tuple[str, ...]:
    """Letters and numbers of a model's name: gemma3-270m-it and gemma-3-270m-it are one, 3.1-8b and 3-18b are two."""
    tokens = tuple(_TOKEN.findall(model.lower()))
    # Meta's Llamas were renamed: Meta-Llama-3.1-8B is Llama-3.1-8B.
    return tokens[1:] if tokens[:2] == ("meta", "llama") else tokens


def _judge_base(
    config: LoraConfigFacts | None, conflict: str, asked: str, aliases: Collection[str], known: bool
) -> tuple[BaseMatch, str, str]:
    """(how the declared base matches, the base as resolved, what is wrong with it or "").

    `known`: the adapter was held against the base's skeleton; `conflict` is what that found.
    """
    if config is None:
        return "unknown", "", ""
    declared = config.base
    resolved = canonical_base(declared)
    if not asked:
        if not declared:
            return "unknown", "", _undeclared(config)
        return ("exact" if resolved == declared else "alias"), resolved, ""
    if declared == asked:
        return "exact", asked, conflict
    if same_base(declared, asked, aliases):
        return "alias", asked, conflict
    if _split(declared)[2]:
        return "mismatch", resolved, f"wrong base: declares {shortened(declared)}, asked for {asked}"
    if conflict:
        said = shortened(declared) if declared else "none"
        return "mismatch", resolved, f"wrong base: declares {said}, asked for {asked}; {conflict}"
    match: BaseMatch = "shape" if known else "unknown"
    but = "; its shapes fit" if known else ""
    if not declared:
        return match, "", _undeclared(config) + but
    return match, resolved, f"base {shortened(declared)} is not known to be {asked}{but}: accept it with --alias"


def _undeclared(config: LoraConfigFacts) -> str:
    mapping = config.unknown.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return f"declares no base model, only the class {shortened(named)}" if named else "declares no base model"
