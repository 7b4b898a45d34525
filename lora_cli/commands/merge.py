"""`lora merge`: several adapters become one."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from lora_cli.commands import completing
from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    Command,
    Computed,
    JobOptions,
    Prompts,
    downloads,
    examples,
    show_output,
    show_plan,
    with_flags,
)
from lora_cli.errors import UsageError
from lora_cli.licences import PolicyFlag
from lora_cli.merge_options import METHODS, MergeOptions, MergeSources
from lora_cli.methods import Knob
from lora_cli.names import parent
from lora_cli.options import setting
from lora_cli.screen import near
from lora_cli.text import counted, duration, in_words, percent, size

if TYPE_CHECKING:
    from typer._click import Context

    from lora_cli.checks.unusual import Unusual
    from lora_cli.formats.reader import OpenAdapter
    from lora_cli.steps.merge.stream import MergePlan, MergeReport
    from lora_cli.steps.opened_pool import Pool

SMALL = 0.05


class Licensed(Computed, frozen=True, kw_only=True):
    """`Computed`, and the policy on licences."""

    license_policy: PolicyFlag = None


def merge(
    context: typer.Context,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...",
            help="Ids of the catalogue or the Hub, folders, or - for stdin.",
            show_default="the last selection",
            autocompletion=completing.adapters,
        ),
    ] = None,
    *,
    options: MergeOptions,
    sources: MergeSources,
    job: JobOptions,
    setup: Licensed,
    prompts: Prompts,
) -> None:
    """Merge adapters into one LoRA, by their updates and not factor by factor.

    Ranks and target modules may differ. The result is a PEFT folder with a model card and run.json; its path goes to
    stdout, and every merge reports how much of the update the chosen rank keeps. A method's own options are listed by
    'lora merge -m METHOD --help' and 'lora methods METHOD'.
    """
    screen, settings, prompting = job.screen(), setup.load(), prompts.prompting()
    METHODS.check(options.method or sources.method, options.knobs)
    if sources.locked is not None:
        _demand_no_others(context, sources.locked)

    from lora_cli.steps.merge.request import MergeRequest
    from lora_cli.steps.opened_pool import open_pool

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        request = MergeRequest(pool, expand(adapters or []), options, sources, settings)
        if job.dry_run and (absent := request.absent()):
            from lora_cli.steps.estimate import of_merge, outlines

            found = {"out": None, "method": request.options.method, **downloads(absent)}
            show_plan(screen, "lora.merge.plan/1", found, of_merge(outlines(pool, request.names), request.options))
            return
        merging = request.prepare(prompting, out=job.out)
        plan, folder = merging.plan, merging.job.folder
        if job.dry_run:
            from lora_cli.steps.estimate import of_plan

            found = {"out": str(folder), "modules": len(plan.written), **merging.job.settings}
            show_plan(screen, "lora.merge.plan/1", found, of_plan(plan))
            return
        done = merging.run(settings.db, force=job.force, progress=progress)
        found, measured = _unusual(plan, folder, settings.base or plan.base, pool)
    rows = [{"id": id, **asdict(one)} for id, one in found.items()]
    show_output(screen, "lora.merge/1", folder, done.run.record() | ({"unusual": rows} if rows else {}))
    if done.report is None:
        screen.say(f"merge: {near(folder)} is up to date")
    else:
        for line in (outcome(plan, done.report), *_notes(plan, done.report)):
            screen.say(line)
    for line in (
        *_lines_about(found, measured),
        *(f"  {note}" for note in (merging.unchecked, merging.notice) if note),
    ):
        screen.say(line)
    for line in (*_of_readers(plan, done.run.results), *_to_serve(plan, folder, done.run.results, settings.base)):
        screen.say(line)


def outcome(plan: "MergePlan", report: "MergeReport") -> str:
    """The one-line summary of a merge."""
    from lora_cli.steps.merge.stream import rank_in_words

    n, modules = len(plan.adapters), len(report.modules)
    kept = f"{rank_in_words(plan, report)} · {percent(report.energy)} of the energy kept"
    if plan.options.dense:
        kept = "dense"
    return (
        f"{plan.options.method}: {counted(n, 'adapter')} → {counted(modules, 'module')} · {kept} · "
        f"norm {_times(report.norm / report.mean_norm)} of the adapters' mean · "
        f"{duration(report.seconds)} · peak {size(report.peak_bytes)}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 1e4 else f"{ratio:.2e}"


def _notes(plan: "MergePlan", report: "MergeReport") -> list[str]:
    """Notes on the result: dropped modules, a small result, or less energy than asked for."""
    notes = []
    if dropped := [adapter for adapter in plan.adapters if adapter.saved and adapter is not plan.saved]:
        notes.append(f"  dropped modules saved whole: {in_words([_saved_in(adapter) for adapter in dropped])}")
    if plan.saved is not None:
        notes.append(f"  kept modules saved whole: {_saved_in(plan.saved)}")
    if report.norm < SMALL * report.mean_norm:
        notes.append(
            f"  the result is {percent(report.norm / report.mean_norm)} of the adapters' mean norm: it will change "
            "little; --norm-match or --lambda makes it larger"
        )
    energy = plan.options.energy or 0.0
    if short := [one for one in report.modules if one.energy < energy - 1e-6]:
        notes.append(
            f"  less than --energy {energy:g} is left at this rank in {len(short)} of "
            f"{counted(len(report.modules), 'module')}, {percent(short[0].energy)} in {short[0].module}"
        )
    return notes


def _unusual(plan: "MergePlan", folder: Path, base: str, pool: "Pool") -> tuple[dict[str, "Unusual"], int]:
    """The most unusual value of each adapter and, as "", of the result, beside the measured adapters of the base."""
    from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
    from lora_cli.steps.pool.unusual import beside_measured

    files = {adapter.ref.id: (adapter.files.config, adapter.files.weights) for adapter in plan.adapters}
    if not plan.options.dense:
        files[""] = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    return beside_measured(pool.catalogue, base, files, plan.skeleton)


def _lines_about(found: Mapping[str, "Unusual"], measured: int) -> list[str]:
    """The result, and the adapter that lies furthest from the measured ones."""
    furthest = max((id for id in found if id), key=lambda id: abs(found[id].z), default="")
    shown = [("the result", found.get("")), (furthest, found.get(furthest) if furthest else None)]
    return [
        f"  most unusual of {name} beside {measured:,} measured: {one.in_words()}, z {one.z:.1f}"
        for name, one in shown
        if one is not None
    ]


def _saved_in(adapter: "OpenAdapter") -> str:
    names = list(dict.fromkeys(parent(name) for name in adapter.saved))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} of {adapter.ref.id}"


def _of_readers(plan: "MergePlan", results: Mapping[str, Any]) -> list[str]:
    """Notes on programs that read the result differently from PEFT."""
    from lora_cli.steps.merge.readers import notes

    return [f"  {note}" for note in notes(plan, [module["rank"] for module in results["modules"].values()])]


def _to_serve(plan: "MergePlan", folder: Path, results: Mapping[str, Any], base: str | None) -> list[str]:
    """The command that serves the result with --for, and the modules that the server may not load."""
    target = plan.target
    if target is None:
        return []
    # The declared base may be a folder on another machine.
    model = base or (plan.base if "/" in plan.base else "BASE-MODEL")
    lines = [f"  {target.serve_line(model, folder, results['rank'])}"]
    if plan.zeros:
        lines.append(f"  zeros in {counted(len(plan.zeros), 'module')}: {target.title} fuses them with the others")
    if unsure := target.not_surely_served(plan.written):
        lines.append(f"  whether {target.title} adapts {', '.join(unsure)} depends on the model: not checked")
    if plan.saved is not None:
        lines.append(f"  whether {target.title} loads modules saved whole depends on the model: not checked")
    lines.append(f"  checked by the rules of {target.title}, not on a server")
    return lines


def _demand_no_others(context: typer.Context, file: Path) -> None:
    """UsageError for an option that would contradict the lock in `file`."""
    fixed = {*MergeOptions.flags(), *METHODS.knobs, "weights", "selection", "dedupe", "device"}
    for name in fixed & context.params.keys():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--locked takes every setting from {file}: leave out {_flag(name)}")


class MergeCommand(Command):
    """`lora merge`, whose help lists a method's own options if --method names the method."""

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        for place, word in enumerate(args):
            flag, _, value = word.partition("=")
            if flag in ("-m", "--method"):
                ctx.meta["method"] = value or next(iter(args[place + 1 :]), "")
        return super().parse_args(ctx, args)

    def left_out(self, ctx: "Context") -> Collection[str]:
        method = METHODS.methods.get(ctx.meta.get("method", ""))
        prompts = () if method is not None and method.needs == "inputs" else Prompts.flags()
        return {*METHODS.knobs, *prompts}

    def added(self, ctx: "Context") -> Mapping[str, list[tuple[str, str]]]:
        method = METHODS.methods.get(ctx.meta.get("method", ""))
        knobs = METHODS.knobs_of(method.name) if method is not None else {}
        rows = [(_spelled(knob), f"{knob.help}  [default: {knob.default}]") for knob in knobs.values()]
        return {f"Options of --method {method.name}": rows} if method is not None and rows else {}


