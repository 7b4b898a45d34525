"""Two checkpoints of one class: the difference of each linear layer, and what else differs between them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_cli.algebra.lowrank import squared_norm
from lora_cli.errors import Refused
from lora_cli.files import open_regular
from lora_cli.formats.checkpoint import BLOCK, as_tensor, blocks
from lora_cli.formats.plain import is_plainly_named
from lora_cli.formats.reader import natural
from lora_cli.formats.skeleton import Skeleton, Stored
from lora_cli.names import leaf
from lora_cli.precision import FLOATS
from lora_cli.steps.bake.plan import Base, Piece, pieces_of

# The last names of tables of embeddings, in models whose class is not known.
_TABLES = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "tok_embeddings", "embed_in")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A fine-tuned model and its base. `modules` are the linear layers of both, by name, with shapes (out, in)."""

    tuned: Base
    base: Base
    modules: Mapping[str, tuple[int, int]]
    places: tuple[Mapping[str, tuple[Piece, ...]], Mapping[str, tuple[Piece, ...]]]

    @cached_property
    def others(self) -> list[str]:
        """The tensors of the fine-tuned model that are in no linear layer: embeddings, norms, biases and the like."""
        inside = {piece.tensor for pieces in self.places[0].values() for piece in pieces}
        return natural(name for name in self.tuned.checkpoint.tensors if name not in inside)

    def is_changed(self, module: str) -> bool:
        """Whether the weight of a module differs. Reads up to the first block that does."""
        return any(not torch.equal(one, other) for one, other in zip(*self._rows(module), strict=True))

    def delta(self, module: str) -> Tensor:
        """W_tuned − W_base of a module, (out, in) in fp32: exact where both are bf16 or fp16.

        Raises Refused for NaN or Inf.
        """
        out, into = self.modules[module]
        delta = torch.empty(out, into)
        row = 0
        for one, other in zip(*self._rows(module), strict=True):
            # Widened as they are copied: temporary floats would take twenty times as long.
            delta[row : row + len(one)].copy_(one).sub_(other)
            row += len(one)
        if not math.isfinite(squared_norm(delta)):
            raise Refused(f"NaN or Inf in {module} of one of the two models", hint="download the models again")
        return delta

    def change(self, name: str) -> float | None:
        """‖W_tuned − W_base‖ / ‖W_base‖ of one other tensor.

        None for a changed one if the base has none of its name, type and shape, or has zeros alone in it.
        """
        tuned, base = self.tuned.checkpoint, self.base.checkpoint
        if name not in base.tensors or tuned.entry(name).shape != base.entry(name).shape:
            return None
        if {tuned.entry(name).dtype, base.entry(name).dtype} - {*FLOATS}:
            return None
        change = norm = 0.0
        for one, other in zip(*(_all_rows(model, name) for model in (self.tuned, self.base)), strict=True):
            change += float((one.double() - other.double()).square().sum())
            norm += float(other.double().square().sum())
        if change == 0:
            return 0.0
        return math.sqrt(change / norm) if norm else None

    def _rows(self, module: str) -> Sequence[Iterator[Tensor]]:
        """The rows of a module's weight in both models, in blocks of the same heights."""
        height = max(1, BLOCK // self.modules[module][1])
        return [
            in_blocks(model, places[module], self.modules[module], height)
            for model, places in zip((self.tuned, self.base), self.places, strict=True)
        ]


def pair(tuned: Base, base: Base) -> Pair:
    """The linear layers of two models, by the class of the base; by the names of tensors where these are plain.

    So they are in a decoder of the Llama kind, and they are all that is known where the base has no known class.

    A head for another number of tokens is none of them: what was tuned with new tokens has rows there that no update of
    the base's head holds.

    Raises Refused if the models have no linear layer in common, or differ in the layers or their shapes.
    """
    plain = all(is_plainly_named(base.checkpoint.config, one.checkpoint.tensors) for one in (base, tuned))
    skeleton = None if plain else base.skeleton
    known, tokens = (_tokens(one.checkpoint.config) for one in (base, tuned))
    found = []
    shapes: dict[str, tuple[int, int]] = {}
    for model in (base, tuned):
        layers, places = layers_of(model, skeleton if skeleton is None or tokens == known else model.skeleton)
        shapes = {name: shape for name, shape in (shapes or layers).items() if skeleton is not None or name in places}
        if tokens != known:
            heads = [name for name, (rows, _) in shapes.items() if (rows, layers.get(name, (0,))[0]) == (known, tokens)]
            shapes = {name: shape for name, shape in shapes.items() if name not in heads}
        demand_whole(model, shapes, places)
        found.append({name: places[name] for name in shapes})
    if not shapes:
        raise Refused(f"{tuned.name} and {base.name} have no linear layers in common")
    of_base, of_tuned = found
    return Pair(tuned=tuned, base=base, modules=shapes, places=(of_tuned, {name: of_base[name] for name in shapes}))


def _tokens(config: Mapping[str, Any]) -> object:
    """The number of tokens in a model's configuration, None where it does not say."""
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)


