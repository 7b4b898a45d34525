"""`lora bake`: an adapter becomes part of its base model."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lora_cli.commands.chosen import expand
from lora_cli.commands.merge import download_plan
from lora_cli.commands.options import Base, Db, DryRun, Force, Json, Out, examples, screen_for, show_output
from lora_cli.errors import UsageError
from lora_cli.screen import Column, Screen, near
from lora_cli.settings import load

_LAYERS = (
    Column("LAYER", "layer", wide=True),
    Column("MODULES", "modules", "right", minor=True),
    Column("NORM", "norm", "right"),
    Column("LOST", "lost", "right"),
    Column("UNCHANGED", "unchanged", "right"),
)
_SHARES = "LOST of the norm of the update, UNCHANGED of the entries: 0.01 is 1 %"


def bake(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER", help="Id of the catalogue or the Hub, folder (also of merge --dense), or - for stdin."
        ),
    ],
    base: Base = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Precision on disk: auto (as the base), fp32, bf16, fp16.")] = (
        "auto"
    ),
    layers: Annotated[bool, typer.Option("--layers", help="Show what each layer lost, in place of the path.")] = False,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    db: Db = None,
    json: Json = False,
) -> None:
    """Add an adapter to its base model, and say how much of it survived.

    Reads and writes the base's safetensors files in blocks, adds in fp32, casts once. A cast to bf16 or fp16 drops what
    is small beside the weight it is added to: how much of the update that was is measured, and above 10 % a warning.
    The result is a model folder with run.json; its path goes to stdout.
    """
    from lora_cli import runs
    from lora_cli.catalogue import Catalogue
    from lora_cli.steps import bake as step
    from lora_cli.steps.gather import gather_update, to_fetch

    screen = screen_for(json)
    settings = load({"base": base, "db": db})
    model = settings.base
    names = expand([adapter])
    if len(names) != 1:
        raise UsageError(f"bake takes one adapter, not {len(names)}", hint="make one of them first: lora merge")
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        if dry_run and model is not None:
            left = to_fetch(catalogue, names, base=settings.base, aliases=settings.base_aliases, announce=screen.say)
            if left or not step.is_here(model):
                waiting = {} if step.is_here(model) else {"fetch_base": model}
                screen.document("lora.bake.plan/1", {"out": None, **download_plan(left), **waiting})
                return
        update, name, parents = gather_update(
            catalogue,
            names[0],
            base=settings.base,
            aliases=settings.base_aliases,
            announce=screen.say,
            progress=progress,
        )
        if model is None:
            raise UsageError("no base model", hint=f"{update.ref.id} is for {name}: give --base, or set LORA_BASE")
        found = step.find_base(model, name=name, announce=screen.say, progress=progress)
        plan = step.plan(update, found, dtype=dtype)
        inputs = {**found.inputs, **parents}
        key = runs.key_of("bake", plan.settings, inputs)
        folder = out or settings.runs / f"bake-{key[:8]}"
        step.demand_apart(plan, folder)
        if dry_run:
            planned = {"out": str(folder), "modules": len(plan.places), "bytes": plan.bytes, **plan.settings}
            screen.document("lora.bake.plan/1", planned)
            return
        for note in plan.notes:
            screen.say(note)
        done = runs.claim(folder, key, force=force)
        with runs.recorded(settings.db, "bake", plan.settings, inputs, folder) as run:
            if done:
                run.take(folder)
                told = f"bake: {near(folder)} is up to date"
            else:
                report = step.bake(plan, folder, run, replace=force, progress=progress)
                told = f"{outcome(run.results)} · {report.seconds:.1f} s · peak {report.peak_bytes / 1e9:.1f} GB"
    if layers and not json:
        screen.rows("lora.bake/1", _LAYERS, run.results["layers"], identity="layer", caption=_SHARES)
    else:
        show_output(screen, "lora.bake/1", folder, run.record())
    screen.say(told)
    if layers and not json:
        screen.say(f"  {near(folder)}")
    warn_of_loss(screen, run.results, step.TOO_MUCH)


def outcome(results: Mapping[str, Any]) -> str:
    """The one line that says what a bake did."""
    modules, layers = len(results["modules"]), len(results["layers"])
    many = f"{modules} module{'s' if modules != 1 else ''} in {layers} layer{'s' if layers != 1 else ''}"
    return (
        f"bake: {many} in {results['precision']} · {_percent(results['lost'])} of the update lost in the cast · "
        f"{_percent(results['unchanged'])} of the weights unchanged"
    )


def warn_of_loss(screen: Screen, results: Mapping[str, Any], limit: float) -> None:
    """Warn where the cast lost more than `limit` of the update, over all or in a layer."""
    worst = max(results["layers"], key=lambda layer: layer["lost"])
    if max(results["lost"], worst["lost"]) <= limit:
        return
    over = sum(layer["lost"] > limit for layer in results["layers"])
    wider = "" if results["precision"] == "fp32" else "bake with --dtype fp32, or "
    screen.warn(
        f"{_percent(results['lost'])} of the update was lost in the cast, more than {100 * limit:.0f} % in {over} of "
        f"{len(results['layers'])} layers, most in {worst['layer']}, {_percent(worst['lost'])}: "
        f"{wider}keep the adapter"
    )


def _percent(share: float) -> str:
    """A share in percent; an error may be more than all of it."""
    return "under 0.01 %" if 0 < share < 1e-4 else f"{100 * share:.2f} %" if share < 0.01 else f"{100 * share:.1f} %"


def register(root: typer.Typer) -> None:
    """Add `lora bake` to the command tree."""
    root.command(
        epilog=examples(
            "lora bake pool/tarn/mirror -o baked",
            "lora bake pool/mossy/double --base base --dtype bf16 --layers",
            "lora bake pool/mossy/double --dtype fp32 --json --dry-run",
        )
    )(bake)
