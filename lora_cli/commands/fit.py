"""`lora fit`: learn from data how much of each adapter a task wants."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    Adapters,
    Command,
    JobOptions,
    OnTask,
    Prompts,
    Reduction,
    Selection,
    base_of,
    downloads,
    examples,
    screen_for,
    show_output,
    with_flags,
)
from lora_cli.commands.task import tell
from lora_cli.errors import UsageError
from lora_cli.merge_options import MergeOptions
from lora_cli.options import Flag, Options
from lora_cli.recipes import COEFFICIENTS, Recipe, Shape
from lora_cli.screen import near
from lora_cli.task import load_task, task_sha256

if TYPE_CHECKING:
    from lora_cli.runs import Run
    from lora_cli.steps.fit import Comparison, FitReport

CONTROLS = "Comparison"


class FitOptions(Options, frozen=True, kw_only=True):
    """What a fit does besides learning coefficients."""

    l1: Annotated[float, Flag(help="Weight of an L1 penalty on the coefficients.", panel=COEFFICIENTS)] = 0.0
    target: Annotated[
        str | None, Flag(help="An adapter trained on the task itself, to join the others.", panel=CONTROLS)
    ] = None
    control: Annotated[
        str,
        Flag(
            help="Compare with: random (the same fit over noise), target (a new LoRA), or both.",
            metavar="random|target|random,target",
            panel=CONTROLS,
        ),
    ] = ""

    @property
    def controls(self) -> list[str]:
        """The controls by name."""
        return [part.strip() for part in self.control.split(",") if part.strip()]


def fit(
    adapters: Adapters = None,
    selection: Selection = None,
    *,
    setup: OnTask,
    shape: Shape,
    recipe: Recipe,
    options: FitOptions,
    reduction: Reduction,
    job: JobOptions,
    prompts: Prompts,
) -> None:
    """Fit one coefficient per adapter and module to a task, and merge with them.

    80 % of the examples train the coefficients, the others choose the best step. The result is a PEFT folder with
    coefficients.json and run.json; its path goes to stdout. A gain is claimed only where its 95 % interval excludes
    zero. A killed fit goes on where it was when it is run again.
    """
    screen, settings = screen_for(job.json), setup.load()
    file, model = setup.task(settings), base_of(settings)
    task, sha256 = load_task(file), task_sha256(file)

    from lora_cli.base_model import pin
    from lora_cli.steps import fit as step
    from lora_cli.steps import merge
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.recorded import Job, run_once
    from lora_cli.steps.task_view import look

    step.demand_sane(l1=options.l1, controls=options.controls)
    recipe = replace(recipe, seed=settings.seed)
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        chosen = pool.chosen(expand(adapters or []), selection)
        if chosen.weighted:
            raise UsageError("fit learns the weights; name adapters without =WEIGHT")
        names = [*chosen.names, *([] if options.target is None else [options.target])]
        if job.dry_run and (left := pool.absent(names)):
            screen.document("lora.fit.plan/1", {"out": None, **downloads(left)})
            return
        ref = pin(model, device=settings.device, dtype=settings.dtype, prompting=prompts.prompting())
        gathered = pool.adapters(names)
        joined = "" if options.target is None else gathered.adapters[-1].ref.pinned
        # A merge computes in float64, which Apple's GPUs do not have.
        device = ref.device if ref.device.startswith("cuda") else "cpu"
        plan = merge.plan(
            gathered.adapters,
            [1.0] * len(gathered.adapters),
            MergeOptions(method="linear", rank=reduction.rank, energy=reduction.energy, device=device),
            base=gathered.base,
            skeleton=gathered.skeleton,
        )
        ref = dataclasses.replace(ref, name=gathered.base)
        learning: dict[str, Any] = {"shape": shape, "l1": options.l1, "recipe": recipe}
        asked = ref.settings | step.asked(plan, **learning, target=joined, controls=options.controls, data=file.name)
        inputs = {**ref.inputs, **gathered.inputs, file.name: sha256}
        fitting = Job(verb="fit", settings=asked, inputs=inputs, runs=settings.runs, out=job.out, device=ref.device)
        if job.dry_run:
            found = {"out": str(fitting.folder), "adapters": len(plan.adapters), **asked}
            screen.document("lora.fit.plan/1", found)
            return

        def work(run: "Run") -> "FitReport":
            screen.say(f"fit: {len(task)} examples of {file.name}, split 80/20 by seed {settings.seed}; base {model}")
            loaded = ref.load()
            tell(screen, look(task, loaded.encoder, seed=settings.seed))
            return step.fit_and_write(
                loaded,
                plan,
                task,
                fitting.folder,
                run,
                target=joined,
                controls=options.controls,
                states=fitting.folder.absolute().parent,
                replace_folder=job.force,
                progress=progress,
                task_sha256=sha256,
                **learning,
            )

        done = run_once(settings.db, fitting, work, force=job.force)
    show_output(screen, "lora.fit/1", fitting.folder, done.run.record())
    screen.say(f"fit: {near(fitting.folder)} is up to date" if done.report is None else outcome(done.report))


def outcome(report: "FitReport") -> str:
    """The one line that says what a fit did, and no more than its intervals support."""
    base, *controls = report.comparisons
    after = report.fit.learnt.loss_after
    parts = [f"fit: validation loss {base.loss:.3f} → {after:.3f}"]
    if abs(report.loss_merged - after) > 0.005 * after:
        parts.append(f"{report.loss_merged:.3f} after reduction to rank {report.merge.ranks[1]}")
    parts += [f"{_NAMES[one.against]} {one.loss:.3f}" for one in controls]
    parts += [_verdict(one) for one in controls or [base]]
    parts.append(f"best at step {report.fit.learnt.best_step}, {report.fit.n_validation} validation examples")
    return " · ".join(parts)


_NAMES = {"base": "base", "random": "random-LoRA control", "target": "target LoRA"}
_SHORT = {"base": "the base", "random": "the control", "target": "the target LoRA"}


def _verdict(one: "Comparison") -> str:
    difference = one.difference
    if one.gain:
        return (
            f"gain over {_SHORT[one.against]} {-difference.delta:.3f} [{-difference.high:.3f}, {-difference.low:.3f}]"
        )
    if difference.low > 0:
        return (
            f"worse than {_SHORT[one.against]} by {difference.delta:.3f} [{difference.low:.3f}, {difference.high:.3f}]"
        )
    return f"no measurable gain over {_SHORT[one.against]}"


def register(root: typer.Typer) -> None:
    """Add `lora fit` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora fit --data task.jsonl",
            "lora fit --data task.jsonl pool/tarn/mirror pool/mossy/double --granularity layer --steps 20 -o fitted",
        ),
    )(with_flags(fit))
