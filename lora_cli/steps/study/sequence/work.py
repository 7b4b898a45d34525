"""A worker of a sequence: holds one loaded base, trains, merges and scores cell by cell."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError
from lora_cli.merge_options import MergeSources
from lora_cli.records import unheard
from lora_cli.steps.evaluate.evaluate import Row, System, Updates, answered
from lora_cli.steps.merge.request import MergeRequest
from lora_cli.steps.study.folder import ADAPTER_FOLDER, COST_FILE, FAILED_FILE, RESULT_FILE, held, write_json
from lora_cli.steps.study.sequence.data import read_data
from lora_cli.steps.study.sequence.folder import CELL_SCHEMA, SequenceFolder
from lora_cli.steps.study.sequence.plan import ALONE, BASE, SEQUENTIAL, Cell, Stage, weights_of
from lora_cli.steps.study.worker import PART, CellWorker, answers_of, cost_of
from lora_cli.steps.train.request import train_job


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """The LoRA of a cell, and what is recorded about it.

    `inputs` maps what it is made of to its SHA-256; `tokens` counts those that were read to learn.
    """

    system: System
    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0


class SequenceWorker(CellWorker):
    """Does the cells of the sequence in a folder; see `CellWorker`. What a cell needs are other cells."""

    def __init__(self, path: Path) -> None:
        self._folder = SequenceFolder(path)

    def _begin(self, stack: ExitStack) -> None:
        self.plan = plan = self._folder.plan
        planned = plan.shared["base"]
        self._open(stack, plan.base, named=planned["base"], planned=plan.shared["versions"], seed=plan.seed)
        if {**self._ref.settings, **self._ref.inputs} != planned:
            raise DataError(f"{plan.base.place}: another version of the base than the sequence was planned for")
        self._cells = {cell.name: cell for cell in plan.cells()}

    def _do(self, name: str) -> bool:
        return self._cell(self._cells[name])

    def _cell(self, cell: Cell) -> bool:
        """Do a cell, after those that it needs; False if it is done."""
        place = self._folder.cell(cell.name)
        if (place / RESULT_FILE).is_file():
            return False
        for need in cell.needs:
            self._cell(self._cells[need])
        with held(place):
            if (place / RESULT_FILE).is_file():
                return False
            began = time.monotonic()
            made = self._made(cell, place / ADAPTER_FOLDER)
            rows = {stage.name: self._answers(made.system, stage, place) for stage in self.plan.tasks}
            tokens = made.tokens + sum(row.tokens for each in rows.values() for row in each)
            write_json(place / COST_FILE, cost_of(self._folder.device, tokens, time.monotonic() - began))
            write_json(place / RESULT_FILE, self._result(cell, made, rows))
            (place / FAILED_FILE).unlink(missing_ok=True)
        return True

    def _made(self, cell: Cell, out: Path) -> _Made:
        if cell.rule == BASE:
            return _Made(system=System(name=cell.name))
        if cell.rule in (ALONE, SEQUENTIAL):
            return self._trained(cell, out)
        return self._merged(cell, out)

    def _trained(self, cell: Cell, out: Path) -> _Made:
        """A LoRA trained on the cell's task: a fresh one, or the one of the task before trained on."""
        stage, options = self.plan.tasks[cell.step - 1], self.plan.train_options
        if cell.rule == SEQUENTIAL:
            options = options.of_settings({**options.settings, "start": str(self._adapter(cell.needs[0]))})
        job = train_job(
            read_data(self._folder.path, stage.name, "train", stage.train),
            self._settings.with_values(seed=cell.seed),
            options=options,
            recipe=self.plan.trained_by(cell.seed),
            prompting=self._prompting,
            out=out,
            announce=unheard,
        )
        done = job.run(self._settings.db)
        run, report = done.run, done.report
        tokens = 0 if report is None else sum(step.tokens for step in report.learnt.trace)
        learnt = {name: run.results[name] for name in ("loss_before", "loss", "best_step", "n_train", "n_validation")}
        return replace(self._opened(cell, out, job.job.inputs, run.outputs, learnt), tokens=tokens)

    def _merged(self, cell: Cell, out: Path) -> _Made:
        """The running LoRA and the new one as one, the running one first."""
        names = [str(self._adapter(need)) for need in cell.needs]
        weights = ",".join(map(repr, weights_of(cell.rule, cell.step)))
        options, settings = self.plan.merge(cell.rule, cell.seed), self._settings
        job = MergeRequest(self._pool, names, options, MergeSources(weights=weights), settings).prepare(out=out)
        run = job.run(settings.db).run
        kept = {name: run.results[name] for name in ("rank", "norm", "energy")}
        return self._opened(cell, out, job.job.inputs, run.outputs, kept)

    def _opened(
        self,
        cell: Cell,
        out: Path,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        results: Mapping[str, Any],
    ) -> _Made:
        [adapter] = self._pool.adapters([str(out)]).adapters
        system = System(name=cell.name, updates=Updates(adapter), version=adapter.ref.pinned)
        return _Made(system=system, inputs=inputs, outputs=dict(outputs), results=results)

    def _adapter(self, name: str) -> Path:
        return self._folder.cell(name) / ADAPTER_FOLDER

    def _answers(self, system: System, stage: Stage, place: Path) -> list[Row]:
        """The answers to a task's test examples; those that a killed cell had are kept."""
        return answered(
            self._ref.load(),
            [system],
            read_data(self._folder.path, stage.name, "test", stage.test).examples,
            self.plan.options,
            rows_path=place / f"{stage.name}.rows.jsonl",
            part=PART,
        )[system.name]

    def _result(self, cell: Cell, made: _Made, rows: Mapping[str, list[Row]]) -> dict[str, Any]:
        """The contents of result.json: nothing in it depends on the machine, the time or the place."""
        return {
            "schema": CELL_SCHEMA,
            "cell": cell.name,
            "rule": cell.rule,
            "seed": cell.seed,
            "step": cell.step,
            "needs": [*cell.needs],
            "inputs": dict(made.inputs),
            "outputs": dict(made.outputs),
            "results": dict(made.results),
            "metric": self.plan.options.metric,
            "tasks": {
                name: {
                    "value": math.fsum(row.value for row in each) / len(each),
                    "n": len(each),
                    "answers": answers_of(each),
                }
                for name, each in rows.items()
            },
        }
