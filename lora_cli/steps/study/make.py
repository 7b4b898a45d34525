"""The model of a cell: how each kind of system is made, by the steps that the other commands run."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from msgspec.structs import replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.formats.coefficients import COEFFICIENTS_FILE, coefficients_text
from lora_cli.formats.run_record import read_record
from lora_cli.merge_options import METHODS
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import BaseRef
from lora_cli.outputs import whole_file
from lora_cli.recipes import TargetRecipe, TrainOptions, TrialOptions
from lora_cli.records import unheard
from lora_cli.settings import Settings
from lora_cli.steps.evaluate.evaluate import System, Updates
from lora_cli.steps.fit.fit import Fitting, fit
from lora_cli.steps.merge.request import MergeRequest
from lora_cli.steps.opened_pool import Pool
from lora_cli.steps.pool.licences import Stated
from lora_cli.steps.select.request import SelectRequest
from lora_cli.steps.study.folder import ADAPTER_FOLDER, StudyFolder, write_json
from lora_cli.steps.study.plan import Cell, Need, Study
from lora_cli.steps.train.request import train_job
from lora_cli.task import Task

_STATE_FILE = "fit.npz"


class Facts(NamedTuple):
    """The adapters of a system, by `id@commit`: the SHA-256 of each one's weights, and its licence."""

    adapters: Mapping[str, str]
    licences: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A system that is ready to be scored, and what is recorded about it.

    `tokens` counts those that were read to learn.
    """

    system: System
    facts: Facts = field(default_factory=lambda: Facts({}, {}))
    outputs: Mapping[str, str] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Maker:
    """Makes what a study needs, with one pool and the settings of a worker."""

    folder: StudyFolder
    pool: Pool
    settings: Settings
    ref: BaseRef
    prompting: Prompting
    task: Task

    @property
    def study(self) -> Study:
        """The plan."""
        return self.folder.study

    def need(self, need: Need) -> int:
        """Make a target LoRA or a selection; the tokens that were read to learn."""
        if need.kind == "target":
            return self._train(need)
        scratch = self.folder.scratch(need.name)
        write_json(self.folder.selection(need.name), {"adapters": self._select(need, scratch)})
        return 0

    def cell(self, cell: Cell) -> Made:
        """Make the system of a cell, whose needs are there."""
        way = self.study.systems[cell.system]
        target = [str(self.folder.target(need)) for need in cell.needs if self.folder.target(need).is_dir()]
        chosen = [
            one for need in cell.needs if not self.folder.target(need).is_dir() for one in self.folder.chosen(need)
        ]
        match way.kind:
            case "base":
                return Made(system=System(name=cell.name))
            case "target":
                return self._opened(cell, target, results=_trained(Path(target[0])))
            case "single":
                return self._opened(cell, chosen[:1])
            case "merge":
                return self._merged(cell, [*chosen, *target])
            case "fit":
                return self._fitted(cell, [*chosen, *target], bool(target))

    def _opened(self, cell: Cell, names: Sequence[str], results: Mapping[str, Any] | None = None) -> Made:
        """One adapter as it is."""
        gathered = self.pool.adapters(names, passed_on=True)
        [adapter] = gathered.adapters
        return Made(
            system=System(name=cell.name, updates=Updates(adapter), version=adapter.ref.pinned),
            results=results or {},
            facts=_facts(gathered.inputs, gathered.terms),
        )

    def _merged(self, cell: Cell, names: Sequence[str]) -> Made:
        way, settings = self.study.systems[cell.system], self._by(cell.seed)
        options, sources = way.merge, way.sources
        if "seed" in options.knobs and cell.seed is not None:
            options = replace(options, knobs={**options.knobs, "seed": cell.seed})
        prompting = None
        if METHODS.get(options.method).needs == "inputs":
            sources, prompting = replace(sources, data=(str(self.folder.data),)), self.prompting
        out = self.folder.cell(cell.name) / ADAPTER_FOLDER
        job = MergeRequest(self.pool, names, options, sources, settings).prepare(prompting, out=out)
        done = job.run(settings.db)
        [adapter] = self.pool.adapters([str(out)]).adapters
        return Made(
            system=System(name=cell.name, updates=Updates(adapter), version=adapter.ref.pinned),
            outputs=dict(done.run.outputs),
            facts=_facts(job.job.inputs, job.plan.terms),
        )

    def _fitted(self, cell: Cell, names: Sequence[str], joined: bool) -> Made:
        """A fit over adapters or over noise: both are scored as the mixture that was fitted, without a reduction."""
        way, noise, seed = self.study.systems[cell.system], self.study.pools[cell.pool].noise, cell.seed or 0
        gathered = self.pool.adapters(names, passed_on=True)
        target = gathered.adapters[-1].ref.pinned if joined else ""
        how = Fitting(shape=way.shape, recipe=way.recipe(seed), target=target, task_sha256=self.task.sha256)
        folder = self.folder.cell(cell.name)
        result = fit(
            self.ref.load(),
            gathered.adapters,
            self.task.examples,
            how,
            reinit=noise or None,
            checkpoint=folder / _STATE_FILE,
        )
        with whole_file(folder / COEFFICIENTS_FILE) as file:
            file.write(coefficients_text(result.coefficients).encode())
        learnt = result.learnt
        counts = {"n_train": result.n_train, "n_validation": result.n_validation}
        return Made(
            system=System(name=cell.name, updates=result.updates, version=cell.name),
            results={"loss": learnt.loss_after, "measure": result.measure, "best_step": learnt.best_step, **counts},
            tokens=sum(step.tokens for step in learnt.trace),
            facts=_facts(gathered.inputs, gathered.terms),
        )

    def done(self, cell: Cell) -> None:
        """Remove what only an interrupted cell goes on from."""
        (self.folder.cell(cell.name) / _STATE_FILE).unlink(missing_ok=True)

    def _train(self, need: Need) -> int:
        options = self.study.systems["target"].options
        job = train_job(
            self.task,
            self._by(need.seed),
            options=TrainOptions.of_settings(options["lora"]),
            recipe=TargetRecipe.of_settings(options["recipe"]),
            prompting=self.prompting,
            out=self.folder.target(need.name),
            announce=unheard,
        )
        report = job.run(self.settings.db).report
        return 0 if report is None else sum(step.tokens for step in report.learnt.trace)

    def _select(self, need: Need, scratch: Path) -> list[str]:
        """The adapters of a pool.

        A killed selection goes on from the scores of whole groups, which are in its own catalogue. Rows of a group that
        was under way are dropped, as other batches would move the last bit of a likelihood.
        """
        rule, settings = self.study.pools[need.pool], self._by(need.seed)
        if rule.names:
            return [*rule.names]
        shutil.rmtree(scratch / "runs", ignore_errors=True)
        settings = settings.with_values(db=scratch / "lora.db", runs=scratch / "runs")
        options = rule.options
        if rule.kind in ("trials", "fits"):
            options = replace(options, data=self.folder.data)
        if rule.kind == "weights":
            options = replace(options, target=self.folder.target(need.needs[0]))
        judging = TrialOptions.of(**self.study.evaluation) if rule.kind == "trials" else None
        with Catalogue(settings.db) as catalogue:
            add_candidates(catalogue, self.folder)
            request = SelectRequest(catalogue, settings, options, judging, self.prompting, announce=unheard)
            return [row.ref.pinned for row, _ in request.chosen()]

    def _by(self, seed: int | None) -> Settings:
        return self.settings.with_values(seed=seed or 0)


def add_candidates(catalogue: Catalogue, folder: StudyFolder) -> None:
    """Store a study's candidates, unless they are there: an interrupted worker leaves all or none.

    They are usable with the study's base, wherever it is now.
    """
    base = folder.study.base.place
    if not catalogue.candidates(base=base).pinned:
        catalogue.add((dataclasses.replace(one, base=base) for one in folder.candidates()), base=base)


def _trained(folder: Path) -> dict[str, Any]:
    """What a training ended with."""
    found = read_record(folder)["results"]
    return {name: found[name] for name in ("loss", "best_step", "n_train", "n_validation")}


def _facts(inputs: Mapping[str, str], terms: Mapping[str, Stated]) -> Facts:
    licences = {pinned: stated.licence for pinned, stated in terms.items() if pinned}
    return Facts({pinned: inputs[pinned] for pinned in licences}, licences)
