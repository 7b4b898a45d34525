"""What the cells of a study will need: time and memory of each, from counted work and the speed of this machine."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from lora_cli.algebra.threads import one_thread_each
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.formats.run_record import peak_bytes
from lora_cli.metrics import METRICS
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import BaseRef, pin
from lora_cli.recipes import FitOptions, TargetRecipe, TrainOptions
from lora_cli.records import Example, unheard
from lora_cli.settings import Settings
from lora_cli.steps.estimate import (
    CALLS,
    Estimate,
    Model,
    encoded,
    lengths_of,
    model_of,
    of_fit,
    of_merge,
    of_train,
    outlines,
)
from lora_cli.steps.fit.request import FitRequest
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.speed import rates_of
from lora_cli.steps.study.plan import Cell, Need
from lora_cli.steps.study.request import Planned
from lora_cli.steps.train.request import train_job
from lora_cli.task import Task

_NOTHING = Estimate(read_bytes=0, written_bytes=0, memory_bytes=0, seconds=0.0)


def of_answers(ref: BaseRef, model: Model, examples: Sequence[Example], evaluation: Mapping[str, Any]) -> Estimate:
    """The answers to examples by the base. Adapters on it are small beside it."""
    rates = rates_of(ref.device, ref.compute, 1)
    lengths = lengths_of(encoded(ref, examples))
    writes = METRICS.get(evaluation["metric"]).kind == "output"
    new = min(evaluation["max_new_tokens"], lengths.learnt) if writes else 0
    passes = math.ceil(len(examples) / evaluation["batch_size"]) * (1 + new)
    products = len(examples) * (lengths.tokens + new) * model.products
    return Estimate(
        read_bytes=0,
        written_bytes=0,
        memory_bytes=peak_bytes() + model.bytes,
        seconds=products / rates.products + passes * len(model.layers) * CALLS / 3 * rates.call,
    )


class Estimator:
    """Estimates the work of a plan on one worker; use it in a `with` statement. Nothing is downloaded or loaded.

    The first of the candidates stand for the adapters that pools will hold.

    Raises:
        NothingMatched: the base model is not on this machine.
    """

    def __init__(self, planned: Planned, settings: Settings) -> None:
        self._study, self._settings, self._stack = planned.study, settings, ExitStack()
        base, shared = self._study.base, self._study.shared
        self._ref = pin(base.place, device=base.device, dtype=base.dtype, prompting=Prompting(**base.prompting))
        self._train, self._test = (
            Task(file=Path(f"{name}.jsonl"), examples=list(examples), sha256=shared[name])
            for name, examples in (("data", planned.train), ("test", planned.test))
        )
        candidates = list(planned.candidates or ([] if planned.is_new else planned.folder.candidates()))
        self._many = len(candidates)
        most = max([rule.options.k if rule.select else len(rule.names) for rule in self._study.pools.values()] or [0])
        self._adapters = [dataclasses.replace(one, base=base.place) for one in candidates[:most]]
        found = model_of(self._ref)
        if found is None:
            raise NothingMatched("no estimate of memory and time: the base model is not on this machine")
        self._model = found

    def __enter__(self) -> Self:
        home = Path(self._stack.enter_context(TemporaryDirectory()))
        if self._ref.device == "cpu":
            self._stack.enter_context(one_thread_each())
        catalogue = self._stack.enter_context(Catalogue(home / "lora.db"))
        catalogue.add(self._adapters, base=self._study.base.place)
        self._pool = Pool(catalogue=catalogue, base=self._study.base.place, announce=unheard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def cell(self, cell: Cell) -> Estimate:
        """The work of a cell without its needs."""
        return self._of_system(cell.system)

    def need(self, need: Need) -> Estimate:
        """The work of a need."""
        if need.kind == "target":
            return self._of_target
        if self._study.pools[need.pool].kind != "trials":
            return _NOTHING
        one = self._of_answers(self._train.examples)
        return dataclasses.replace(one, seconds=self._many * one.seconds)

    @cache  # noqa: B019 - an estimator lives as long as a dry run
    def _of_system(self, system: str) -> Estimate:
        way = self._study.systems[system]
        names = [one.ref.pinned for one in self._adapters] if way.pooled else []
        made = _NOTHING
        if way.kind == "merge":
            made = of_merge(outlines(self._pool, names), way.merge)
        elif way.kind == "fit":
            options = FitOptions.of(**way.reduction)
            request = FitRequest(self._pool, names, self._train, self._settings, way.shape, way.recipe(0), options)
            made = of_fit(request, self._ref) or _NOTHING
        answers = self._of_answers(self._test.examples)
        most = max(made.memory_bytes, answers.memory_bytes)
        return dataclasses.replace(made, seconds=made.seconds + answers.seconds, memory_bytes=most)

    def _of_answers(self, examples: Sequence[Example]) -> Estimate:
        return of_answers(self._ref, self._model, examples, self._study.evaluation)

    @cached_property
    def _of_target(self) -> Estimate:
        options = self._study.systems["target"].options
        job = train_job(
            self._train,
            self._settings,
            options=TrainOptions.of_settings(options["lora"]),
            recipe=TargetRecipe.of_settings(options["recipe"]),
            announce=unheard,
        )
        return of_train(job) or _NOTHING
