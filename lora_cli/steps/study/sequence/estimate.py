"""What the cells of a sequence will need: time and memory of each, from counted work and the speed of this machine."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from lora_cli.algebra.threads import one_thread_each
from lora_cli.errors import NothingMatched
from lora_cli.merge_options import MergeOptions
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.records import unheard
from lora_cli.settings import Settings
from lora_cli.steps.estimate import FP32, Estimate, Outline, adapted_by, model_of, of_merge, of_train
from lora_cli.steps.merge.plan import rank_choice
from lora_cli.steps.study.estimate import of_answers
from lora_cli.steps.study.sequence.plan import ALONE, BASE, SEQUENTIAL, Cell
from lora_cli.steps.study.sequence.request import PlannedSequence
from lora_cli.steps.train.request import train_job
from lora_cli.task import Task, task_of


class SequenceEstimator:
    """Estimates the cells of a sequence on one worker; use it in a `with` statement. Nothing is downloaded or loaded.

    Raises:
        NothingMatched: the base model is not on this machine.
    """

    def __init__(self, planned: PlannedSequence, settings: Settings) -> None:
        self._plan, self._data, self._settings, self._stack = planned.plan, planned.data, settings, ExitStack()
        base = self._plan.base
        self._prompting = Prompting(**base.prompting)
        self._ref = pin(base.place, device=base.device, dtype=base.dtype, prompting=self._prompting)
        found = model_of(self._ref)
        if found is None:
            raise NothingMatched("no estimate of memory and time: the base model is not on this machine")
        self._model, self._trained = found, dict[int, Estimate]()

    def __enter__(self) -> Self:
        if self._ref.device == "cpu":
            self._stack.enter_context(one_thread_each())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def cell(self, cell: Cell) -> Estimate:
        """The work of a cell without those that it needs: to make its LoRA, and to score it on every task."""
        if cell.rule == BASE:
            return self._answers
        made = self._of_training(cell.step) if cell.rule in (ALONE, SEQUENTIAL) else self._of_merging(cell)
        most = max(made.memory_bytes, self._answers.memory_bytes)
        return dataclasses.replace(made, seconds=made.seconds + self._answers.seconds, memory_bytes=most)

    @cached_property
    def _answers(self) -> Estimate:
        tasks, evaluation = [_task(one.name, one.test) for one in self._data], self._plan.options.settings
        found = [of_answers(self._ref, self._model, task.examples, evaluation) for task in tasks]
        return dataclasses.replace(found[0], seconds=math.fsum(one.seconds for one in found))

    def _of_training(self, step: int) -> Estimate:
        if step not in self._trained:
            one = self._data[step - 1]
            job = train_job(
                _task(one.name, one.train),
                self._settings,
                options=self._plan.train_options,
                recipe=self._plan.trained_by(0),
                prompting=self._prompting,
                announce=unheard,
            )
            found = of_train(job)
            assert found is not None, "the base was here a moment ago"
            self._trained[step] = found
        return self._trained[step]

    def _of_merging(self, cell: Cell) -> Estimate:
        """The merge of a cell: of a running LoRA whose ranks are those that the merges before leave."""
        new, options = self._new, self._plan.merge(cell.rule, cell.seed)
        running = new
        for _ in range(cell.step - 2):
            running = _merged([running, new], options)
        return of_merge([running, new], options)

    @cached_property
    def _new(self) -> Outline:
        rank = float(self._plan.train_options.rank)
        adapted = adapted_by(self._plan.train_options, self._model)
        return _outline({name: (out, into, rank) for name, (out, into) in adapted.items()})


def _merged(outlines: Sequence[Outline], options: MergeOptions) -> Outline:
    found = {}
    for name, (out, into, _) in outlines[0].modules.items():
        ranks = [round(one.modules[name][2]) for one in outlines]
        most = rank_choice(options.rank, options.energy, ranks).ceiling or sum(ranks)
        found[name] = (out, into, float(min(most, sum(ranks), out, into)))
    return _outline(found)


def _outline(modules: dict[str, tuple[float, float, float]]) -> Outline:
    size = sum((out + into) * rank for out, into, rank in modules.values()) * FP32
    return Outline(bytes=math.ceil(size), width=FP32, modules=modules)


def _task(name: str, lines: bytes) -> Task:
    return task_of(Path(f"{name}.jsonl"), lines)