def layers_of(
    model: Base, skeleton: Skeleton | None
) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[Piece, ...]]]:
    """The linear layers of a model, tied ones apart: their shapes (out, in), and the tensors that hold each.

    By its class, or where that is None by the names of its tensors.
    """
    tensors = {name: model.checkpoint.entry(name).shape for name in model.checkpoint.tensors}
    if skeleton is None:
        places = _by_names(tensors)
        return {name: (one.rows, tensors[one.tensor][1]) for name, (one,) in places.items()}, places
    stored: Stored = skeleton.stored(tensors)
    shapes = {name: shape for name, shape in skeleton.layers.items() if name not in skeleton.ties}
    places = {}
    for name in shapes:
        matrix = skeleton.matrices[name]
        places[name] = tuple(pieces_of(matrix, stored.shares.get(matrix.parameter, []), tensors))
    return shapes, places


def _by_names(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """The matrices of a model by the names of their tensors."""
    return {
        name.removesuffix(".weight"): (Piece(name, False, 0, 0, shape[0]),)
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2 and leaf(name.removesuffix(".weight")) not in _TABLES
    }


def demand_whole(model: Base, shapes: Mapping[str, tuple[int, int]], places: Mapping[str, Sequence[Piece]]) -> None:
    """Refused if a model lacks a layer, or has it in another shape or as integers."""
    for name, shape in shapes.items():
        pieces = places.get(name, ())
        turned = bool(pieces) and pieces[0].transposed
        tensors = [model.checkpoint.entry(piece.tensor) for piece in pieces]
        columns = {math.prod(entry.shape[1:]) for entry in tensors}
        if sum(piece.rows for piece in pieces) != shape[turned] or columns != {shape[not turned]}:
            raise Refused(
                f"{model.name} has {name} in no shape of {shape[0]}×{shape[1]}",
                hint="give the base that was tuned",
            )
        for entry in tensors:
            if entry.dtype not in FLOATS:
                raise Refused(
                    f"{entry.name} is {entry.dtype} in {model.name}: floats are compared",
                    hint="use a model in bf16 or fp16",
                )


def in_blocks(model: Base, pieces: Sequence[Piece], shape: tuple[int, int], height: int) -> Iterator[Tensor]:
    """The rows (rows, in) of a module's weight, `height` at a time."""
    [first, *more] = pieces
    if not more and not first.transposed and model.checkpoint.entry(first.tensor).shape == shape:
        yield from _all_rows(model, first.tensor)
        return
    whole = torch.empty(shape)
    for piece in pieces:
        into = whole.T if piece.transposed else whole
        entry = model.checkpoint.entry(piece.tensor)
        columns = into.shape[1]
        with open_regular(model.checkpoint.folder / model.checkpoint.tensors[piece.tensor]) as file:
            for row, block in blocks(file, entry, columns):
                rows = as_tensor(block, entry.dtype).view(-1, columns)
                begin, end = max(piece.at, row), min(piece.at + piece.rows, row + len(rows))
                if begin < end:
                    at = piece.row + begin - piece.at
                    into[at : at + end - begin] = rows[begin - row : end - row]
    for at in range(0, len(whole), height):
        yield whole[at : at + height]


def _all_rows(model: Base, tensor: str) -> Iterator[Tensor]:
    """A whole tensor as rows, as many at a time as a block holds."""
    entry = model.checkpoint.entry(tensor)
    columns = math.prod(entry.shape[1:]) if len(entry.shape) > 1 else 1
    with open_regular(model.checkpoint.folder / model.checkpoint.tensors[tensor]) as file:
        for _, block in blocks(file, entry, columns):
            yield as_tensor(block, entry.dtype).view(-1, columns)
