"""From the user's request for a merge to a job that is ready to run."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from msgspec.structs import replace

from lora_cli.algebra.devices import resolve_device
from lora_cli.errors import Refused, UsageError
from lora_cli.formats.coefficients import demand_fitting, read_coefficients
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.run_record import Run
from lora_cli.merge_options import METHODS, MergeOptions, MergeSources
from lora_cli.models.forms import Prompting
from lora_cli.records import Adapter, Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.merge.lock import (
    Lock,
    demand_same_outputs,
    demand_same_parents,
    lock_of,
    read_lock,
    under_locked_names,
    where_parents_are,
)
from lora_cli.steps.merge.plan import checked_options
from lora_cli.steps.merge.stream import MergePlan, MergeReport, identical, merge, plan
from lora_cli.steps.opened_pool import Chosen, Gathered, Pool
from lora_cli.steps.pool.compare import near_copies
from lora_cli.steps.recorded import Finished, Job, run_once
from lora_cli.text import counted, in_words

if TYPE_CHECKING:
    from lora_cli.steps.merge.inputs import ModuleInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob:
    """A merge that is planned. `unchecked` is the reason why module names were not checked against the base's class."""

    plan: MergePlan
    job: Job
    unchecked: str
    notice: str
    lock: Lock | None
    samples: "ModuleInputs | None"

    def run(self, db: Path, *, force: bool = False, progress: Progress = silent) -> Finished[MergeReport]:
        """Merge, unless the result is there; see `run_once` and `steps.merge.merge`."""

        def work(run: Run) -> MergeReport:
            run.lock.update(lock_of(self.plan, self.job.inputs, self.job.folder))
            with TemporaryDirectory() as spool:
                if self.samples is not None:
                    self.samples.collect(self.plan.adapters, self.plan.modules, Path(spool), progress=progress)
                return merge(self.plan, self.job.folder, run, replace=force, lock=self.lock, progress=progress)

        done = run_once(db, self.job, work, force=force, progress=progress)
        if done.report is None and self.lock is not None:
            demand_same_outputs(self.lock, done.run.outputs)
        return done


@dataclass(frozen=True, slots=True, kw_only=True)
class _Team:
    """The adapters of a merge, the weight of each, and `id@commit` → SHA-256 of its weights."""

    adapters: Sequence[OpenAdapter]
    weights: Sequence[float]
    inputs: Mapping[str, str]


