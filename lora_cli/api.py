"""The interface for notebooks: open a pool, then list, select, merge, fit, train, evaluate and bake with it.

Each function runs the same steps as the command of its name, and records the same run. Nothing is printed:
`announce` gets the lines that a command would write to stderr, and `progress` is called as (what, done, total).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_cli.errors import UsageError
from lora_cli.merge_options import METHODS, MergeOptions, MergeSources
from lora_cli.recipes import (
    EvalOptions,
    FitOptions,
    Recipe,
    SelectOptions,
    Shape,
    TargetRecipe,
    TrainOptions,
    TrialOptions,
)
from lora_cli.records import AdapterRow, Progress, Score, silent, unheard
from lora_cli.settings import KEYS, Settings, load
from lora_cli.steps.opened_pool import pool_of
from lora_cli.study_options import Asked, asked_options
from lora_cli.task import read_task

Rows = list[AdapterRow]
Names = list[str]
Scores = list[Score]
Lines = list[dict[str, Any]]


class OpenPool(AbstractContextManager["OpenPool"]):
    """A catalogue with a base model, opened; close it, or use it in a `with` statement.

    Results are folders. An existing result is not made again, unless `force` is true.
    """

    def __init__(self, settings: Settings, announce: Callable[[str], None], progress: Progress) -> None:
        self.settings = settings
        self._pool = pool_of(settings, announce, progress)
        self._catalogue = self._pool.catalogue

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the catalogue."""
        self._catalogue.close()

    def _tell(self, notice: str) -> None:
        if notice:
            self._pool.announce(notice)

    def list(self, *where: str, sort: str = "id", limit: int | None = None) -> Rows:
        """The adapters of the pool's base (else all) for which all conditions hold, such as "rank<=16"."""
        return self._catalogue.find(where, base=self.settings.base, sort=sort, limit=limit)

    def frame(self, *where: str, sort: str = "id", limit: int | None = None) -> Any:
        """`list` as a pandas DataFrame, one column per fact. ImportError where pandas is not installed."""
        pandas = importlib.import_module("pandas")
        return pandas.DataFrame([asdict(row) for row in self.list(*where, sort=sort, limit=limit)])

    def select(
        self, by: str = "random", k: int = 30, *where: str, target: Path | str | None = None, **options: Any
    ) -> Names:
        """The k best adapters by a selection method, as `id@commit`; remembered as the last selection.

        Args:
            options: the other options of `lora select` with underscores: `data="task.jsonl"`, `metric="nll"`.
        """
        from lora_cli.steps.select.request import SelectRequest

        given = {"by": by, "k": k, "where": where, "target": _path(target), **options}
        choice, judging = _shared_out(given, SelectOptions, TrialOptions)
        pool = self._pool
        request = SelectRequest(
            self._catalogue, self.settings, choice, judging, announce=pool.announce, progress=pool.progress
        )
        return [row.ref.pinned for row, _ in request.run()[0]]

    def merge(
        self,
        adapters: Sequence[str] = (),
        method: str = "",
        *,
        out: Path | str | None = None,
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Merge adapters, each `ID`, `ID=WEIGHT` or a folder, and return the folder of the result.

        Args:
            method: default norm-matched, or linear with `coef`.
            options: the options of `lora merge` with underscores, `lambda_` and `for_` among them, and the knobs of the
                method: `rank=16`, `density=0.4`.

        Raises:
            UsageError: an unknown option, or a value out of range. Else as `lora merge` fails.
        """
        from lora_cli.steps.merge.request import MergeRequest

        knobs = {name: options.pop(name) for name in [*options] if name in METHODS.knobs}
        sources = {name: options.pop(name) for name in [*options] if name in MergeSources.__struct_fields__}
        request = MergeRequest(
            self._pool,
            adapters,
            MergeOptions.of(method=method, knobs=knobs, **options),
            MergeSources.of(**sources),
            self.settings,
        )
        merging = request.prepare(out=_path(out))
        merging.run(self.settings.db, force=force, progress=self._pool.progress)
        self._tell(merging.notice)
        return merging.job.folder

    def fit(
        self,
        data: Path | str | None,
        adapters: Sequence[str] = (),
        *,
        valid: Path | str | None = None,
        out: Path | str | None = None,
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Fit coefficients to the task file `data`, and return the folder of the merge with them.

        Args:
            data: None is for presets that make a router, which are measured if there is a file.
            valid: a task file whose examples choose the best step, in place of a part of `data`.
            options: the options of `lora fit` with underscores: `steps=50`, `granularity="layer"`, `control="random"`.

        Raises:
            UsageError: no data for a preset that learns. Else as `lora fit` fails.
        """
        from lora_cli.steps.fit.request import FitRequest
        from lora_cli.steps.fit.route import RouteRequest

        shape, recipe, fit = _shared_out(options, Shape, Recipe, FitOptions)
        names = self._pool.unweighted(adapters, verb="fit")
        task = None if data is None else read_task(Path(data), labelled=shape.labelled, valid=_path(valid))
        request: FitRequest | RouteRequest
        if shape.routes:
            request = RouteRequest(self._pool, names, self.settings, shape, recipe, fit, task=task)
        elif task is None:
            raise UsageError(f"{shape.preset} learns from data", hint="name a task file")
        else:
            request = FitRequest(self._pool, names, task, self.settings, shape, recipe, fit)
        fitting = request.prepare(out=_path(out))
        fitting.run(self.settings.db, force=force, progress=self._pool.progress)
        self._tell(fitting.notice)
        return fitting.job.folder

    def train(
        self,
        data: Path | str,
        *,
        valid: Path | str | None = None,
        out: Path | str | None = None,
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Train a new LoRA on the task file `data`, and return its folder.

        Args:
            valid: a task file whose examples choose the best step, in place of a part of `data`.
            options: those of `lora train`.
        """
        from lora_cli.steps.train.request import train_job

        lora, recipe = _shared_out(options, TrainOptions, TargetRecipe)
        training = train_job(
            read_task(Path(data), valid=_path(valid)),
            self.settings,
            options=lora,
            recipe=recipe,
            out=_path(out),
            announce=self._pool.announce,
            progress=self._pool.progress,
        )
        training.run(self.settings.db, force=force, progress=self._pool.progress)
        return training.job.folder

    def evaluate(self, data: Path | str, adapters: Sequence[str] = (), **options: Any) -> Scores:
        """Score the bare base and adapters on the task file `data`. `options` are those of `lora eval`.

        An adapter without any effect, with which `lora eval` fails, has 0 in its score's `details["moved"]`.
        """
        from lora_cli.steps.evaluate.request import EvaluateRequest, last_written

        names = self._pool.unweighted(adapters, verb="eval") if adapters else last_written(self.settings.db)
        settings = self.settings.with_values(test=Path(data))
        request = EvaluateRequest(self._pool, names, settings, EvalOptions.of(**options))
        return request.run(self.settings.db, progress=self._pool.progress)

    def evaluate_pool(
        self, data: Path | str, *where: str, sample: int | None = None, **options: Any
    ) -> dict[str, float]:
        """The scores of the pool's usable adapters for which all conditions hold, by id, the best first.

        They are kept in the catalogue, and what is there is not measured again. `options` are the metric, its knobs,
        `max_new_tokens` and `batch_size`.
        """
        from lora_cli.steps.select.pool_evaluation import adapters_of, evaluate_pool
        from lora_cli.steps.select.trial import PoolTrial

        settings = self.settings
        names = adapters_of(self._catalogue, base=settings.base, where=where, sample=sample, seed=settings.seed)
        with PoolTrial(self._pool, read_task(Path(data)), settings, TrialOptions.of(**options).of_eval) as trial:
            found = evaluate_pool(trial, names, k=len(names))
        return {id: score.value for id, score in found.scores.items()}

    def study(self, *, out: Path | str | None = None, jobs: int | None = 1, **options: Any) -> Lines:
        """Compare ways to recycle the pool's adapters for a task: a row for each system on each pool.

        Rows are those of `lora study --json`; the study's folder is that of `lora study` with these options.

        Args:
            jobs: the number of workers; one is this process itself, None is one per GPU or core.
            options: `data` and `test`, and the options of `lora study` with underscores: `systems="base,average"`,
                `k=8`, `quick=True`, `file="study.toml"`.

        Raises:
            Partial: a cell failed; the others are kept.
        """
        from lora_cli.executors.local import local
        from lora_cli.steps.study.request import StudyRequest
        from lora_cli.steps.study.run import run_study
        from lora_cli.steps.study.table import lines, row_of

        named = {name: _path(options.pop(name)) for name in ("data", "test", "file") if name in options}
        study, from_file = asked_options(Asked.of(file=named.pop("file", None), **options))
        pool, settings = self._pool, self.settings.with_values(**from_file).with_values(**named)
        request = StudyRequest(self._catalogue, settings, study, announce=pool.announce, progress=pool.progress)
        planned = request.planned(_path(out))
        planned.write()
        outcomes = local(planned.folder, planned.cells, jobs=jobs, progress=pool.progress)
        ran = run_study(settings.db, planned, planned.cells, outcomes, progress=pool.progress)
        ran.demand_all()
        return [row_of(line) for line in lines(planned.folder)]

    def bake(self, adapter: str, *, out: Path | str | None = None, force: bool = False, dtype: str = "auto") -> Path:
        """Add an adapter to its base model, and return the folder of the new model."""
        from lora_cli.steps.bake.request import BakeRequest

        baking = BakeRequest(self._pool, adapter, self.settings).prepare(dtype=dtype, out=_path(out))
        baking.run(self.settings.db, force=force, progress=self._pool.progress)
        self._tell(baking.notice)
        return baking.job.folder


def open_pool(
    base: str | None = None,
    *,
    db: Path | str | None = None,
    announce: Callable[[str], None] = unheard,
    progress: Progress = silent,
    **settings: Any,
) -> OpenPool:
    """Open the catalogue for a base model: a Hub id, with @revision if any, or a folder.

    Missing settings come from LORA_* in the environment, lora.toml or the user's configuration, as for the commands.

    Args:
        db: the catalogue's file.
        settings: any other setting of `lora config show`, such as `device="cuda"`, `seed=1` or `runs="results"`.

    Raises:
        UsageError: an unknown setting, or an invalid value.
    """
    if unknown := sorted(settings.keys() - KEYS.keys()):
        raise UsageError(f"unknown setting {unknown[0]!r}", hint=f"settings are {', '.join(KEYS)}")
    return OpenPool(load({"base": base, "db": _text(db), **settings}), announce, progress)


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _shared_out(options: Mapping[str, Any], *records: Any) -> "list[Any]":
    """One record of each class, from the options that are its fields; UsageError for an unknown option."""
    left = dict(options)
    made = [
        record.of(**{name: left.pop(name) for name in [*left] if name in record.__struct_fields__})
        for record in records[:-1]
    ]
    return [*made, records[-1].of(**left)]
