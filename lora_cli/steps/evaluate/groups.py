"""Systems that a model answers together: which ones go in a group, and what becomes of their examples."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from lora_cli.algebra.lowrank import LowRank
from lora_cli.formats.reader import OpenAdapter
from lora_cli.methods import Method
from lora_cli.metrics import METRICS
from lora_cli.models.answering import Asked, Told, answers
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.kept import can_keep
from lora_cli.models.room import free_memory
from lora_cli.models.router import Router
from lora_cli.models.together import Arranged, Together, by_row
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.steps.evaluate.choices import Choices, judged, read_choices

MOST_TOGETHER = 32
# The share of free memory that the factors of a group may take: generation has up to two more copies of them.
_SHARE = 0.08
LEAST_LOG_LIKELIHOOD = -149 * 0.6931471805599453
"""The logarithm of the least positive number of fp32: what counts for a likelihood that is not finite."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class System:
    """Something to evaluate: the base itself (`updates` None), the base with one update per module, or with a router.

    `version` names the exact adapter (`id@commit`, or any text that changes when the adapter does); rows of another
    version are not reused.
    """

    name: str
    updates: "Mapping[str, LowRank] | Router | None" = field(default=None, repr=False)
    version: str = ""

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each module that the system changes."""
        if isinstance(self.updates, Updates | Router):
            return self.updates.shapes
        return {module: update.shape for module, update in (self.updates or {}).items()}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each update; {} for a router."""
        if isinstance(self.updates, Router):
            return {}
        if isinstance(self.updates, Updates):
            return self.updates.ranks
        return {module: update.rank for module, update in (self.updates or {}).items()}

    @contextmanager
    def applied(self, base: BaseModel) -> Iterator[None]:
        """While the block runs, the system is on the base."""
        if isinstance(self.updates, Router):
            with self.updates.applied(base):
                yield
        else:
            with base.applied(self.updates, who=self.name):
                yield

    @property
    def by_row(self) -> Mapping[str, LowRank] | None:
        """The updates of a system that is no router."""
        assert not isinstance(self.updates, Router)
        return self.updates


class Updates(Mapping[str, LowRank]):
    """The updates of an adapter, each read on access: of many systems only the current ones are in memory.

    With `checked` a number that is not finite is Refused on access; without it the answers fail, and no other system's.
    """

    def __init__(self, adapter: OpenAdapter, *, checked: bool = True) -> None:
        self._adapter = adapter
        self._read = adapter.read if checked else partial(adapter.read, checked=False)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each update; reads none of them."""
        return {name: (module.out_features, module.in_features) for name, module in self._adapter.modules.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each update; reads none of them."""
        return {name: module.rank for name, module in self._adapter.modules.items()}

    def __getitem__(self, module: str) -> LowRank:
        return self._read(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.modules)

    def __len__(self) -> int:
        return len(self._adapter.modules)


