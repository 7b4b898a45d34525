"""The factors in an adapter's file: the pairs of tensors, and the kinds of the other tensors."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lora_cli.errors import HeaderError
from lora_cli.formats.header import Header, TensorEntry
from lora_cli.formats.skeleton import WEIGHT, Kind
from lora_cli.precision import FACTORS
from lora_cli.text import shortened

PREFIX = "base_model.model."
"""What PEFT puts in front of every name of the base model."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two factors as stored. `place` is their tensors' name up to ".lora_"; `embedding`: as of an embedding;
    `convolution`: with a kernel.

    A is (r, in), or (r, in, kernel…) of a convolution; B is (out, r), or (out, r, 1…).
    """

    place: str
    a: TensorEntry
    b: TensorEntry
    embedding: bool = False
    convolution: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class ModuleFactors:
    """The factors of one matrix of the base: A (rank, in), B (out, rank), as stored or as a part of what is stored.

    `module` is the matrix's name in the base (see `adapters.skeleton`), `pattern` the name under which PEFT looks for
    its rank and alpha: that of the module, or of the parameter where the configuration names this. Of fused experts,
    `expert` of `experts` takes its rows of A and its columns of B.
    """

    module: str
    a: TensorEntry
    b: TensorEntry
    kind: Kind = "linear"
    pattern: str = ""
    expert: int = 0
    experts: int = 1
    rank: int = field(init=False)
    out_features: int = field(init=False)
    in_features: int = field(init=False)
    adapted: str = field(init=False)
    """The module or the stacked parameter that the pair in the file is for."""
    kernel: tuple[int, ...] = field(init=False)
    """The kernel size of a convolution, else ()."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", self.a.shape[0] // self.experts)
        object.__setattr__(self, "out_features", self.b.shape[0])
        object.__setattr__(self, "in_features", math.prod(self.a.shape[1:]))
        object.__setattr__(self, "adapted", self.pattern.removesuffix(WEIGHT))
        object.__setattr__(self, "kernel", self.a.shape[2:])

    @property
    def form(self) -> str:
        """The form of the adapted module, in words; only factors of one form can be added."""
        kernel = "×".join(map(str, self.kernel))
        return f"a convolution {kernel}" if self.kernel else "an embedding" if self.kind == "embedding" else "a layer"

    @property
    def parts(self) -> "tuple[ModuleFactors, ...]":
        """The factors that are stored: itself."""
        return (self,)

    @property
    def rows(self) -> tuple[int, ...]:
        """The first row of each part."""
        return (0,)


@dataclass(frozen=True, slots=True)
class FusedFactors:
    """The factors of a matrix of `out_features` rows, shares of which have factors of their own.

    `parts` are those factors and `rows` the first row of each. The update is block-diagonal in B, so that ranks add up;
    a share without factors is zero.
    """

    module: str
    parts: tuple[ModuleFactors, ...]
    rows: tuple[int, ...]
    out_features: int
    kind: Kind = "parameter"

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)

    @property
    def in_features(self) -> int:
        return self.parts[0].in_features

    @property
    def kernel(self) -> tuple[int, ...]:
        return ()

    @property
    def form(self) -> str:
        return "a layer"


AnyFactors = ModuleFactors | FusedFactors


def parts_of(modules: Iterable[AnyFactors]) -> list[ModuleFactors]:
    """The factors that are stored, of all modules."""
    return [part for factors in modules for part in factors.parts]


@dataclass(frozen=True, slots=True)
class Sorted:
    """The tensors of a file: pairs of factors by place, and all others.

    `names` are the adapters' names inside tensor names (`lora_A.NAME.weight`), which PEFT does not save. `whole` are
    tensors of the base that were saved, `copies`, by the place of an adapted layer, those of what it is wrapped
    around, `refused` the reasons why the pairs are not the whole update, one per kind.
    """

    pairs: Mapping[str, Pair]
    names: frozenset[str]
    whole: tuple[TensorEntry, ...]
    copies: tuple[tuple[str, TensorEntry], ...]
    refused: tuple[str, ...]


def sort_tensors(header: Header) -> Sorted:
    """Sort tensors into factors and others, in the order of the file.

    Raises HeaderError if a factor has no partner or exists twice, or the ranks of a pair differ or are 0.
    """
    sides: dict[str, dict[str, TensorEntry]] = {}
    names, others = set(), []
    for entry in header.tensors.values():
        found = _factor(entry)
        if found is None:
            others.append(entry)
            continue
        place, side, name = found
        names.add(name)
        if sides.setdefault(place, {}).setdefault(side, entry) is not entry and len(names - {""}) < 2:
            raise HeaderError(f"{shortened(shown(place))} has {side} twice")
    pairs = {place: _pair(place, found) for place, found in sides.items()}
    whole: list[TensorEntry] = []
    copies: list[tuple[str, TensorEntry]] = []
    refused: dict[str, str] = {}
    for entry in others:
        kind, reason = _other(entry.name, pairs, header)
        if kind == "copy":
            copies.append((_wrapping(entry.name), entry))
        elif kind == "whole":
            whole.append(entry)
        elif kind:
            refused.setdefault(kind, reason)
    for pair in pairs.values():
        for entry in (pair.a, pair.b):
            if entry.dtype not in FACTORS:
                reason = f"{shortened(entry.name)} is stored as {entry.dtype}; factors must be floats"
                refused.setdefault("dtype", reason)
    return Sorted(pairs, frozenset(names - {""}), tuple(whole), tuple(copies), tuple(refused.values()))


