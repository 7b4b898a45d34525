"""From the user's task files to a planned sequence in a folder, which holds all that its cells need."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from msgspec.structs import replace

from lora_cli.errors import UsageError
from lora_cli.formats.base_names import public_base
from lora_cli.formats.run_record import versions
from lora_cli.merge_options import MergeOptions
from lora_cli.metrics import METRICS
from lora_cli.models.forms import Prompting
from lora_cli.models.ref import pin
from lora_cli.outputs import whole_file
from lora_cli.recipes import EvalOptions, TargetRecipe, TrainOptions
from lora_cli.records import Progress, silent
from lora_cli.settings import Settings, base_of
from lora_cli.steps.evaluate.choices import demand_choices
from lora_cli.steps.merge.plan import checked_options
from lora_cli.steps.study.folder import demand_free, held
from lora_cli.steps.study.plan import Base
from lora_cli.steps.study.sequence.data import DATA_FOLDER, TaskData, given, halves, names_of
from lora_cli.steps.study.sequence.folder import PLAN_FILE, SequenceFolder
from lora_cli.steps.study.sequence.plan import RULES, Plan, Stage, named_rules, plan_text
from lora_cli.steps.task_view import repeated
from lora_cli.task import read_task
from lora_cli.text import counted

BATCH = 16
"""Prompts at once: what stands in one batch moves the last bit of a likelihood, so it must not follow free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """What the user asks for: task files in the order of the sequence, and how LoRAs are trained, merged and scored.

    `tests` are the test data, one file per task; without any, the share `held_out` of each task is kept for testing.
    `rank` is that of the running LoRA, as `lora merge --rank` takes it. Seeds count from the setting `seed` on.
    """

    tasks: Sequence[Path]
    tests: Sequence[Path] = ()
    held_out: float = 0.5
    rules: str = ",".join(RULES)
    seeds: int = 3
    rank: str = "auto"
    lora: TrainOptions = field(default_factory=TrainOptions)
    recipe: TargetRecipe = field(default_factory=TargetRecipe)
    evaluation: EvalOptions = field(default_factory=EvalOptions)

    def planned(
        self,
        settings: Settings,
        prompting: Prompting | None = None,
        out: Path | None = None,
        *,
        announce: Callable[[str], None],
        progress: Progress = silent,
    ) -> "PlannedSequence":
        """The plan in the folder `out`, by default below the setting `runs`; nothing is written.

        A folder that holds the same sequence gets the rules and the seeds that it lacks.

        Raises:
            UsageError: fewer than two tasks, an unknown rule, no base model, options that exclude each other.
            DataError: a malformed task, or one too small for its split.
            OutputError: the folder holds another sequence or something else.
        """
        rules = named_rules(self.rules, self.lora.rank)
        if len(self.tasks) < 2:
            raise UsageError("a sequence needs two tasks or more", hint="give --sequence T1.jsonl,T2.jsonl")
        if self.tests and len(self.tests) != len(self.tasks):
            raise UsageError(f"{counted(len(self.tests), 'test file')} for {counted(len(self.tasks), 'task')}")
        if self.lora.start is not None:
            raise UsageError("a sequence trains fresh LoRAs: leave out --start")
        base_of(settings)
        checked_options(MergeOptions(method="linear", rank=self.rank))
        data = self._data(announce)
        try:
            plan = self._plan(rules, data, settings, prompting or Prompting(), progress)
        except ValueError as error:
            raise UsageError(str(error)) from None
        folder = SequenceFolder(out or settings.runs / f"sequence-{plan.digest}")
        if (folder.path / PLAN_FILE).exists():
            plan = folder.plan.extended(plan)
        else:
            demand_free(folder.path, beside={DATA_FOLDER}, what="sequence")
        return PlannedSequence(folder=folder, plan=plan, data=data)

    def _plan(
        self,
        rules: tuple[str, ...],
        data: Sequence[TaskData],
        settings: Settings,
        prompting: Prompting,
        progress: Progress,
    ) -> Plan:
        base, scored = base_of(settings), replace(self.evaluation, batch_size=self.evaluation.batch_size or BATCH)
        ref = pin(
            base,
            name=public_base(base, settings.base_aliases),
            device=settings.device,
            dtype=settings.dtype,
            prompting=prompting,
            progress=progress,
        )
        return Plan(
            tasks=tuple(Stage(name=one.name, train=one.sha256[0], test=one.sha256[1]) for one in data),
            rules=rules,
            seed=settings.seed,
            seeds=self.seeds,
            rank=self.rank,
            lora=self.lora.settings,
            recipe={name: value for name, value in self.recipe.settings.items() if name != "seed"},
            evaluation=scored.settings,
            shared={"versions": versions(), "base": {**ref.settings, **ref.inputs}},
            base=Base(
                place=base,
                aliases=settings.base_aliases,
                device=ref.device,
                dtype=ref.dtype,
                prompting=asdict(prompting),
                license_policy=settings.license_policy,
            ),
        )

    def _data(self, announce: Callable[[str], None]) -> list[TaskData]:
        """The training and the test data of every task. A test example that is also learnt is announced."""
        names, tasks, tests = names_of(self.tasks), [*map(read_task, self.tasks)], [*map(read_task, self.tests)]
        if METRICS.get(self.evaluation.metric).kind == "choice":
            for task in tests or tasks:
                demand_choices(task.examples, file=task.file.name)
        if not tests:
            return [halves(name, task, self.held_out) for name, task in zip(names, tasks, strict=True)]
        for task, test in zip(tasks, tests, strict=True):
            if both := repeated(task.examples, test.examples):
                announce(
                    f"warning: {both:,} of {counted(len(test.examples), 'example')} of {test.file.name} are learnt too"
                )
        return [given(*one) for one in zip(names, tasks, tests, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSequence:
    """A sequence in its folder; nothing is written yet."""

    folder: SequenceFolder
    plan: Plan
    data: Sequence[TaskData]

    def write(self) -> SequenceFolder:
        """Write the data and the plan, which comes last, beside what another command planned there in the meantime.

        Raises OutputError if the folder cannot be written, or if the other plan differs.
        """
        with held(self.folder.path):
            folder, plan = SequenceFolder(self.folder.path), self.plan
            if (folder.path / PLAN_FILE).exists():
                plan = folder.plan.extended(plan)
            for one in self.data:
                one.write(folder.path)
            with whole_file(folder.path / PLAN_FILE) as file:
                file.write(plan_text(plan))
        return SequenceFolder(folder.path)
