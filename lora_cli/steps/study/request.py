"""From the user's request for a study to a plan in a folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import DataError, NothingMatched, OutputError, UsageError
from lora_cli.files import read_given
from lora_cli.formats.base_names import public_base
from lora_cli.formats.run_record import versions
from lora_cli.metrics import METRICS
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.names import unpinned
from lora_cli.outputs import whole_file
from lora_cli.recipes import EvalOptions, SelectOptions, TrialOptions
from lora_cli.records import Adapter, Example, Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.choices import demand_choices
from lora_cli.steps.merge.request import weights_in
from lora_cli.steps.pool.lookup import names_of
from lora_cli.steps.select.request import SelectRequest
from lora_cli.steps.study.folder import STUDY_FILE, StudyFolder, demand_free, held, write_plan
from lora_cli.steps.study.plan import BEST, Base, Cell, Grid, Study, completed, demand_countable, study_text
from lora_cli.steps.study.ways import rule_of, way_of
from lora_cli.steps.task_view import repeated
from lora_cli.study_options import StudyOptions
from lora_cli.task import Task, demand_two, read_task, split
from lora_cli.text import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A study in its folder, and the cells that were asked for now; nothing is written yet."""

    folder: StudyFolder
    study: Study
    cells: list[Cell]
    train: Sequence[Example]
    test: Sequence[Example]
    parts: tuple[bytes, bytes]
    candidates: Sequence[Adapter]
    is_new: bool

    def write(self) -> None:
        """Write the folder's plan, beside what another command planned there in the meantime.

        Raises OutputError if it cannot be written, or if the other plan differs.
        """
        with held(self.folder.path):
            if not (self.folder.path / STUDY_FILE).exists():
                write_plan(self.folder, self.study, self.candidates, *self.parts)
            else:
                there = StudyFolder(self.folder.path).study
                whole = replace(there.extended(self.study), base=self.study.base)
                if study_text(whole) != study_text(there):
                    with whole_file(self.folder.path / STUDY_FILE) as file:
                        file.write(study_text(whole))
        self.folder.__dict__.pop("study", None)  # it is read again where it is needed


