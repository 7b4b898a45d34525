"""A worker: holds one loaded base, and does cells of a study one after another."""

import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import DataError, LoraError
from lora_cli.formats.run_record import peak_bytes, versions
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import loaded_once, pin
from lora_cli.recipes import EvalOptions
from lora_cli.settings import KEYS, Settings
from lora_cli.steps.evaluate.evaluate import Row, answered
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.study.folder import COST_FILE, FAILED_FILE, RESULT_FILE, ROWS_FILE, StudyFolder, held, write_json
from lora_cli.steps.study.make import Made, Maker, add_candidates
from lora_cli.steps.study.plan import Base, Cell, Need
from lora_cli.task import read_task

PART = 64
"""Test examples that are asked together: a killed cell asks at most so many again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a cell or a need: the reason if it failed, else its seconds; 0 if it was there."""

    name: str
    seconds: float = 0.0
    error: str = ""
    hint: str = ""


class Worker:
    """Does the cells of the study in a folder; use it in a `with` statement.

    What a cell needs is made first where nobody has made it. The catalogue is the worker's own, so that workers on
    other machines share nothing but the folder. On a CPU one thread computes: then every worker gives the same bytes.

    Entering raises DataError for a folder without a study, a base or packages of other versions than it was planned
    with, and the errors of `pin`.
    """

    def __init__(self, path: Path) -> None:
        self._folder = StudyFolder(path)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        study, stack = self._folder.study, self._stack
        demand_versions(study.shared["versions"])
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-study-")))
        if study.base.device == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
        stack.enter_context(loaded_once())
        settings = settings_of(study.base, home, data=self._folder.data, test=self._folder.test)
        catalogue = stack.enter_context(Catalogue(settings.db))
        add_candidates(catalogue, self._folder)
        prompting = Prompting(**study.base.prompting)
        pool = Pool(
            catalogue=catalogue,
            base=settings.base,
            aliases=settings.base_aliases,
            announce=lambda text: None,
            policy=settings.license_policy,
        )
        self._maker = Maker(
            folder=self._folder,
            pool=pool,
            settings=settings,
            ref=pin(study.base.place, name=study.shared["base"], device=settings.device, dtype=settings.dtype,
                    prompting=prompting),
            prompting=prompting,
            task=read_task(self._folder.data),
        )  # fmt: skip
        if self._maker.ref.version != study.shared["base_version"]:
            raise DataError(f"{study.base.place}: another version of the base than the study was planned for")
        self._test = read_task(self._folder.test).examples
        self._options = EvalOptions.of(**study.evaluation)
        self._cells = {cell.name: cell for cell in study.cells()}
        self._needs = study.needs(self._cells.values())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def load(self) -> None:
        """Load the base, which `run` does where it is not loaded. Errors are those of `BaseRef.load`."""
        self._maker.ref.load()

    def run(self, name: str) -> Outcome:
        """Do a cell or a need by its name, unless it is done. A failure is the outcome.

        Raises:
            OutputError: the study's folder cannot be written.
        """
        began = time.monotonic()
        try:
            made = self._cell(self._cells[name]) if name in self._cells else self._need(self._needs[name])
        except LoraError as error:
            return Outcome(name=name, error=error.message, hint=error.hint)
        except (MemoryError, RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
            # A fault of one cell, even a bug, does not end the others.
            return Outcome(name=name, error=f"{type(error).__name__}: {error}")
        return Outcome(name=name, seconds=time.monotonic() - began if made else 0.0)

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
                self._maker.ref.load(),
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


def answers_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers as a result holds them: nothing in them depends on the machine, the time or the place."""
    return [{"id": row.id, "value": row.value, "log_likelihood": row.log_likelihood, "text": row.text} for row in rows]


def cost_of(device: str, tokens: int, seconds: float) -> dict[str, Any]:
    """What work took in this process, which may have gone on from where a killed one stopped."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"seconds": seconds, "tokens": tokens, "peak_bytes": peak_bytes(), "device": f"{device} ({name})"}


def demand_versions(planned: Mapping[str, str]) -> None:
    """DataError where Python or a package that computes has another version here than where a study was planned."""
    here = versions()
    for name, version in planned.items():
        if here.get(name) != version:
            raise DataError(
                f"{name} is {here.get(name, 'absent')} here, and was {version} where the study was planned",
                hint="results of different versions are not mixed in one study",
            )


def settings_of(
    base: Base, home: Path, *, data: Path | None = None, test: Path | None = None, seed: int = 0
) -> Settings:
    """The settings of a worker, from its study alone; its catalogue and runs are below `home`."""
    return Settings(
        base=base.place,
        base_aliases=base.aliases,
        pool=None,
        db=home / "lora.db",
        data=data,
        test=test,
        device=base.device,
        dtype=base.dtype,
        runs=home / "runs",
        license_policy=base.license_policy,
        seed=seed,
        origins=dict.fromkeys(KEYS, "study"),
    )
