"""`lora fit`: learn from data how much of each adapter a task wants."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.commands.merge import download_plan, named
from lora_cli.commands.options import (
    Adapters,
    Base,
    Db,
    Device,
    DryRun,
    Dtype,
    Energy,
    Force,
    Json,
    Out,
    Rank,
    Seed,
    Selection,
    examples,
    screen_for,
    show_output,
    with_prompting,
)
from lora_cli.commands.task import summary
from lora_cli.errors import UsageError
from lora_cli.models.encode import Prompting
from lora_cli.screen import near
from lora_cli.settings import load
from lora_cli.task import load_task, task_sha256

Data = Annotated[
    Path | None, typer.Option("--data", help="Task file, one JSON example per line.", show_default="the setting")
]


def fit(
    adapters: Adapters = None,
    data: Data = None,
    granularity: Annotated[
        str, typer.Option("--granularity", help="One coefficient per adapter, layer, sublayer, module or rank.")
    ] = "module",
    activation: Annotated[
        str, typer.Option("--activation", help="leaky_relu, linear, softmax, sigmoid or square.")
    ] = "leaky_relu",
    init: Annotated[
        str, typer.Option("--init", help="Start: zero, average (1/N), sqrt (1/sqrt N), uniform or normal.")
    ] = "zero",
    l1: Annotated[float, typer.Option("--l1", help="Weight of an L1 penalty on the coefficients.")] = 0.0,
    target: Annotated[
        str | None, typer.Option("--target", help="An adapter trained on the task itself, to join the others.")
    ] = None,
    control: Annotated[
        str,
        typer.Option("--control", help="Compare with: random (the same fit over noise), target (a new LoRA), or both."),
    ] = "",
    steps: Annotated[int, typer.Option("--steps", help="Steps of the optimiser.")] = 100,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 5e-2,
    batch: Annotated[int, typer.Option("--batch", help="Examples per step.")] = 8,
    rank: Rank = "auto",
    energy: Energy = None,
    selection: Selection = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    db: Db = None,
    json: Json = False,
    *,
    prompting: Prompting,
) -> None:
    """Fit one coefficient per adapter and module to a task, and merge with them.

    80 % of the examples train the coefficients, the others choose the best step. The result is a PEFT folder with
    coefficients.json and run.json; its path goes to stdout. A gain is claimed only where its 95 % interval excludes
    zero. A killed fit goes on where it was when it is run again.
    """
    screen = screen_for(json)
    settings = load(
        {"base": base, "data": data, "device": device, "dtype": dtype, "seed": seed, "runs": None, "db": db}
    )
    file, model = task_file(settings), base_of(settings)
    task, sha256 = load_task(file), task_sha256(file)

    from lora_cli import runs
    from lora_cli.base_model import pin
    from lora_cli.catalogue import Catalogue
    from lora_cli.mixture import Shape
    from lora_cli.steps import fit as step
    from lora_cli.steps import merge
    from lora_cli.steps.descent import Recipe
    from lora_cli.steps.gather import gather, to_fetch
    from lora_cli.steps.task_view import look

    controls = [part.strip() for part in control.split(",") if part.strip()]
    step.demand_sane(l1=l1, controls=controls)
    shape = Shape(granularity=granularity, activation=activation, init=init)  # type: ignore[arg-type]
    recipe = Recipe(steps=steps, lr=lr, batch=batch, seed=settings.seed)
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        names, weights = named(adapters or [], catalogue, settings.base, selection, screen)
        if any(weight is not None for weight in weights):
            raise UsageError("fit learns the weights; name adapters without =WEIGHT")
        everyone = [*names, *([] if target is None else [target])]
        if dry_run and (
            left := to_fetch(
                catalogue, everyone, base=settings.base, aliases=settings.base_aliases, announce=screen.say
            )
        ):
            screen.document("lora.fit.plan/1", {"out": None, **download_plan(left)})
            return
        ref = pin(model, device=settings.device, dtype=settings.dtype, prompting=prompting)
        gathered = gather(
            catalogue,
            everyone,
            base=settings.base,
            aliases=settings.base_aliases,
            announce=screen.say,
            progress=progress,
        )
        joined = "" if target is None else gathered.adapters[-1].ref.pinned
        plan = merge.plan(
            gathered.adapters,
            [1.0] * len(gathered.adapters),
            base=gathered.base,
            skeleton=gathered.skeleton,
            rank=rank,
            energy=energy,
            # A merge computes in float64, which Apple's GPUs do not have.
            device=ref.device if ref.device.startswith("cuda") else "cpu",
        )
        ref = replace(ref, name=gathered.base)
        asked = ref.settings | step.asked(
            plan, shape=shape, l1=l1, recipe=recipe, target=joined, controls=controls, data=file.name
        )
        inputs = {**ref.inputs, **gathered.inputs, file.name: sha256}
        key = runs.key_of("fit", asked, inputs)
        folder = out or settings.runs / f"fit-{key[:8]}"
        if dry_run:
            screen.document("lora.fit.plan/1", {"out": str(folder), "adapters": len(plan.adapters), **asked})
            return
        done = runs.claim(folder, key, force=force)
        if not done:
            screen.say(f"fit: {len(task)} examples of {file.name}, split 80/20 by seed {settings.seed}; base {model}")
        with runs.recorded(settings.db, "fit", asked, inputs, folder) as run:
            if done:
                run.take(folder)
                told = f"fit: {near(folder)} is up to date"
            else:
                run.device = ref.device
                loaded = ref.load()
                screen.say(summary(look(task, loaded.encoder, seed=settings.seed)))
                report = step.fit_and_write(
                    loaded,
                    plan,
                    task,
                    folder,
                    run,
                    target=joined,
                    controls=controls,
                    states=folder.absolute().parent,
                    replace_folder=force,
                    progress=progress,
                    shape=shape,
                    l1=l1,
                    recipe=recipe,
                    task_sha256=sha256,
                )
                told = outcome(report)
    show_output(screen, "lora.fit/1", folder, run.record())
    screen.say(told)


def task_file(settings: Any) -> Path:
    """The task file for fit and train; UsageError when neither flag nor setting names one."""
    if settings.data is None:
        raise UsageError("no task file", hint="give --data FILE.jsonl, or set data in lora.toml")
    file: Path = settings.data
    return file


def base_of(settings: Any) -> str:
    """The base model to load; UsageError when nothing names one."""
    if settings.base is None:
        raise UsageError("no base model", hint="give --base, set LORA_BASE, or set base in lora.toml")
    return str(settings.base)


def outcome(report: Any) -> str:
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


def _verdict(one: Any) -> str:
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
        epilog=examples(
            "lora fit --data task.jsonl",
            "lora fit --data task.jsonl pool/tarn/mirror pool/mossy/double --granularity layer --steps 20 -o fitted",
        )
    )(with_prompting(fit))