class StudyRequest:
    """The user's request for a study on the data of the settings.

    Raises:
        UsageError: no base, no data, an unknown system or pool, or options that one does not take.
        DataError: malformed data, or too few examples for their parts.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        settings: Settings,
        options: StudyOptions,
        prompting: Prompting | None = None,
        *,
        announce: Callable[[str], None],
        progress: Progress = silent,
    ) -> None:
        self.catalogue, self.settings, self.options = catalogue, settings, options
        self.prompting, self.announce, self.progress = prompting or Prompting(), announce, progress
        self.base = base_of(settings)
        if settings.data is None:
            raise UsageError("no task file", hint="give --data FILE.jsonl, or set data in lora.toml")
        self.train, self.test, self.parts = parts_of(settings.data, settings.test, options.held_out)
        if METRICS.get(options.metric).kind == "choice":
            demand_choices(self.test, file=(settings.test or settings.data).name)
        if shared := repeated(self.train, self.test):
            announce(f"warning: {counted(shared, 'example')} of the test data are in the data too, which flatters")
        names, pools = options.named_systems, options.named_pools
        self.systems = {name: way_of(name, options) for name in names}
        if not names:
            raise UsageError("no systems to compare", hint="give --systems base,average,…")
        if not pools and (without := [name for name, way in self.systems.items() if way.pooled]):
            raise UsageError(f"{without[0]} takes the adapters of a pool", hint="give --pools random,…")
        rules = {name: rule_of(name, options, self._selected) for name in pools}
        self.pools = rules if any(way.pooled for way in self.systems.values()) else {}
        self.grid = Grid(systems=tuple(names), pools=tuple(self.pools), seed=settings.seed, seeds=options.seeds)
        self._demand_weights()
        try:
            demand_countable([self.grid])
        except ValueError as error:
            raise UsageError(str(error), hint="give fewer --seeds") from None

    def _demand_weights(self) -> None:
        """UsageError for a merge whose weights are no weights, or are not as many as a pool has adapters."""
        for name, way in self.systems.items():
            if way.kind == "merge" and way.sources.weights is not None:
                for pool, rule in self.pools.items():
                    if not rule.noise:  # merges are not made of noise
                        many = (rule.options.k if rule.select else len(rule.names)) + way.target
                        try:
                            weights_in(way.sources.weights, many)
                        except UsageError as error:
                            message = error.message.removeprefix("--")
                            raise UsageError(f"system {name} on pool {pool}: {message}", hint=error.hint) from None

    def _demand_conditions(self) -> None:
        """An error for a pool of conditions that no catalogue can answer, or that no usable adapter fulfils."""
        for name, rule in self.pools.items():
            if rule.select and rule.options.where:
                where = (*self.options.where, *rule.options.where)
                try:
                    found = self.catalogue.candidates(where=where, base=self.settings.base).pinned
                except UsageError as error:
                    raise UsageError(f"pool {name}: {error.message}", hint=error.hint) from None
                if not found:
                    raise NothingMatched(f"pool {name}: no usable adapter of {self.base} fulfils its conditions")

    def planned(self, out: Path | None = None) -> Planned:
        """The plan in the folder `out`, by default below the setting `runs`. A study there is extended.

        Candidates are those of the first plan in the folder: a sync in between does not change a study.

        Raises:
            OutputError: the folder holds something else, or a study that differs.
            NothingMatched: no usable adapter, or a selection with one that is not usable. Else as `pin` does.
        """
        study = self._study()
        folder = StudyFolder(out or self.settings.runs / f"study-{_digest(study)}")
        if (folder.path / STUDY_FILE).exists():
            earlier = folder.study
            if self._takes_adapters and next(folder.candidates(), None) is None:
                raise OutputError(
                    f"{folder.path}: planned when there was no usable adapter, and {self._takes_adapters} takes some",
                    hint="choose another folder with -o",
                )
            same = {"candidates": earlier.shared["candidates"]}
            study = replace(study, shared={**study.shared, **same})
            whole = replace(earlier.extended(study), base=study.base)
            return self._in(folder, whole, ())
        demand_free(folder.path)
        study = replace(study, shared={**study.shared, "candidates": _sha256("\n".join(self._pinned).encode())})
        most = max((rule.options.k for rule in study.pools.values() if rule.select), default=0)
        if 0 < len(self._pinned) <= most:
            held = counted(len(self._pinned), "usable adapter")
            self.announce(f"note: {held} in all, so that every pool of {most} holds the same")
        candidates = [self.catalogue.get(unpinned(pinned), base=self.settings.base) for pinned in self._pinned]
        return self._in(folder, study, candidates, is_new=True)

    def _in(self, folder: StudyFolder, study: Study, candidates: Sequence[Adapter], *, is_new: bool = False) -> Planned:
        """A plan of this request's cells in a folder."""
        return Planned(
            folder=folder,
            study=study,
            cells=study.cells(self.grid),
            train=self.train,
            test=self.test,
            parts=self.parts,
            candidates=candidates,
            is_new=is_new,
        )

    def _study(self) -> Study:
        """The study without its candidates."""
        settings, options = self.settings, self.options
        known = names_of(self.catalogue, self.base, settings.base_aliases)
        ref = pin(
            self.base,
            name=public_base(self.base, known),
            device=settings.device,
            dtype=settings.dtype,
            prompting=self.prompting,
            progress=self.progress,
        )
        judged = {"metric": options.metric, **_knobs_of(options)}
        evaluation = {**judged, "max_new_tokens": options.max_new_tokens, "batch_size": options.batch_size}
        systems, pools = dict(self.systems), dict(self.pools)
        for name in completed(systems, pools) - {*systems, *pools}:
            if name == BEST:
                pools[name] = rule_of(name, options, {})
            else:
                systems[name] = way_of(name, options)
        shared = {
            "base": ref.name,
            "base_version": ref.version,
            "device": ref.device.partition(":")[0],
            "dtype": ref.dtype,
            "prompting": ref.prompting.settings,
            "data": _sha256(self.parts[0]),
            "test": _sha256(self.parts[1]),
            "evaluation": evaluation,
            "versions": versions(),
        }
        base = Base(
            place=self.base,
            aliases=known,
            device=ref.device,
            dtype=ref.dtype,
            prompting=asdict(self.prompting),
            license_policy=settings.license_policy,
        )
        return Study(shared=shared, base=base, evaluation=evaluation, systems=systems, pools=pools, grids=(self.grid,))

    @property
    def _takes_adapters(self) -> str:
        """The first system that takes adapters, "" for none."""
        return next((name for name, way in self.systems.items() if way.pooled or way.kind == "single"), "")

    @cached_property
    def _pinned(self) -> tuple[str, ...]:
        """The adapters that pools are chosen from, as `id@commit`: also for systems that are added later."""
        found = self.catalogue.candidates(where=self.options.where, base=self.settings.base)
        if not self._takes_adapters:
            return tuple(sorted(found.pinned))
        self._demand_conditions()
        if not found.pinned:
            raise NothingMatched(f"no usable adapter of {self.base}", hint="see lora pool list, or run lora pool sync")
        usable = {*found.pinned}
        for name, rule in self.pools.items():
            if lost := [pinned for pinned in rule.names if pinned not in usable]:
                raise NothingMatched(f"pool {name}: {unpinned(lost[0])} is not among the usable adapters of the study")
        return tuple(sorted(found.pinned))

    @cached_property
    def _selected(self) -> dict[str, tuple[str, ...]]:
        """By pool, the adapters that are known now: of stored selections, and by scores that the catalogue holds."""
        found = {}
        for name in self.options.named_pools:
            own = dict(self.options.own_pools.get(name, {}))
            own.pop("noise", None)
            if "selection" in own:
                found[name] = self._of_selection(str(own["selection"]))
            elif "task" in own:
                found[name] = self._by_stored(own)
        return found

    def _of_selection(self, name: str) -> tuple[str, ...]:
        selection = self.catalogue.selections.last(name)
        if selection is None:
            raise NothingMatched(f"no selection called {name!r}", hint="see lora pool selections")
        return tuple(ref.pinned for ref in selection.refs)

    def _by_stored(self, own: Mapping[str, Any]) -> tuple[str, ...]:
        """The best adapters by stored scores. NothingMatched where there are none on that task."""
        judging = TrialOptions.of(**{name: value for name, value in own.items() if name == "metric"})
        rest = {name: value for name, value in own.items() if name != "metric"}
        options = SelectOptions.of(**{"by": "evaluation", "k": self.options.k, **rest})
        request = SelectRequest(self.catalogue, self.settings, options, judging, announce=self.announce)
        return tuple(row.ref.pinned for row, _ in request.chosen())


