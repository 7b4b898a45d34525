"""Several adapters on one base in one batch: each row goes through its own adapter.

Rows stand in blocks of one length, all rows of a block with one adapter, so that a module's updates are two batched
products: y += (x Aᵀ) Bᵀ with x (blocks, tokens, in), Aᵀ (blocks, in, R) and Bᵀ (blocks, R, out). Factors of fewer than
R ranks, and those of adapters without the module, are filled up with zeros, which change no bit.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lora_cli.algebra.lowrank import LowRank
from lora_cli.formats.skeleton import Skeleton
from lora_cli.models.apply import Term
from lora_cli.models.base_model import BaseModel


class NotByRow(Exception):
    """A module's input does not keep the rows of the batch, so its rows cannot go through different adapters."""


class Blocks(NamedTuple):
    """An arrangement of rows: the adapter of each block, and the row in each place, block after block.

    The last rows of a block may repeat its first one, to fill it up; `live` are the places of the rows themselves.
    """

    owners: tuple[int, ...]
    places: list[int]
    live: list[int]


def blocks(owners: Sequence[int]) -> Blocks:
    """Blocks for rows with these adapters: at most twice as many as adapters, with the fewest places."""
    rows: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    counts = Counter(map(len, rows.values()))

    def number(size: int) -> int:
        return sum(-(-count // size) * many for count, many in counts.items())

    least, mean = (-(-len(owners) // (share * len(rows))) for share in (2, 1))
    size = min((size for size in range(least, mean + 1) if number(size) <= 2 * len(rows)), key=lambda n: n * number(n))
    found: list[int] = []
    places: list[int] = []
    live: list[int] = []
    for owner in sorted(rows):
        for start in range(0, len(rows[owner]), size):
            own = rows[owner][start : start + size]
            found.append(owner)
            live += range(len(places), len(places) + len(own))
            places += own + own[:1] * (size - len(own))
    return Blocks(tuple(found), places, live)


def by_row(skeleton: Skeleton, modules: Sequence[str]) -> bool:
    """Whether updates of these modules can differ from row to row: those of linear layers and embeddings can."""
    matrices = (skeleton.get(name) for name in modules)
    return all(matrix is not None and matrix.kind in ("linear", "embedding") for matrix in matrices)


class Arranged(Protocol):
    """Something on a base in which each block of rows has its own owner, by place."""

    def arrange(self, owners: tuple[int, ...], rows: int, tokens: int) -> None:
        """The next pass has `rows` rows of `tokens` tokens, in blocks of these owners."""
        ...


class _Factors(NamedTuple):
    """Aᵀ (adapters or blocks, in, R) and Bᵀ (adapters or blocks, R, out) of one module."""

    a: Tensor
    b: Tensor


class Together:
    """The updates of several adapters on one base, of any ranks and modules that fit it; None for the base itself.

    Args:
        updates: by module; each is read once.
    """

    def __init__(self, base: BaseModel, updates: Sequence[Mapping[str, LowRank] | None]) -> None:
        self._base, self._count = base, len(updates)
        self._stacks: dict[str, _Factors] = {}
        for place, own in enumerate(updates):
            for module, update in (own or {}).items():
                self._add(module, place, update)
        self._everyone = tuple(range(self._count))
        self._owners, self._current = self._everyone, self._stacks
        self._rows = self._tokens = 0

    def _add(self, module: str, place: int, update: LowRank) -> None:
        device, dtype = self._base.device, self._base.dtype
        b, a = update.B.to(device, dtype), update.A.to(device, dtype)
        rank, stack = len(a), self._stacks.get(module)
        room = 0 if stack is None else stack.a.shape[2]
        if stack is None or room < rank:
            wider = _Factors(a.new_zeros(self._count, a.shape[1], rank), b.new_zeros(self._count, rank, b.shape[0]))
            if stack is not None:
                wider.a[:, :, :room], wider.b[:, :room] = stack
            self._stacks[module] = stack = wider
        stack.a[place, :, :rank], stack.b[place, :rank] = a.T, b.T

    def arrange(self, owners: tuple[int, ...], rows: int, tokens: int) -> None:
        """The next pass has `rows` rows of `tokens` tokens, in blocks of these adapters."""
        self._rows, self._tokens = rows, tokens
        if owners == self._owners:
            return
        self._owners = owners
        self._current = self._stacks
        if owners != self._everyone:
            chosen = torch.tensor(owners, device=self._base.device)
            self._current = {
                module: _Factors(stack.a.index_select(0, chosen), stack.b.index_select(0, chosen))
                for module, stack in self._stacks.items()
            }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """While the block runs, each row of a pass goes through the adapter of its block."""
        terms = {}
        for module in self._stacks:
            matrix = self._base.skeleton.get(module)
            assert matrix is not None
            embeds = matrix.kind == "embedding"
            terms[module] = self._look_up(module) if embeds else self._add_product(module)
        with self._base.attach({}, terms):
            yield

    def _add_product(self, module: str) -> Term:
        def add(x: Tensor, y: Tensor) -> Tensor:
            if x.shape[0] != self._rows and x.shape[:-1].numel() != self._rows * self._tokens:
                raise NotByRow(module)
            a, b = self._current[module]
            hidden = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a)
            return y.reshape(len(b), -1, y.shape[-1]).baddbmm_(hidden, b).view(y.shape)

        return add

    def _look_up(self, module: str) -> Term:
        size = getattr(self._base.model.get_submodule(module), "embed_scale", 1.0)

        def look_up(x: Tensor, y: Tensor) -> Tensor:
            if x.shape != (self._rows, self._tokens):
                raise NotByRow(module)
            a, b = self._current[module]
            first = torch.arange(len(a), device=x.device)[:, None] * a.shape[1]
            hidden = nn.functional.embedding(x.reshape(len(a), -1) + first, a.flatten(0, 1))
            return y + torch.bmm(hidden, b).view(y.shape) * size

        return look_up
