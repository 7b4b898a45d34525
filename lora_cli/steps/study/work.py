"""The worker of a study: makes models by the systems of its cells, and scores them."""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError
from lora_cli.recipes import EvalOptions
from lora_cli.steps.evaluate.evaluate import Row, answered
from lora_cli.steps.study.folder import COST_FILE, FAILED_FILE, RESULT_FILE, ROWS_FILE, StudyFolder, held, write_json
from lora_cli.steps.study.make import Made, Maker, add_candidates
from lora_cli.steps.study.plan import Cell, Need
from lora_cli.steps.study.worker import PART, CellWorker, answers_of, cost_of
from lora_cli.task import read_task


class Worker(CellWorker):
    """Does the cells of the study in a folder, and makes what they need; see `CellWorker`."""

    def __init__(self, path: Path) -> None:
        self._folder = StudyFolder(path)

    def _begin(self, stack: ExitStack) -> None:
        study, folder = self._folder.study, self._folder
        shared = study.shared
        self._open(
            stack, study.base, named=shared["base"], planned=shared["versions"], data=folder.data, test=folder.test
        )
        if self._ref.version != shared["base_version"]:
            raise DataError(f"{study.base.place}: another version of the base than the study was planned for")
        add_candidates(self._pool.catalogue, folder)
        self._maker = Maker(
            folder=folder,
            pool=self._pool,
            settings=self._settings,
            ref=self._ref,
            prompting=self._prompting,
            task=read_task(folder.data),
        )
        self._test = read_task(folder.test).examples
        self._options = EvalOptions.of(**study.evaluation)
        self._cells = {cell.name: cell for cell in study.cells()}
        self._needs = study.needs(self._cells.values())

    def _do(self, name: str) -> bool:
        return self._cell(self._cells[name]) if name in self._cells else self._need(self._needs[name])

    def _need(self, need: Need) -> bool:
        """Make a need, after its own; False if it is there."""
        folder = self._folder
        for before in need.needs:
            self._need(self._needs[before])
        if folder.is_made(need.name):
            return False
        scratch = folder.scratch(need.name)
        with held(scratch):
            if made := not folder.is_made(need.name):
                began = time.monotonic()
                tokens = self._maker.need(need)
                write_json(folder.cost(need.name), cost_of(folder.device, tokens, time.monotonic() - began))
        shutil.rmtree(scratch, ignore_errors=True)
        return made

    def _cell(self, cell: Cell) -> bool:
        """Do a cell; False if it is done."""
        place = self._folder.cell(cell.name)
        if self._folder.has(cell.name):
            return False
        for need in cell.needs:
            self._need(self._needs[need])
        with held(place):
            if self._folder.has(cell.name):
                return False
            began = time.monotonic()
            made = self._maker.cell(cell)
            found = answered(
                self._ref.load(),
                [made.system],
                self._test,
                self._options,
                rows_path=place / ROWS_FILE,
                part=PART,
            )[cell.name]
            tokens = made.tokens + sum(row.tokens for row in found)
            write_json(place / COST_FILE, cost_of(self._folder.device, tokens, time.monotonic() - began))
            write_json(place / RESULT_FILE, self._result(cell, made, found))
            (place / FAILED_FILE).unlink(missing_ok=True)
            self._maker.done(cell)
        return True

    def _result(self, cell: Cell, made: Made, rows: list[Row]) -> dict[str, Any]:
        """The contents of result.json: nothing in it depends on the machine, the time or the place."""
        return {
            "schema": "lora.study.cell/1",
            "cell": cell.name,
            "system": cell.system,
            "pool": cell.pool,
            "seed": cell.seed,
            "needs": [*cell.needs],
            "adapters": dict(made.facts.adapters),
            "licences": dict(made.facts.licences),
            "outputs": dict(made.outputs),
            "results": dict(made.results),
            "metric": self._options.metric,
            "value": sum(row.value for row in rows) / len(rows),
            "n": len(rows),
            "answers": answers_of(rows),
        }