def parts_of(
    data: Path, test: Path | None, held_out: float
) -> tuple[list[Example], list[Example], tuple[bytes, bytes]]:
    """The examples to learn from and those to test on, and the bytes of the two files of the study.

    Without test data `held_out` of the examples, drawn by a hash of their ids, are kept for testing; every line gets
    its example's id.

    Raises DataError for too few examples, or malformed ones.
    """
    task = read_task(data)
    if test is not None:
        demand_two(task.examples)
        return task.examples, read_task(test).examples, (read_given(data), read_given(test))
    try:
        training, tested = split(task.examples, fraction=held_out)
        demand_two(training)
    except DataError:
        raise DataError(
            f"{data}: {counted(len(task.examples), 'example')} cannot be split into data and test data",
            hint="give at least three examples, or --test FILE.jsonl",
        ) from None
    return training, tested, (_lines(task, training), _lines(task, tested))


def _lines(task: Task, examples: Sequence[Example]) -> bytes:
    """The lines of some examples of a task, each with its id."""
    wanted = {example.id for example in examples}
    lines = read_given(task.file).decode("utf-8-sig").split("\n")
    found = [
        json.dumps({**json.loads(line), "id": example.id}, ensure_ascii=False) + "\n"
        for example, line in zip(task.examples, lines, strict=False)
        if example.id in wanted
    ]
    return "".join(found).encode()


def _knobs_of(options: StudyOptions) -> dict[str, Any]:
    """The knobs of the metric. UsageError for one that it lacks."""
    knobs = {
        knob: getattr(options, knob)
        for metrics in METRICS.knobs.values()
        for one in metrics.values()
        for knob in (one.name,)
    }
    return EvalOptions(metric=options.metric, **knobs).knobs


def _digest(study: Study) -> str:
    """What tells one study's folder from others': all but the candidates and the grid."""
    return _sha256(study_text(replace(study, grids=(), base=replace(study.base, place="", aliases=()))))[:8]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
