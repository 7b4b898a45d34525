"""`lora merge`: several adapters become one."""

import inspect
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    Base,
    Db,
    DryRun,
    Energy,
    Force,
    Json,
    Out,
    Rank,
    Selection,
    examples,
    screen_for,
    show_output,
)
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.methods import Knob, MethodFolder
from lora_cli.screen import Screen, near, percent
from lora_cli.settings import folder_of, load

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")


def merge(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...",
            help="Ids of the catalogue or the Hub, folders, or - for stdin.",
            show_default="the last selection",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", "-m", help=f"How: {', '.join(METHODS.methods)}.", autocompletion=lambda: [*METHODS.methods]
        ),
    ] = "linear",
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", help="average (1/N each), sum (1 each), or numbers with commas.", show_default="average"
        ),
    ] = None,
    selection: Selection = None,
    rank: Rank = "auto",
    energy: Energy = None,
    scaling: Annotated[float, typer.Option("--lambda", help="Factor on the whole result.")] = 1.0,
    missing: Annotated[
        str,
        typer.Option(
            "--missing", help="Where an adapter lacks a module: zero counts it as zero, renorm leaves it out."
        ),
    ] = "zero",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Precision on disk: auto (as the parents), fp32, bf16, fp16.")
    ] = "auto",
    base: Base = None,
    out: Out = None,
    force: Force = False,
    dry_run: DryRun = False,
    db: Db = None,
    json: Json = False,
    **knobs: Any,
) -> None:
    """Merge adapters into one LoRA, on the updates themselves and not on A and B apart.

    Ranks and target modules may differ. The result is a PEFT folder with a model card and run.json; its path goes to
    stdout, and how much of the merged update fits into the chosen rank is always said.
    """
    from lora_cli import runs
    from lora_cli.catalogue import Catalogue
    from lora_cli.steps import merge as step
    from lora_cli.steps.gather import gather, to_fetch

    screen = screen_for(json)
    settings = load({"base": base, "db": db})
    given = {name: value for name, value in knobs.items() if value is not None}
    step.METHODS.check(method, given)
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        names, own_weights = named(adapters or [], catalogue, settings.base, selection, screen)
        numbers = _weights(weights, own_weights)
        if dry_run and (
            left := to_fetch(catalogue, names, base=settings.base, aliases=settings.base_aliases, announce=screen.say)
        ):
            screen.document("lora.merge.plan/1", {"out": None, "method": method, **download_plan(left)})
            return
        gathered = gather(
            catalogue,
            names,
            base=settings.base,
            aliases=settings.base_aliases,
            announce=screen.say,
            progress=progress,
        )
        plan = step.plan(
            gathered.adapters,
            numbers,
            base=gathered.base,
            method=method,
            knobs=given,
            rank=rank,
            energy=energy,
            scaling=scaling,
            missing=missing,
            dtype=dtype,
        )
        key = runs.key_of("merge", plan.settings, gathered.inputs)
        folder = out or settings.runs / f"merge-{method}-{key[:8]}"
        if dry_run:
            screen.document("lora.merge.plan/1", {"out": str(folder), "modules": len(plan.modules), **plan.settings})
            return
        done = runs.claim(folder, key, force=force)
        with runs.recorded(settings.db, "merge", plan.settings, gathered.inputs, folder) as run:
            if done:
                run.take(folder)
                told = f"merge: {near(folder)} is up to date"
            else:
                told = outcome(plan, step.merge(plan, folder, run, replace=force, progress=progress))
    show_output(screen, "lora.merge/1", folder, run.record())
    screen.say(told)


def named(
    arguments: list[str], catalogue: Any, base: str | None, selection: str | None, screen: Screen
) -> tuple[list[str], list[float | None]]:
    """The adapters meant by ADAPTER[=WEIGHT] arguments (or by none), and the weight of each that was given one."""
    from lora_cli.steps.gather import default_names

    if not arguments:
        names, note = default_names(catalogue, base, selection)
        screen.say(note)
        return names, [None] * len(names)
    if selection is not None:
        raise UsageError("name adapters or a --selection, not both")
    pairs = [_split(argument) for argument in expand(arguments)]
    if not pairs:
        raise NothingMatched("no adapters on stdin")
    return [name for name, _ in pairs], [weight for _, weight in pairs]


def download_plan(missing: Sequence[Any]) -> dict[str, Any]:
    """What a command would have to download before it can plan further."""
    return {"fetch": [row.ref.pinned for row in missing], "fetch_bytes": sum(row.bytes for row in missing)}


def outcome(plan: Any, report: Any) -> str:
    """The one line that says what a merge did."""
    low, high = report.ranks
    rank = f"rank {high}" if low == high else f"rank {low} to {high}"
    many = f"{len(plan.adapters)} adapter{'s' if len(plan.adapters) != 1 else ''}"
    return (
        f"{plan.method}: {many} → {rank} · {len(report.modules)} modules · "
        f"{percent(report.energy)} of the energy kept · {report.seconds:.1f} s · peak {report.peak_bytes / 1e9:.1f} GB"
    )


def _split(argument: str) -> tuple[str, float | None]:
    name, equals, weight = argument.rpartition("=")
    if not equals or folder_of(argument) is not None:
        return argument, None
    try:
        return name, float(weight)
    except ValueError:
        raise UsageError(f"{argument}: the weight after = is no number") from None


def _weights(spelled: str | None, own: list[float | None]) -> list[float]:
    """One weight per adapter, from --weights or from ADAPTER=WEIGHT."""
    if any(weight is not None for weight in own):
        if spelled is not None:
            raise UsageError("give weights by --weights or by ADAPTER=WEIGHT, not both")
        if any(weight is None for weight in own):
            raise UsageError(
                "some adapters have a weight and some do not", hint="write ADAPTER=WEIGHT for each of them"
            )
        return [weight for weight in own if weight is not None]
    if spelled in (None, "average"):
        return [1 / len(own)] * len(own)
    if spelled == "sum":
        return [1.0] * len(own)
    try:
        numbers = [float(part) for part in spelled.split(",")]
    except ValueError:
        raise UsageError(f"--weights is average, sum or numbers with commas, not {spelled!r}") from None
    if len(numbers) != len(own):
        raise UsageError(f"--weights gives {len(numbers)} numbers for {len(own)} adapters")
    return numbers


def with_knobs(function: Any) -> Any:
    """`function` with one option per knob of the merge methods, in place of its **knobs."""
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, owners in METHODS.knobs.items():
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, owners))
        )
    function.__signature__ = signature.replace(parameters=parameters)
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    return function


def _option(name: str, owners: dict[str, Knob]) -> Any:
    knob = next(iter(owners.values()))
    choices = f" ({', '.join(knob.choices)})" if knob.choices else f" ({knob.range()})" if knob.range() else ""
    defaults = ", ".join(f"{one.default} for {method}" for method, one in owners.items())
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=f"For {', '.join(owners)}: {knob.help}{choices}.", show_default=defaults
    )
    return Annotated[knob.type | None, option]


def register(root: typer.Typer) -> None:
    """Add `lora merge` to the command tree."""
    root.command(
        epilog=examples(
            "lora merge --method ties",
            "lora merge pool/tarn/mirror=0.7 pool/mossy/double=0.3 -o merged",
            "lora merge pool/tarn/mirror pool/mossy/double --method ties --density 0.4 --rank 16 --dry-run",
        )
    )(with_knobs(merge))