class MergeRequest:
    """The user's request for a merge: adapters, options, and the source of the weights.

    Args:
        texts: ADAPTER or ADAPTER=WEIGHT each; without any, the adapters of the lock, else of the coefficients, else
            of the selection.

    Raises:
        UsageError: options that exclude each other, or weights that do not fit the adapters.
        DataError: no lock or no coefficients in a file. Else as `Pool.chosen` does.
    """

    def __init__(
        self, pool: Pool, texts: Sequence[str], options: MergeOptions, sources: MergeSources, settings: Settings
    ) -> None:
        self.pool, self.sources, self.settings = pool, sources, settings
        self.coefficients = None if sources.coef is None else read_coefficients(sources.coef)
        if self.coefficients is not None and (sources.dedupe is not None or sources.weights is not None):
            raise UsageError("--weights and --dedupe cannot be combined with --coef, which holds the weights")
        self.lock = None if sources.locked is None else read_lock(sources.locked)
        if self.lock is not None:
            options = self.lock.options
        else:
            method = options.method or sources.method
            options = replace(options, method=method, device=resolve_device(settings.device))
        # Check before adapters are looked up or downloaded.
        self.options = checked_options(options)
        if self.lock is not None and self.lock.earlier:
            pool.announce(
                f"{sources.locked} is of an earlier version: weights are rebuilt byte for byte, the configuration is "
                "written as today"
            )
        self.chosen = pool.chosen(texts, sources.selection, self._recorded)
        self.spelled = sources.weights or METHODS.get(self.options.method).weights
        self.weights = [] if self._recorded else _weights(self.spelled, self.chosen)
        self.names = self.chosen.names
        if self.lock is not None and not texts:
            self.names = tuple(where_parents_are(self.lock, pool.catalogue))

    @property
    def _recorded(self) -> Collection[str]:
        """The adapters that the lock or the coefficients name."""
        if self.lock is not None:
            return self.lock.parents
        return self.coefficients.adapters if self.coefficients is not None else ()

    def absent(self) -> list[Adapter]:
        """The adapters whose weights would have to be downloaded."""
        return self.pool.absent(self.names)

    def prepare(self, prompting: Prompting | None = None, *, out: Path | None = None) -> MergeJob:
        """Open the adapters, downloading missing files, and check everything that needs no weights.

        Args:
            prompting: how a method that needs examples reads them.

        Raises:
            Refused: adapters other than those of the lock. Else as `Pool.adapters` and `steps.merge.plan` do.
        """
        gathered = self.pool.adapters(self.names, whole=self.options.saved_modules != "refuse", passed_on=True)
        team = self._team(gathered)
        for ids in identical(team.adapters, team.inputs):
            self.pool.announce(f"{in_words(ids)} are byte-identical")
        samples = self._samples(prompting or Prompting(), team.adapters)
        planned = plan(
            team.adapters,
            team.weights,
            self._with_holder(gathered.adapters),
            base=gathered.base,
            skeleton=gathered.skeleton,
            coefficients=self.coefficients,
            inputs=samples,
            terms=gathered.terms,
        )
        asked = planned.settings | (samples.settings if samples is not None else {})
        if self.lock is not None and asked != self.lock.settings:
            raise Refused(
                "coefficients, examples, prompts or base differ from those of the lock",
                hint="give the same --coef, --data, --base and options about prompts",
            )
        job = Job(
            verb="merge",
            settings=asked,
            inputs={**team.inputs, **(samples.inputs if samples is not None else {})},
            runs=self.settings.runs,
            out=out,
            name=f"merge-{planned.options.method}",
            device=planned.options.device,
        )
        return MergeJob(
            plan=planned, job=job, unchecked=gathered.unchecked, notice=gathered.notice, lock=self.lock, samples=samples
        )

    def _team(self, gathered: Gathered) -> _Team:
        """The adapters to merge, with weights from the lock, from the coefficients or from the user."""
        adapters, inputs, weights = list(gathered.adapters), dict(gathered.inputs), self.weights
        if self.lock is not None:
            adapters, inputs = under_locked_names(self.lock, adapters, inputs)
            demand_same_parents(self.lock, inputs)
            adapters = self.lock.in_order(adapters)
            weights = self.lock.weights([adapter.ref.pinned for adapter in adapters])
        elif self.coefficients is not None:
            demand_fitting(self.coefficients, adapters)
            weights = [1.0] * len(adapters)
        team = _Team(adapters=adapters, weights=weights, inputs=inputs)
        return team if self.sources.dedupe is None else self._without_copies(team, self.sources.dedupe)

    def _without_copies(self, team: _Team, cosine: float) -> _Team:
        """`team` without near copies of an earlier adapter; each is announced."""
        copies = near_copies(team.adapters, cosine, self.pool.progress)
        for kept, copy, measured in copies:
            self.pool.announce(f"left out {copy.ref.id}: cosine {measured:.3f} with {kept.ref.id}")
        out = [copy for _, copy, _ in copies]
        places = [place for place, adapter in enumerate(team.adapters) if adapter not in out]
        adapters = [team.adapters[place] for place in places]
        average = self.spelled == "average" and not self.chosen.weighted
        return _Team(
            adapters=adapters,
            weights=[1 / len(adapters) if average else team.weights[place] for place in places],
            inputs={adapter.ref.pinned: team.inputs[adapter.ref.pinned] for adapter in adapters},
        )

    def _with_holder(self, adapters: Sequence[OpenAdapter]) -> MergeOptions:
        """The options with the adapter that --saved-modules names as `id@commit`."""
        what = self.options.saved_modules
        if what in ("refuse", "drop") or self.lock is not None:
            return self.options
        for name, adapter in zip(self.names, adapters, strict=True):
            if what in (name, adapter.ref.id, adapter.ref.pinned):
                return replace(self.options, saved_modules=adapter.ref.pinned)
        raise UsageError(f"--saved-modules takes refuse, drop or one of the adapters, not {what!r}")

    def _samples(self, prompting: Prompting, adapters: Sequence[OpenAdapter]) -> "ModuleInputs | None":
        """Samples of each module's activations for a method that needs them; None for the others."""
        method, data = self.options.method, self.sources.data
        if METHODS.get(method).needs != "inputs":
            if data or prompting.settings:
                what = "--data" if data else "options about prompts"
                raise UsageError(
                    f"{method} takes no {what}", hint="only regmean uses examples; lora fit learns weights from them"
                )
            return None
        if not data:
            raise UsageError(
                f"--method {method} needs examples, to record the activations of each module",
                hint="give --data FILE.jsonl",
            )
        from lora_cli.models.ref import pin
        from lora_cli.steps.merge.inputs import ModuleInputs, data_of

        settings = self.settings
        ref = pin(
            base_of(settings),
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting,
            progress=self.pool.progress,
        )
        return ModuleInputs(base=ref, files=data_of(data, adapters), seed=settings.seed)


def _weights(spelled: str, chosen: Chosen) -> list[float]:
    """One weight per adapter: its own if given, else from --weights, else the method's default."""
    if chosen.weighted:
        own = [weight for weight in chosen.weights if weight is not None]
        if len(own) < len(chosen.weights):
            raise UsageError(
                "some adapters have a weight and some do not", hint="write ADAPTER=WEIGHT for each of them"
            )
        return own
    return weights_in(spelled, len(chosen.names))


def weights_in(spelled: str, n: int) -> list[float]:
    """The weights of `n` adapters as --weights spells them. UsageError for anything else."""
    if spelled == "average":
        return [1 / n] * n
    if spelled == "sum":
        return [1.0] * n
    try:
        numbers = [float(part) for part in spelled.split(",")]
    except ValueError:
        raise UsageError(f"--weights takes average, sum or numbers with commas, not {spelled!r}") from None
    if len(numbers) != n:
        raise UsageError(f"--weights gives {counted(len(numbers), 'number')} for {counted(n, 'adapter')}")
    return numbers
