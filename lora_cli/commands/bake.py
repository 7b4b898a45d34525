"""`lora bake`: an adapter becomes part of its base model."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from lora_cli.columns import Column
from lora_cli.commands import completing
from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    OUTPUT,
    Catalogued,
    Command,
    JobOptions,
    downloads,
    examples,
    show_output,
    show_plan,
    with_flags,
)
from lora_cli.errors import UsageError
from lora_cli.licences import PolicyFlag
from lora_cli.options import Flag, Options
from lora_cli.precision import Precision
from lora_cli.screen import Screen, near
from lora_cli.text import counted, duration, percent, size

_LAYERS = (
    Column("LAYER", "layer", wide=True),
    Column("MODULES", "modules", "right", minor=True),
    Column("NORM", "norm", "right"),
    Column("LOST", "lost", "right"),
    Column("UNCHANGED", "unchanged", "right"),
)
_SHARES = "LOST of the norm of the update, UNCHANGED of the entries: 0.01 is 1 %"


class Licensed(Catalogued, frozen=True, kw_only=True):
    """`Catalogued`, and the policy on licences."""

    license_policy: PolicyFlag = None


class BakeOptions(Options, frozen=True, kw_only=True):
    """The output options of a bake."""

    dtype: Annotated[Precision, Flag(help="Precision on disk; auto keeps the base's.", panel=OUTPUT)] = "auto"


def bake(
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="Id of the catalogue or the Hub, folder (also of merge --dense), or - for stdin.",
            autocompletion=completing.adapters,
        ),
    ],
    layers: Annotated[
        bool, typer.Option("--layers", help="Show the loss of each layer, in place of the path.")
    ] = False,
    *,
    setup: Licensed,
    options: BakeOptions,
    job: JobOptions,
) -> None:
    """Add an adapter to its base model, and report how much of the update survived.

    Reads and writes the base's safetensors files in blocks, adds in fp32, casts once. A cast to bf16 or fp16 drops
    values that are small beside the weight: the share of the update lost is measured, and above 10 % a warning is
    printed. The result is a model folder with run.json; its path goes to stdout.
    """
    from lora_cli.steps.bake.bake import TOO_MUCH
    from lora_cli.steps.bake.request import BakeRequest
    from lora_cli.steps.opened_pool import open_pool

    screen, settings = job.screen(), setup.load()
    names = expand([adapter])
    if len(names) != 1:
        raise UsageError(f"bake takes one adapter, not {len(names)}", hint="merge them into one first: lora merge")
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        request = BakeRequest(pool, names[0], settings)
        absent, base = request.absent() if job.dry_run else ([], "")
        if absent or base:
            from lora_cli.steps.estimate import of_bake, outlines

            waiting = {"fetch_base": base} if base else {}
            needs = None if base else of_bake(request.base().checkpoint, outlines(pool, names)[0], options.dtype)
            show_plan(screen, "lora.bake.plan/1", {"out": None, **downloads(absent), **waiting}, needs)
            return
        baking = request.prepare(dtype=options.dtype, out=job.out)
        plan, folder = baking.plan, baking.job.folder
        if job.dry_run:
            from lora_cli.steps.estimate import Outline, of_bake

            planned = {"out": str(folder), "modules": len(plan.places), "bytes": plan.bytes, **plan.settings}
            needs = of_bake(plan.base.checkpoint, Outline.of_open(plan.adapter), options.dtype)
            show_plan(screen, "lora.bake.plan/1", planned, needs)
            return
        for note in plan.notes:
            screen.say(note)
        done = baking.run(settings.db, force=job.force, progress=progress)
    results, report = done.run.results, done.report
    table = layers and not job.json
    if table:
        screen.rows("lora.bake/1", _LAYERS, results["layers"], identity="layer", caption=_SHARES)
    else:
        show_output(screen, "lora.bake/1", folder, done.run.record())
    if report is None:
        screen.say(f"bake: {near(folder)} is up to date")
    else:
        screen.say(f"{outcome(results)} · {duration(report.seconds)} · peak {size(report.peak_bytes)}")
    for more in filter(None, [near(folder) if table else "", baking.notice]):
        screen.say(f"  {more}")
    warn_of_loss(screen, results, TOO_MUCH)


def outcome(results: Mapping[str, Any]) -> str:
    """The one-line summary of a bake."""
    modules, layers = len(results["modules"]), len(results["layers"])
    many = f"{counted(modules, 'module')} in {counted(layers, 'layer')}"
    return (
        f"bake: {many} in {results['precision']} · {percent(results['lost'])} of the update lost in the cast · "
        f"{percent(results['unchanged'])} of the weights unchanged"
    )


def warn_of_loss(screen: Screen, results: Mapping[str, Any], limit: float) -> None:
    """Warn if the cast lost more than `limit` of the update, over all or in a layer."""
    worst = max(results["layers"], key=lambda layer: layer["lost"])
    if max(results["lost"], worst["lost"]) <= limit:
        return
    wider = "" if results["precision"] == "fp32" else "use --dtype fp32, or "
    screen.warn(
        f"rounding to {results['precision']} lost {percent(results['lost'])} of the adapter (worst layer "
        f"{worst['layer']}: {percent(worst['lost'])}): {wider}serve the adapter unbaked"
    )


def register(root: typer.Typer) -> None:
    """Add `lora bake` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora bake pool/tarn/mirror -o baked",
            "lora bake pool/mossy/double --base base --dtype bf16 --layers",
            "lora bake pool/mossy/double --dtype fp32 --json --dry-run",
        ),
    )(with_flags(bake))