class Outcome(NamedTuple):
    """What became of one example; the fields are those of `Row`."""

    log_likelihood: float | None
    value: float
    text: str | None = None
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judging:
    """What decides about answers: the examples as the base reads them, by id, and the metric with its knobs."""

    base: BaseModel
    encoded: Mapping[str, Encoded]
    choices: Mapping[str, Choices]
    metric: Method
    values_of: partial[Sequence[Any]]
    options: EvalOptions

    @classmethod
    def of(cls, base: BaseModel, examples: Sequence[Example], options: EvalOptions) -> "Judging":
        """The examples as the base reads them, and the metric of the options.

        DataError, which counts them, for examples that are too long or have no room for an answer, and for those that
        lack the choices that the metric judges.
        """
        metric = METRICS.get(options.metric)
        new = options.max_new_tokens if metric.kind == "output" else 0
        return cls(
            base=base,
            choices=read_choices(base.encoder, examples) if metric.kind == "choice" else {},
            encoded=_read(base, examples, new=new),
            metric=metric,
            values_of=partial(METRICS.load(metric.name), **options.knobs),
            options=options,
        )

    @property
    def most(self) -> int:
        """The most tokens that are generated."""
        return self.options.max_new_tokens if self.metric.kind == "output" else 0

    def outcomes(
        self, group: Sequence[System], left: Mapping[str, Sequence[str]]
    ) -> Iterator[list[tuple[System, str, Outcome]]]:
        """(system, example, what became of it) for the ids in `left`, by the name of the system, as they end.

        Raises:
            NotByRow: the systems of the group have to be asked one by one.
        """
        wanted = [set(left[system.name]) for system in group]
        with _applied(self.base, group) as together:
            for ended in self._answered(wanted, together):
                yield [(group[owner], id, one) for owner, id, one in ended]

    def values(self, owners: int, together: Arranged | None) -> list[list[float]]:
        """The metric's value of each example, in their order, by each of so many owners of rows.

        Args:
            together: what is applied now, for several owners.
        """
        found: list[dict[str, float]] = [{} for _ in range(owners)]
        for ended in self._answered([self.encoded] * owners, together if owners > 1 else None):
            for owner, id, one in ended:
                found[owner][id] = one.value
        return [[own[id] for id in self.encoded] for own in found]

    def _answered(
        self, wanted: Sequence[Container[str]], together: Arranged | None
    ) -> Iterator[list[tuple[int, str, Outcome]]]:
        """(owner, example, what became of it) for the wanted ids of each owner, as they end."""
        asked, names = [], []
        # The rows of one example are as long as one another, so it comes first.
        for id in self.encoded:
            for owner, ids in enumerate(wanted):
                if id in ids:
                    options = self.choices[id].encoded if self.choices else (self.encoded[id],)
                    asked += [Asked(owner, option) for option in options]
                    names += [(owner, id, number) for number in range(len(options))]
        found: dict[tuple[int, str], dict[int, Told]] = {}
        for ended in answers(self.base, asked, together, most=self.most, limit=self.options.batch_size):
            whole = []
            for place, one in ended:
                owner, id, number = names[place]
                parts = found.setdefault((owner, id), {})
                parts[number] = one
                if len(parts) == (len(self.choices[id].encoded) if self.choices else 1):
                    del found[owner, id]
                    whole.append((owner, id, [parts[number] for number in range(len(parts))]))
            outcomes = self._outcomes([(id, parts) for _, id, parts in whole])
            yield [(owner, id, one) for (owner, id, _), one in zip(whole, outcomes, strict=True)]

    def _outcomes(self, ended: Sequence[tuple[str, Sequence[Told]]]) -> list[Outcome]:
        """What became of some examples, each with the answers to its parts: its options, or itself."""
        if self.metric.kind == "choice":
            return [self._chosen(self.choices[id], parts) for id, parts in ended]
        told = [(id, one) for id, [one] in ended]
        likelihoods = [one.log_likelihood if one.finite else None for _, one in told]
        if self.metric.kind == "likelihood":
            values = self.values_of([LEAST_LOG_LIKELIHOOD if one is None else one for one in likelihoods])
            return [Outcome(one, float(value)) for one, value in zip(likelihoods, values, strict=True)]
        texts = [one.text if one.finite else "" for _, one in told]
        judged_texts = [text if one.continues else "" for (_, one), text in zip(told, texts, strict=True)]
        values = self.values_of(judged_texts, [self.encoded[id].answer for id, _ in told])
        return [
            Outcome(likelihood, float(value), text, one.tokens if one.finite else 0, one.seconds)
            for (_, one), likelihood, text, value in zip(told, likelihoods, texts, values, strict=True)
        ]

    def _chosen(self, asked: Choices, parts: Sequence[Told]) -> Outcome:
        finite = all(part.finite for part in parts)
        likelihoods = [part.log_likelihood for part in parts]
        if not finite:
            likelihoods = [LEAST_LOG_LIKELIHOOD * (place == asked.right) for place in range(len(parts))]
        likelihood, value, text = judged(asked, likelihoods, self.values_of)
        return Outcome(likelihood, value, text) if finite else Outcome(None, value, "")


def _read(base: BaseModel, examples: Sequence[Example], *, new: int) -> dict[str, Encoded]:
    """The examples as the base reads them, by id. DataError for those without room for `new` more tokens."""
    encoded = {one.id: one for one in base.encoder.read_all(examples)}
    lengths = {id: max(len(one.ids), len(one.opening.ids) + new) for id, one in encoded.items()}
    base.encoder.demand_room(lengths, new=new)
    return encoded


@contextmanager
def _applied(base: BaseModel, group: Sequence[System]) -> Iterator[Together | None]:
    """While the block runs, the systems are on the base: all of several, or the only one."""
    if len(group) == 1:
        with group[0].applied(base):
            yield None
        return
    together = Together(base, [system.by_row for system in group])
    with together.applied():
        yield together


def groups(base: BaseModel, systems: Sequence[System], *, generates: bool) -> list[list[System]]:
    """The systems in groups to be asked together: up to 32 adapters, as far as memory takes their factors.

    Alone is a router, a system with an update that cannot differ from row to row, and all are if the base cannot
    generate so.
    Those of like ranks share a group, as all updates of a module are filled up to the highest rank.
    """
    together = not generates or can_keep(base)
    alone = [
        one
        for one in systems
        if not together or isinstance(one.updates, Router) or not by_row(base.skeleton, list(one.ranks))
    ]
    most = _SHARE * free_memory(base.device) / base.dtype.itemsize
    found: list[list[System]] = []
    ranks: dict[str, int] = {}
    sizes = {name: sum(shape) for one in systems for name, shape in one.shapes.items()}
    # The base goes first: without it nothing can be compared.
    for system in sorted(systems, key=lambda one: (one.updates is not None, -max(one.ranks.values(), default=0))):
        if system in alone:
            continue
        joined = {name: max(ranks.get(name, 0), system.ranks.get(name, 0)) for name in {*ranks, *system.ranks}}
        numbers = sum(rank * sizes[name] for name, rank in joined.items())
        adapters = sum(one.updates is not None for one in found[-1]) if found else MOST_TOGETHER
        if adapters >= MOST_TOGETHER or (len(found[-1]) + 1) * numbers > most:
            found.append([])
            joined = system.ranks
        found[-1].append(system)
        ranks = joined
    return found + [[one] for one in alone]