_SAVED_WHOLE = ("tensors of a full head saved", "full weights saved")
TAKE_THE_UPDATE = "lora merge takes its update alone with --saved-modules drop"
"""The remedy for an adapter that is more than its update."""


def whole_reason(names: Sequence[str]) -> str:
    """The reason why modules saved whole make an adapter more than its update; "" without such modules."""
    if not names:
        return ""
    head, other = _SAVED_WHOLE
    return f"{head if _HEADS.intersection(names[0].split('.')) else other} ({shortened(names[0])}.weight)"


def only_saved_whole(reason: str) -> bool:
    """Whether `whole_reason` is an adapter's first fault. It is checked last, so it is then the only one."""
    return reason.startswith(tuple(f"{text} (" for text in _SAVED_WHOLE))


def shown(name: str) -> str:
    """A tensor's name without PEFT's prefix, for messages."""
    return name.removeprefix(PREFIX)


# Each side of a pair, with the parts that follow it in a tensor's name.
_SIDES: Mapping[str, list[str]] = {
    "lora_A": ["weight"],
    "lora_B": ["weight"],
    "lora_embedding_A": [],
    "lora_embedding_B": [],
}


def _factor(entry: TensorEntry) -> tuple[str, str, str] | None:
    """(place, side, name of an adapter in it or "") of a factor, else None."""
    parts = entry.name.split(".")
    for at in range(1, len(parts)):
        if (side := parts[at]) in _SIDES:
            ending, rest = _SIDES[side], parts[at + 1 :]
            named = rest[: len(rest) - len(ending)]
            fits = rest[len(named) :] == ending and len(named) <= 1
            matrix = len(entry.shape) == 2 or (len(entry.shape) in (3, 4, 5) and bool(ending))
            return (".".join(parts[:at]), side, "".join(named)) if fits and matrix else None
    return None


def _pair(place: str, sides: Mapping[str, TensorEntry]) -> Pair:
    for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        for side, missing in ((one, other), (other, one)):
            if side in sides and missing not in sides:
                raise HeaderError(f"{shortened(shown(place))} has {side} but no {missing}")
    embedding = "lora_embedding_A" in sides
    if embedding and "lora_A" in sides:
        raise HeaderError(f"{shortened(shown(place))} has factors of a layer and of an embedding")
    a, b = (sides[f"lora_embedding_{side}" if embedding else f"lora_{side}"] for side in "AB")
    if a.shape[0] != b.shape[1]:
        raise HeaderError(f"{shortened(shown(place))} has rank {a.shape[0]} in lora_A but {b.shape[1]} in lora_B")
    if 0 in a.shape or 0 in b.shape:
        raise HeaderError(f"{shortened(shown(place))} has an empty factor")
    if len(a.shape) != len(b.shape) or any(size != 1 for size in b.shape[2:]):
        raise HeaderError(f"{shortened(shown(place))} has a kernel in lora_A that does not go with lora_B")
    return Pair(place, a, b, embedding, convolution=len(a.shape) > 2)


_HEADS = frozenset(("score", "classifier", "pre_classifier", "lm_head", "qa_outputs", "v_head"))
_ONLY_TRAINING = frozenset(("lora_velora_embed", "lora_monteclora_sampler"))
_KINDS = (
    ("lora_magnitude_vector", "DoRA", "DoRA: weights are rescaled by a trained magnitude ({})"),
    ("lora_diag", "KaSA", "KaSA: a diagonal stands between B and A ({})"),
    ("token_adapter", "tokens", "single token embeddings were trained ({})"),
)


def _other(name: str, pairs: Mapping[str, Pair], header: Header) -> tuple[str, str]:
    """(kind, reason) of a tensor that is no factor; "whole" for a saved weight, "copy" for one
    of what an adapted layer is wrapped around, "" where it says nothing new."""
    parts = name.split(".")
    text = shortened(shown(name))
    if _ONLY_TRAINING.intersection(parts):
        return "", ""
    for part, kind, reason in _KINDS:
        if part in parts:
            return kind, reason.format(text)
    if _SIDES.keys() & set(parts):
        return _odd_factor(name, text, len(header.tensors[name].shape))
    if any(part.startswith("lora_") for part in parts):
        return "variant", f"a variant of LoRA that is not known here ({text})"
    if _wrapping(name) in pairs:
        return "copy", ""  # PEFT saves one of an adapted embedding or head
    if parts[-1] == "bias" and name.removesuffix("bias") + "weight" not in header.tensors:
        return "bias", f"biases of the base were trained ({text})"
    return "whole", ""


def _wrapping(name: str) -> str:
    """The layer around a tensor's module, "" if there is none."""
    place, inner, _ = name.partition(".base_layer.")
    return place if inner else ""


def _odd_factor(name: str, text: str, dimensions: int) -> tuple[str, str]:
    if name.endswith(".bias"):
        return "lora_bias", f"lora_bias: B has a bias of its own ({text})"
    if dimensions == 2:
        return "name", f"a factor under a name that PEFT does not use ({text})"
    return "shard", f"a factor is not a matrix, as after saving a shard ({text} has {dimensions} dimensions)"
