"""From the user's request for a selection to adapters, by the catalogue, by weights or by answers."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.recipes import SELECTION_METHODS, SelectOptions, TrialOptions
from lora_cli.records import AdapterRow, Candidates, Progress, silent
from lora_cli.settings import Settings
from lora_cli.steps.pool.explain import Explanation
from lora_cli.steps.pool.select import Scored, select
from lora_cli.steps.select.stored import scored_by_stored
from lora_cli.task import Task, read_task

if TYPE_CHECKING:
    from lora_cli.models.forms import Prompting
    from lora_cli.steps.opened_pool import Pool

_TAKEN: Final = ("target", "data", "task")
_READS: Final = {"catalogue": (), "weights": _TAKEN[:2], "trials": _TAKEN[1:], "fits": _TAKEN[:2]}
"""What a method of each kind takes of these: one at a time, but for fits, which need data and may take a target too."""
Chosen = list[tuple[AdapterRow, float]]


class SelectRequest:
    """The user's request for a selection.

    Raises:
        UsageError: an unknown method, or an option that it does not take.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        settings: Settings,
        options: SelectOptions,
        judging: TrialOptions | None = None,
        prompting: "Prompting | None" = None,
        *,
        announce: Callable[[str], None],
        progress: Progress = silent,
    ) -> None:
        self.catalogue, self.settings, self.options = catalogue, settings, options
        self.judging, self.prompting = judging or TrialOptions(), prompting
        self.announce, self.progress = announce, progress
        self.kind = SELECTION_METHODS.get(options.by).kind
        if self.kind in ("trials", "fits") and options.task is None:
            self.options = replace(options, data=options.data or settings.data)
        self._demand_fitting()

    def chosen(self, explained: Callable[[Explanation], None] | None = None) -> Chosen:
        """The adapters, the best first, each with its score.

        Raises:
            NothingMatched: no adapter fits. Else as `select`, training, evaluation and fits do.
        """
        scorers = {
            "weights": self._by_weights,
            "trials": self._by_task if self.options.task is None else self._by_stored,
            "fits": self._by_fits,
        }
        chosen = select(
            self.catalogue,
            self.options,
            base=self.settings.base,
            seed=self.settings.seed,
            announce=self.announce,
            scorer=scorers.get(self.kind),
            explained=explained,
        )
        if not chosen:
            raise NothingMatched("no adapter fits")
        return chosen

    def run(
        self, *, name: str = "", explained: Callable[[Explanation], None] | None = None
    ) -> tuple[Chosen, dict[str, Any]]:
        """The adapters, kept as the last selection, also by `name`; and the settings of the selection.

        Raises as `chosen` does.
        """
        chosen, settings, options = self.chosen(explained), self.settings, self.options
        asked = {
            "k": options.k,
            "base": settings.base,
            "where": [*options.where],
            "seed": settings.seed,
            "max_per_author": options.max_per_author,
            "dedupe": options.dedupe,
            "target": _place(options.target),
            "data": _place(options.data),
            "task": options.task,
            "metric": self.judging.metric,
        }
        self.catalogue.selections.remember(name, chosen, options.by, asked)
        return chosen, asked

    def _by_stored(self, candidates: Candidates) -> Scored:
        return scored_by_stored(self.settings.db, self.options, self.judging.metric, self.announce, candidates)

    def _by_weights(self, candidates: Candidates) -> Scored:
        from lora_cli.steps.pool.by_weights import scored_by_weights

        if self.options.target is None:
            self.options = replace(self.options, target=self._trained())
        assert self.options.target is not None
        return scored_by_weights(
            self.catalogue,
            self.options.by,
            self.options.target,
            self.settings.base_aliases,
            self.announce,
            self.progress,
            candidates,
        )

    def _by_task(self, candidates: Candidates) -> Scored:
        from lora_cli.steps.select.by_trial import scored_by_trial
        from lora_cli.steps.select.trial import PoolTrial

        options = self.judging.of_eval
        with PoolTrial(self._pool(), self._task(), self.settings, options, self.prompting) as trial:
            return scored_by_trial(self.catalogue, trial, self.options, self.announce, candidates)

    def _by_fits(self, candidates: Candidates) -> Scored:
        from lora_cli.steps.select.by_scan import Scan

        by, every = self.options.rank_by, len(candidates.pinned)
        reads = _READS[SELECTION_METHODS.get(by).kind]
        left_out = {name: None for name in _TAKEN if name not in reads or (name == "data" and self.options.target)}
        ranking = SelectRequest(
            self.catalogue,
            self.settings,
            replace(self.options, by=by, rank_by="rank", k=every, **left_out),
            prompting=self.prompting,
            announce=self.announce,
            progress=self.progress,
        )
        ranked = [row.ref.pinned for row, _ in ranking.chosen()]
        scan = Scan(self._pool(), self._task(), self.settings, self.options, self.prompting)
        return scan.scored(ranked, candidates)

    def _pool(self) -> "Pool":
        from lora_cli.steps.opened_pool import Pool

        return Pool(
            catalogue=self.catalogue,
            base=self.settings.base,
            aliases=self.settings.base_aliases,
            announce=self.announce,
            progress=self.progress,
        )

    def _trained(self) -> Path:
        """The folder of a LoRA trained on the data, of an earlier run if there is one."""
        from lora_cli.steps.train.request import train_job

        task = self._task()
        training = train_job(
            task, self.settings, prompting=self.prompting, announce=self.announce, progress=self.progress
        )
        folder = training.job.folder
        self.announce(f"no --target: a LoRA of rank {training.options.rank} on {task.file.name}, {folder}")
        done = training.run(self.settings.db, progress=self.progress)
        if done.report is None:
            self.announce("it was trained before, and is up to date")
        return folder

    def _task(self) -> Task:
        assert self.options.data is not None
        return read_task(self.options.data)

    def _demand_fitting(self) -> None:
        """UsageError for an option that the method does not take."""
        options, by = self.options, self.options.by
        given = [name for name in _TAKEN if getattr(options, name) is not None]
        for name in given:
            if name not in _READS[self.kind]:
                raise UsageError(f"--by {by} takes no --{name}")
        fits = self.kind == "fits"
        if _READS[self.kind] and ("data" not in given if fits else not given):
            takes = " or ".join(f"--{name}" for name in _READS[self.kind] if not fits or name == "data")
            raise UsageError(f"--by {by} needs {takes}")
        if len(given) > 1 and not fits:
            raise UsageError(f"--{given[0]} and --{given[1]} exclude each other")
        if options.rank_by != "rank" and not fits:
            raise UsageError(f"--by {by} takes no --rank-by", hint="it is for scan")
        usual, judging = TrialOptions().settings, self.judging.settings
        changed = [name.replace("_", "-") for name in usual if judging[name] != usual[name]]
        changed += ["ties"] if options.ties != "likelihood" else []
        if changed and self.kind != "trials":
            raise UsageError(f"--by {by} takes no --{changed[0]}", hint="it is for evaluation and race")
        if options.ties == "file" and options.task is None:
            raise UsageError("--ties file is for stored scores", hint="name their task: --task NAME")


def _place(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())
