"""Pairs of factors that stand in one file under names of their own."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from lora_cli.errors import Refused
from lora_cli.formats.header import TensorEntry
from lora_cli.formats.skeleton import Kind
from lora_cli.hashes import opened_as
from lora_cli.imports import ForeignModule, Tensors, demand_floats
from lora_cli.precision import FLOATS
from lora_cli.text import shortened

if TYPE_CHECKING:
    from lora_cli.algebra.lowrank import LowRank

EMBEDDINGS = frozenset(("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings"))
"""The last names of modules that are embeddings of tokens."""
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def paired(names: Iterable[str], ends: tuple[str, str]) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Place → the names of its two tensors, which are the place and one of `ends`; and the names of all other tensors.

    Raises Refused for a tensor without its partner.
    """
    sides: dict[str, dict[int, str]] = {}
    others = []
    for name in names:
        side = next((at for at, end in enumerate(ends) if name.endswith(end) and len(name) > len(end)), None)
        if side is None:
            others.append(name)
        else:
            sides.setdefault(name[: -len(ends[side])], {})[side] = name
    for place, found in sides.items():
        if len(found) < 2:
            [have] = found
            raise Refused(f"{shortened(place)} has {ends[have][1:]} but no {ends[1 - have][1:]}")
    return {place: (found[0], found[1]) for place, found in sides.items()}, others


def turned(file: Tensors, a: str, b: str, *, scale: float, kind: Kind = "linear") -> ForeignModule:
    """The module of factors stored transposed: `a` (in, r) and `b` (r, out).

    Raises Refused for factors that are no matrices of floats of one rank.
    """
    one, other = file.header.tensors[a], file.header.tensors[b]
    demand_matrices(one, other)
    if one.shape[1] != other.shape[0]:
        raise Refused(f"{shortened(a)} has rank {one.shape[1]}, {shortened(b)} rank {other.shape[0]}")

    def read() -> "LowRank":
        from lora_cli.algebra.lowrank import LowRank

        return LowRank(file.read(b).T.contiguous(), file.read(a).T.contiguous())

    return ForeignModule((other.shape[1], one.shape[0]), one.shape[1], read, scale, kind)


def straight(file: Tensors, a: str, b: str) -> ForeignModule:
    """The module of factors stored as PEFT has them, at scale 1: `a` (r, in), `b` (out, r), and a convolution's kernel.

    Raises Refused for factors that are no floats, or whose shapes do not fit together.
    """
    one, other = file.header.tensors[a], file.header.tensors[b]
    demand_floats((one, other))
    if len(one.shape) not in (2, 3, 4, 5) or len(one.shape) != len(other.shape) or 0 in (*one.shape, *other.shape):
        raise Refused(f"{shortened(a)} and {shortened(b)} are no factors of a layer or of a convolution")
    if one.shape[0] != other.shape[1]:
        raise Refused(f"{shortened(a)} has rank {one.shape[0]}, {shortened(b)} rank {other.shape[1]}")
    if any(size != 1 for size in other.shape[2:]):
        raise Refused(f"{shortened(b)} has a kernel of its own, which PEFT's convolutions have not")

    def read() -> "LowRank":
        from lora_cli.algebra.lowrank import LowRank

        return LowRank(file.read(b).flatten(1), file.read(a).flatten(1))

    shape = (other.shape[0], math.prod(one.shape[1:]))
    kernel = one.shape[2:]
    return ForeignModule(shape, one.shape[0], read, kind="conv" if kernel else "linear", kernel=kernel)


def scales(file: Tensors, places: Mapping[str, int], end: str = ".alpha") -> tuple[dict[str, float], bool]:
    """alpha/rank of each place by its tensor `place + end`, and whether the file has such tensors.

    A file without any is of programs and times that applied B·A as it is: the scale is 1.

    Args:
        places: the rank of each place.

    Raises Refused where only some places have one, or one is no single number, or 0.
    """
    given = [place for place in places if place + end in file.header.tensors]
    if not given:
        return dict.fromkeys(places, 1.0), False
    if missing := [place for place in places if place + end not in file.header.tensors]:
        raise Refused(f"{shortened(missing[0])} has no alpha, but {shortened(given[0])} has one")
    found = {}
    for place, rank in places.items():
        entry = file.header.tensors[place + end]
        if math.prod(entry.shape) != 1 or entry.dtype not in (*FLOATS, *_INTEGERS):
            raise Refused(f"{shortened(entry.name)} is no single number: the scale of the update is not known")
        alpha = _number(file, entry)
        if not alpha:
            raise Refused(f"{shortened(entry.name)} is 0: sd-scripts takes it for the rank, others for a scale of 0")
        found[place] = alpha / rank
    return found, True


def _number(file: Tensors, entry: TensorEntry) -> float:
    """The only number of a tensor of floats or integers. Refused for NaN or Inf, or a file that changed."""
    if entry.dtype in FLOATS:
        return float(file.read(entry.name))
    with opened_as(file.path, file.stamp, f"{file.path}: its weights") as opened:
        stored = os.pread(opened.fileno(), entry.end - entry.begin, entry.begin)
    return float(int.from_bytes(stored, "little", signed=entry.dtype.startswith("I")))


def demand_matrices(*entries: TensorEntry) -> None:
    """Refused for tensors that are no matrices of floats, or are empty."""
    demand_floats(entries)
    for entry in entries:
        if len(entry.shape) != 2:
            raise Refused(f"{shortened(entry.name)} has {len(entry.shape)} dimensions, not 2")
        if 0 in entry.shape:
            raise Refused(f"{shortened(entry.name)} is empty")


def dtypes_of(file: Tensors, pairs: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """The precisions of the factors."""
    return frozenset(file.header.tensors[name].dtype for names in pairs.values() for name in names)
