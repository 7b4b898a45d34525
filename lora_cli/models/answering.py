"""Likelihoods and greedy answers of many examples, by one adapter or by several at once.

One pass reads an example with its expected answer. It gives the answer's likelihood, and all that the model itself
would write up to its first other token: only from there on tokens are generated one by one. The text with which all
examples begin is read once per adapter. Rows that end make room for others.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_cli.errors import shortage
from lora_cli.models.base_model import IGNORED, BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.generate import stream
from lora_cli.models.kept import Place, as_argument, begun, can_keep, empty, gathered
from lora_cli.models.room import Room
from lora_cli.models.together import Arranged, blocks

_SPARE = 8
# A shared beginning of fewer tokens costs more than it saves.
_FEWEST_SHARED = 4


class Asked(NamedTuple):
    """An example for one of the adapters, by its place among them."""

    owner: int
    encoded: Encoded


class Told(NamedTuple):
    """What became of an example.

    `log_likelihood` is that of the expected answer in nats, the mean per token. `text` is the greedy answer, which has
    `tokens` tokens, and `continues` as in `Generation`. `seconds` is its share of the time. `finite` is False if a
    number of the model was not: the others say nothing then.
    """

    log_likelihood: float
    finite: bool
    seconds: float
    text: str = ""
    tokens: int = 0
    continues: bool = True


def answers(
    base: BaseModel, asked: Sequence[Asked], together: Arranged | None, *, most: int, limit: int | None
) -> Iterator[list[tuple[int, Told]]]:
    """(place in `asked`, what became of the example), those together that end together.

    Args:
        together: the adapters, applied now; None for one owner, with whatever is applied now.
        most: the most tokens of an answer, 0 to generate nothing.
        limit: the most rows at once, None for as many as memory takes.

    Raises:
        NotByRow: the adapters cannot go together on this base.
    """
    alone = most and not can_keep(base)
    if not alone:
        yield from _Answering(base, asked, together, most, limit).run()
        return
    likelihoods = dict(one for ended in _Answering(base, asked, together, 0, limit).run() for one in ended)
    openings = [one.encoded.opening for one in asked]
    for place, made in stream(base, openings, max_new_tokens=most, batch_size=limit):
        told = likelihoods[place]
        yield [(place, Told(told.log_likelihood, told.finite, made.seconds, made.text, made.tokens, made.continues))]


@dataclass(slots=True, eq=False)
class _Row:
    """An example on its way: read with its expected answer, and with what is written so far if it is read again."""

    place: int
    owner: int
    encoded: Encoded
    loss: float | None = None
    written: list[int] = field(default_factory=list)
    seconds: float = 0.0
    done: bool = False

    @property
    def ids(self) -> Sequence[int]:
        """The tokens to read next: nothing follows the last token of a finished example."""
        return self.encoded.ids[:-1] if self.loss is None else (*self.encoded.opening.ids, *self.written)

    @property
    def next(self) -> int:
        """The place among `ids` whose prediction is the next token of the answer."""
        return len(self.encoded.opening.ids) + len(self.written) - 1

    @property
    def first(self) -> int:
        """The first place among `ids` whose prediction is needed."""
        return self.next if self.loss is not None else min(self.encoded.start - 1, self.next)

    def take(self, token: int, logit: float, most: int) -> None:
        """Add a token that the model writes. An end token, the last of `most` and a NaN as the logit end the row."""
        if not math.isfinite(logit):
            self.loss = math.nan
        if not math.isfinite(logit) or token in self.encoded.opening.ends:
            self.done = True
            return
        self.written.append(token)
        self.done = len(self.written) == most


class _Read(NamedTuple):
    """A row that was read: its place in the batch, and the tokens of it."""

    row: _Row
    slot: int
    ids: Sequence[int]


@dataclass(slots=True, eq=False)
class _Writing:
    """Rows that are written token by token, each in its place of the batch; the other places fill up blocks."""

    rows: list[tuple[_Row, int]]
    owners: tuple[int, ...]
    cache: Any
    mask: Tensor
    feed: Tensor
    position: Tensor
    columns: int

    @property
    def wants_order(self) -> bool:
        """Whether most places are empty, or there is no column for another token."""
        return 2 * len(self.rows) < len(self.feed) or self.columns == self.mask.shape[1]


class _Answering:
    """The way of some examples through a model; the arguments are those of `answers`."""

    def __init__(
        self, base: BaseModel, asked: Sequence[Asked], together: Arranged | None, most: int, limit: int | None
    ) -> None:
        self._base, self._together, self._most = base, together, most
        self._rows = [_Row(place, *one) for place, one in enumerate(asked)]
        self._owners = sorted({row.owner for row in self._rows})
        self._room = Room(
            base,
            longest=max(max(len(row.encoded.ids), row.next + 1 + most) for row in self._rows),
            judged=max(len(row.encoded.ids) - row.first for row in self._rows),
            limit=limit,
        )
        # Rows are taken from the end: the longest first, and of one length in their order.
        self._waiting = sorted(self._rows, key=lambda row: (len(row.encoded.ids), -row.place))
        self._writing: _Writing | None = None
        self._ended: list[_Row] = []
        self._shared: Any = None
        self._begin = 0

    @torch.no_grad()
    def run(self) -> Iterator[list[tuple[int, Told]]]:
        """The outcomes as the rows end. When memory runs out, what was under way begins again with half the rows."""
        if can_keep(self._base):
            self._managed(self._share)
        while self._waiting or self._writing:
            if not self._managed(self._advance):
                self._writing = None
                self._waiting = [row for row in self._rows if not row.done]
            ended, self._ended = self._ended, []
            if ended:
                yield [(row.place, self._told(row)) for row in ended]

    def _managed(self, work: Callable[[], None]) -> bool:
        """Do some work; False if memory runs out and fewer rows can be tried."""
        try:
            work()
        except RuntimeError as error:
            if not shortage(error) or not self._room.halve():
                raise
            return False
        return True

    def _told(self, row: _Row) -> Told:
        assert row.loss is not None
        text, continues = self._base.encoder.written(row.encoded.opening, row.written) if self._most else ("", True)
        return Told(-row.loss, math.isfinite(row.loss), row.seconds, text, len(row.written), continues)

    def _share(self) -> None:
        """Read the tokens with which all texts begin, once per owner."""
        texts = {ids for row in self._rows for ids in (row.encoded.ids, row.encoded.opening.ids)}
        one, other, most = min(texts), max(texts), min(row.first for row in self._rows)
        same = next((place for place in range(most) if one[place] != other[place]), most)
        if same < _FEWEST_SHARED or len(self._rows) < 4 * len(self._owners):
            return
        caches: list[Any] = []
        places: list[Place] = []
        many = self._room.reading(same, 1)
        for start in range(0, len(self._owners), many):
            owners = tuple(self._owners[start : start + many])
            tokens, cache = torch.tensor([one[:same]] * len(owners)), empty()
            self._logits(owners, tokens, same - 1, cache)
            places += [Place(len(caches), row, same, same) for row in range(len(owners))]
            caches.append(cache)
        self._shared, _ = gathered(caches, places, 0)
        self._begin = same

    def _logits(self, owners: tuple[int, ...], tokens: Tensor, first: int, cache: Any, **where: Tensor) -> Tensor:
        """A pass of rows in blocks of these owners: the logits from position `first` on."""
        rows, width = tokens.shape
        if self._together is not None:
            self._together.arrange(owners, rows, width)
        device = self._base.device
        kept = as_argument(self._base, cache) if cache is not None else {"use_cache": False}
        return self._base.logits(tokens.to(device), torch.arange(first, width, device=device), **kept, **where)

    def _advance(self) -> None:
        """Read rows if there is much room, and write a token of each row that is not done."""
        writing = self._writing
        fresh: list[tuple[_Row, Place]] = []
        caches: list[Any] = []
        held = len(writing.rows) if writing else 0
        if 4 * held <= self._room.writing:
            while self._waiting and (room := self._room.writing - held - len(fresh)) > 0:
                cache, places = self._read(room)
                fresh += [(row, place._replace(cache=len(caches))) for row, place in places]
                caches.append(cache)
                if not self._most:
                    return
        if fresh or (writing and writing.wants_order):
            self._order(fresh, caches)
        if self._writing:
            self._write(self._writing)

    def _read(self, room: int) -> tuple[Any, list[tuple[_Row, Place]]]:
        """Read some of the waiting rows; a cache, and the places in it of those that go on."""
        began = time.perf_counter()
        many = min(room, self._room.reading(len(self._waiting[-1].ids) - self._begin, len(self._owners)))
        rows = [self._waiting.pop() for _ in range(min(many, len(self._waiting)))]
        order, ids = blocks([row.owner for row in rows]), [row.ids for row in rows]
        first, width = min(row.first for row in rows), max(map(len, ids))
        tokens = torch.tensor([[*one, *[self._base.pad] * (width - len(one))] for one in ids])[:, self._begin :]
        cache = None
        if self._shared is not None:
            size = len(order.places) // len(order.owners)
            begins = [self._owners.index(owner) for owner in order.owners for _ in range(size)]
            cache = begun(self._shared, begins, width - self._begin)
        elif self._most:
            cache = empty()
        logits = self._logits(order.owners, tokens[order.places], first - self._begin, cache)
        read = [_Read(rows[order.places[slot]], slot, ids[order.places[slot]]) for slot in order.live]
        self._judge([one for one in read if one.row.loss is None], logits, first)
        if self._most:
            self._foretell(read, logits, first)
        share = (time.perf_counter() - began) / len(rows)
        for row in rows:
            row.seconds += share
        self._ended += [row for row in rows if row.done]
        # What begins otherwise than the example itself is read again by itself.
        self._waiting += [row for row in rows if not row.done and not row.written]
        going = ((row, slot) for row, slot, _ in read if row.written and not row.done)
        return cache, [(row, Place(0, slot, row.next, row.next)) for row, slot in going]

    def _judge(self, read: Sequence[_Read], logits: Tensor, first: int) -> None:
        """Find the losses of expected answers, each a mean per token.

        A row ends if its loss is not finite, or if nothing is to be written.
        """
        expected = [[IGNORED] * logits.shape[1] for _ in range(len(logits))]
        for row, slot, ids in read:
            start = row.encoded.start
            expected[slot][start - 1 - first : len(ids) - first] = row.encoded.ids[start:]
        labels = torch.tensor(expected)
        flat = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten().to(logits.device), ignore_index=IGNORED, reduction="none"
        )
        sums = flat.view(labels.shape).sum(dim=1).double().cpu()
        losses = (sums / (labels != IGNORED).sum(dim=1)).tolist()
        for row, slot, _ in read:
            row.loss = losses[slot]
            row.done = not self._most or not math.isfinite(losses[slot])

    def _foretell(self, read: Sequence[_Read], logits: Tensor, first: int) -> None:
        """Take what the model writes as far as it was read already, and the first token that was not."""
        sizes, tokens = (each.tolist() for each in logits.max(dim=-1))
        for row, slot, ids in read:
            opening = row.encoded.opening.ids
            if row.done or tuple(ids[: len(opening)]) != opening:
                continue
            for place in range(row.next, len(ids)):
                row.take(tokens[slot][place - first], sizes[slot][place - first], self._most)
                if row.done or (place + 1 < len(ids) and ids[place + 1] != row.written[-1]):
                    break

    def _order(self, fresh: Sequence[tuple[_Row, Place]], caches: Sequence[Any]) -> None:
        """Put the rows in generation and fresh ones into new blocks, without those that are done."""
        writing, rows, places = self._writing, [row for row, _ in fresh], [place for _, place in fresh]
        if writing is not None:
            rows += [row for row, _ in writing.rows]
            places += [Place(len(caches), slot, writing.columns, row.next) for row, slot in writing.rows]
            caches = [*caches, writing.cache]
        order = blocks([row.owner for row in rows])
        batch = [rows[place] for place in order.places]
        cache, mask = gathered(caches, [places[place] for place in order.places], _SPARE)
        device = self._base.device
        self._writing = _Writing(
            rows=[(batch[slot], slot) for slot in order.live],
            owners=order.owners,
            cache=cache,
            mask=mask,
            feed=torch.tensor([row.written[-1] for row in batch], device=device),
            position=torch.tensor([row.next for row in batch], device=device),
            columns=max(row.next for row in batch),
        )

    def _write(self, writing: _Writing) -> None:
        """Write one token of each row."""
        began = time.perf_counter()
        writing.columns += 1
        logits = self._logits(
            writing.owners,
            writing.feed[:, None],
            0,
            writing.cache,
            attention_mask=writing.mask[:, : writing.columns],
            position_ids=writing.position[:, None],
        )
        sizes, writing.feed = logits[:, -1].max(dim=-1)
        writing.position += 1
        tokens, finite = writing.feed.tolist(), sizes.tolist()
        share = (time.perf_counter() - began) / len(writing.rows)
        for row, slot in writing.rows:
            row.take(tokens[slot], finite[slot], self._most)
            row.seconds += share
        self._ended += [row for row, _ in writing.rows if row.done]
        writing.rows = [(row, slot) for row, slot in writing.rows if not row.done]
        if not writing.rows:
            self._writing = None