def _spelled(knob: Knob) -> str:
    """A method's option with the values that it takes."""
    values = "|".join(knob.choices) or knob.range() or knob.type.__name__
    return f"{_flag(knob.name)} <{values}>"


def _flag(name: str) -> str:
    return f"--{setting(name).replace('_', '-')}"


def with_knobs(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with one option per knob of the merge methods; their values join `options.knobs`."""
    signature = inspect.signature(function)
    knobs = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, owners))
        for name, owners in METHODS.knobs.items()
    ]

    @functools.wraps(function)
    def command(*, options: MergeOptions, **values: object) -> None:
        given = {name: values.pop(name) for name in METHODS.knobs}
        taken = {name: value for name, value in given.items() if value is not None}
        function(options=replace(options, knobs=taken), **values)

    parameters = [*signature.parameters.values(), *knobs]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _option(name: str, owners: dict[str, Knob]) -> object:
    # `MergeCommand.added` lists each option as its method means it; a shell that completes flags shows this help.
    knob = next(iter(owners.values()))
    return Annotated[knob.type | None, typer.Option(_flag(name), help=f"Of {', '.join(owners)}: {knob.help}.")]


def register(root: typer.Typer) -> None:
    """Add `lora merge` to the command tree."""
    root.command(
        cls=MergeCommand,
        epilog=examples(
            "lora merge --method ties",
            "lora merge pool/tarn/mirror=0.7 pool/mossy/double=0.3 -o merged",
            "lora merge pool/tarn/mirror pool/mossy/double -m ties --density 0.4 --dry-run",
        ),
    )(with_flags(with_knobs(merge)))
