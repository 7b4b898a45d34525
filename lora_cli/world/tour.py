"""The tour through a finished world: sync, select, merge, fit, evaluate, by the functions that the commands call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_cli.catalogue import runs
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import Refused
from lora_cli.formats.reader import OpenAdapter, open_adapter
from lora_cli.formats.run_record import Run
from lora_cli.formats.store import folder_ref, locate
from lora_cli.merge_options import MergeOptions
from lora_cli.models.base_model import BaseModel
from lora_cli.models.ref import BaseRef, pin
from lora_cli.models.skeleton import skeleton
from lora_cli.recipes import EvalOptions, Recipe, SelectOptions, Shape, TrainOptions
from lora_cli.records import Progress, Score, silent
from lora_cli.sources.folder import FolderSource
from lora_cli.steps.evaluate.evaluate import System, Updates, evaluate
from lora_cli.steps.fit import fit as fitting
from lora_cli.steps.fit.write import fit_and_write
from lora_cli.steps.merge import stream as merging
from lora_cli.steps.opened_pool import Gathered, Pool
from lora_cli.steps.pool.by_weights import scored_by_weights
from lora_cli.steps.pool.select import select
from lora_cli.steps.pool.sync import SyncOptions, SyncReport, sync
from lora_cli.steps.recorded import Job, run_once
from lora_cli.steps.train import train as training
from lora_cli.task import load_task, read_task, task_sha256
from lora_cli.world.layout import Size, Target, World

CHOSEN: dict[Size, int] = {"small": 5, "test": 3}
TARGETS: dict[Size, tuple[int, ...]] = {"small": (0, -1), "test": (0,)}
NEW_LORA = TrainOptions(rank=8, alpha=16.0, dropout=0.0)
NEW_LORA_RECIPE = Recipe(steps=100, lr=5e-3)
"""Settings for so small a model; the defaults of `lora train` suit large ones."""
_NEW, _NOISE, _RANDOM, _NEAREST = (
    "new LoRA on the same data",
    "control: random weights",
    "adaptive, {} random",
    "adaptive, {} nearest",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """The results on one task. `nearest` and `drawn` name the adapters of the two selections.

    `claims` compares pairs of systems on the same prompts: (system, baseline, the system's score).
    """

    target: Target
    scores: tuple[Score, ...]
    nearest: tuple[str, ...]
    drawn: tuple[str, ...]
    claims: tuple[tuple[str, str, Score], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tour:
    """The results of the tour: the figures of the sync, and a chapter per task."""

    synced: SyncReport
    chapters: tuple[Chapter, ...]


def tour(world: World, db: Path, folder: Path, *, progress: Progress = silent) -> Tour:
    """Run the whole tool on `world`; outputs go below `folder`, and finished ones are reused.

    The last selection is that of the nearest adapters for the main task.
    """
    with _one_thread(), Catalogue(db) as catalogue:
        synced = sync(
            catalogue,
            FolderSource(world.pool),
            SyncOptions(aliases=[world.base_name]),
            base=str(world.base),
            skeleton=lambda: skeleton(world.base),
            progress=progress,
        )
        ref = pin(str(world.base), name=world.base_name, device="cpu", dtype="fp32")
        base = ref.load()
        guides = [
            _Guide(world, catalogue, ref, base, db, folder, world.targets[i], progress) for i in TARGETS[world.size]
        ]
        # The main task comes last, so that its selection is the last one.
        chapters = [guide.chapter() for guide in reversed(guides)][::-1]
    return Tour(synced=synced, chapters=tuple(chapters))


class _Guide:
    """The making of one task's chapter."""

    def __init__(
        self,
        world: World,
        catalogue: Catalogue,
        ref: BaseRef,
        base: BaseModel,
        db: Path,
        folder: Path,
        target: Target,
        progress: Progress,
    ) -> None:
        self.world, self.catalogue, self.ref, self.base, self.db = world, catalogue, ref, base, db
        self.folder, self.target, self.progress = folder / target.name, target, progress
        self.k = CHOSEN[world.size]
        self.train, self.test = load_task(target.train), load_task(target.test)
        self.task = {target.train.name: task_sha256(target.train)}

    def chapter(self) -> Chapter:
        """Train the baseline, choose, merge, fit, evaluate."""
        new = self._new_lora()
        drawn = self._choose("random", where=[f"id!={self.world.pool.name}/{name}" for name in self.target.relevant])
        nearest = self._choose("cosine", target=self.folder / "new-lora")
        nearest_name, random_name = _NEAREST.format(self.k), _RANDOM.format(self.k)
        adapters = {
            f"average of {self.k} random": self._merged("average", drawn, "linear"),
            f"TIES of {self.k} random": self._merged("ties", drawn, "ties"),
            random_name: self._fitted("fit-random", drawn),
            nearest_name: self._fitted("fit-nearest", nearest),
            _NEW: new,
        }
        systems = [System(name="base")]
        for name, adapter in adapters.items():
            systems.append(System(name=name, updates=Updates(adapter), version=adapter.ref.pinned))
        systems.append(self._noise(nearest))
        pairs = ((nearest_name, _NEW), (nearest_name, _NOISE), (random_name, _NOISE))
        scores = self._evaluated(systems)
        claims = [(one, other, self._against(systems, one, other)) for one, other in pairs]
        return Chapter(
            target=self.target,
            scores=tuple(scores),
            nearest=tuple(a.ref.id for a in nearest.adapters),
            drawn=tuple(a.ref.id for a in drawn.adapters),
            claims=tuple(claims),
        )

    def _choose(self, by: str, *, where: Sequence[str] = (), target: Path | None = None) -> Gathered:
        names, scorer = [self.world.base_name], None
        if target is not None:
            scorer = partial(scored_by_weights, self.catalogue, by, target, names, _nothing_to_fetch, silent)
        chosen = select(
            self.catalogue,
            SelectOptions(by=by, k=self.k, where=tuple(where)),
            base=str(self.world.base),
            seed=self.world.seed,
            announce=_nothing_to_fetch,
            scorer=scorer,
        )
        self.catalogue.selections.remember(f"{self.target.name}-{by}", chosen, by, {"k": self.k, "demo": True})
        pool = Pool(
            catalogue=self.catalogue,
            base=str(self.world.base),
            aliases=[self.world.base_name],
            announce=_nothing_to_fetch,
        )
        return pool.adapters([adapter.ref.pinned for adapter, _ in chosen])

    def _new_lora(self) -> OpenAdapter:
        described = training.run_settings(
            options=NEW_LORA, recipe=NEW_LORA_RECIPE, data={"data": self.target.train.name}
        )

        def work(job: Job, run: Run) -> None:
            training.train_and_write(
                self.base,
                read_task(self.target.train),
                job.folder,
                run,
                options=NEW_LORA,
                recipe=NEW_LORA_RECIPE,
                replace=True,
                progress=self.progress,
            )

        return self._made("new-lora", "train", self.ref.settings | described, {**self.ref.inputs, **self.task}, work)

    def _merged(self, name: str, chosen: Gathered, method: str) -> OpenAdapter:
        plan = _plan(chosen, 1 / len(chosen.adapters), method)

        def work(job: Job, run: Run) -> None:
            merging.merge(plan, job.folder, run, replace=True, progress=self.progress)

        return self._made(name, "merge", plan.settings, chosen.inputs, work)

    def _fitted(self, name: str, chosen: Gathered) -> OpenAdapter:
        plan, recipe = _plan(chosen, 1.0, "linear"), Recipe(seed=self.world.seed)
        described = fitting.run_settings(plan, shape=Shape(), recipe=recipe, data={"data": self.target.train.name})

        def work(job: Job, run: Run) -> None:
            fit_and_write(
                self.base,
                plan,
                self.train,
                job.folder,
                run,
                fitting.Fitting(recipe=recipe, task_sha256=self.task[self.target.train.name]),
                replace_folder=True,
                progress=self.progress,
            )

        inputs = {**self.ref.inputs, **chosen.inputs, **self.task}
        return self._made(name, "fit", self.ref.settings | described, inputs, work)

    def _made(
        self,
        name: str,
        verb: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        work: Callable[[Job, Run], None],
    ) -> OpenAdapter:
        """The adapter in the folder `name`, made by `work` unless it is there; an older one may be replaced."""
        job = Job(verb=verb, settings=settings, inputs=inputs, runs=self.folder, out=self.folder / name)
        run_once(self.db, job, partial(work, job), force=False, replace=True)
        return _opened(job.folder)

    def _noise(self, chosen: Gathered) -> System:
        """The same fit over noise of the same norms: a control that uses none of the adapters' weights."""
        recipe = Recipe(seed=self.world.seed)
        how = fitting.Fitting(recipe=recipe)
        result = fitting.fit(self.base, chosen.adapters, self.train, how, reinit="norm", progress=self.progress)
        version = " ".join([f"noise, seed {recipe.seed}", *(a.ref.pinned for a in chosen.adapters)])
        return System(name=_NOISE, updates=result.updates, version=version)

    def _evaluated(self, systems: Sequence[System]) -> list[Score]:
        sha256, rows = task_sha256(self.target.test), self.folder / "rows.jsonl"
        versions = {system.name: system.version for system in systems}
        inputs = {**self.ref.inputs, **versions, self.target.test.name: sha256}
        described = {"metric": "exact", "seed": self.world.seed, "data": self.target.test.name}
        with runs.recorded(self.db, "eval", self.ref.settings | described, inputs, rows) as run:
            scores = evaluate(
                self.base, systems, self.test, rows_path=rows, seed=self.world.seed, progress=self.progress
            )
            named = {system.name: [system.version] for system in systems if system.version}
            runs.add_scores(self.db, run, scores, named, sha256)
        return scores

    def _against(self, systems: Sequence[System], one: str, other: str) -> Score:
        """Score `one` with `other` as the baseline, from the rows that are already there."""
        rows = self.folder / "rows.jsonl"
        against = EvalOptions(baseline=other)
        scores = evaluate(self.base, systems, self.test, against, rows_path=rows, seed=self.world.seed)
        return next(score for score in scores if score.system == one)


def _plan(chosen: Gathered, weight: float, method: str) -> merging.MergePlan:
    weights = [weight] * len(chosen.adapters)
    options = MergeOptions(method=method)
    return merging.plan(
        chosen.adapters, weights, options, base=chosen.base, skeleton=chosen.skeleton, terms=chosen.terms
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: it is faster for so small a model, and gives the same result on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _opened(folder: Path) -> OpenAdapter:
    files = locate(folder_ref(folder))
    if files is None:
        raise Refused(f"{folder}: incomplete", hint="remove it and run the demo again")
    return open_adapter(files)


def _nothing_to_fetch(text: str) -> None:
    raise AssertionError(f"the miniature world needs no download, but: {text}")
