"""`lora merge`: several adapters become one."""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    Command,
    Computed,
    JobOptions,
    Prompts,
    base_of,
    downloads,
    examples,
    screen_for,
    show_output,
    with_flags,
)
from lora_cli.errors import Refused, UsageError
from lora_cli.merge_options import METHODS, WHAT, MergeOptions
from lora_cli.methods import Knob
from lora_cli.models.forms import Prompting
from lora_cli.options import Flag, Options, setting
from lora_cli.screen import near, percent
from lora_cli.settings import Settings

if TYPE_CHECKING:
    from lora_cli.adapters.reader import OpenAdapter
    from lora_cli.records import Coefficients
    from lora_cli.runs import Run
    from lora_cli.steps.inputs import ModuleInputs
    from lora_cli.steps.lock import Lock
    from lora_cli.steps.merge import MergePlan, MergeReport
    from lora_cli.steps.opened_pool import Chosen, Gathered, Pool

SMALL = 0.05


class Sources(Options, frozen=True, kw_only=True):
    """Where the adapters of a merge, and the weight of each, come from."""

    weights: Annotated[
        str | None,
        Flag(
            help="average (1/N each), sum (1 each), or numbers with commas.",
            default="the method's, mostly average",
            panel=WHAT,
        ),
    ] = None
    selection: Annotated[str | None, Flag(help="A selection's name, in place of ids.", panel=WHAT)] = None
    dedupe: Annotated[
        float | None,
        Flag(
            help="Skip near copies: adapters whose cosine with an earlier one is at least this, such as 0.95.",
            panel=WHAT,
        ),
    ] = None
    coef: Annotated[
        Path | None, Flag(help="Learnt coefficients: the coefficients.json that lora fit wrote.", panel=WHAT)
    ] = None
    data: Annotated[
        tuple[str, ...],
        Flag(
            help="For regmean: a task file, to record the activations of each module; repeat with ADAPTER= for own "
            "ones.",
            metavar="[ADAPTER=]FILE",
            panel=WHAT,
        ),
    ] = ()
    locked: Annotated[Path | None, Flag(help="Rebuild the merge of this run.json, byte for byte.", panel=WHAT)] = None


def merge(
    context: typer.Context,
    adapters: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ADAPTER[=WEIGHT]...",
            help="Ids of the catalogue or the Hub, folders, or - for stdin.",
            show_default="the last selection",
        ),
    ] = None,
    *,
    options: MergeOptions,
    sources: Sources,
    job: JobOptions,
    setup: Computed,
    prompts: Prompts,
) -> None:
    """Merge adapters into one LoRA, on the updates themselves and not on A and B apart.

    Ranks and target modules may differ. The result is a PEFT folder with a model card and run.json; its path goes to
    stdout, and every merge reports how much of the update the chosen rank keeps. A method's own options are listed by
    'lora merge -m METHOD --help' and 'lora methods METHOD'.
    """
    screen, settings = screen_for(job.json), setup.load()
    given = _given(context, options, sources, settings.device)

    from lora_cli.steps import lock as locking
    from lora_cli.steps import merge as step
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.recorded import Job, run_once

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        chosen = pool.chosen(expand(adapters or []), sources.selection, given.parents)
        default = METHODS.get(given.options.method).weights
        weights = [] if given.parents else _weights(sources.weights or default, chosen)
        names = chosen.names
        if given.lock is not None and not adapters:
            names = tuple(locking.where_parents_are(given.lock, pool.catalogue))
        if job.dry_run and (left := pool.absent(names)):
            plan_of_downloads = {"out": None, "method": given.options.method, **downloads(left)}
            screen.document("lora.merge.plan/1", plan_of_downloads)
            return
        gathered = pool.adapters(names, whole=given.options.saved_modules != "refuse")
        team = _team(given, gathered, weights)
        if sources.dedupe is not None:
            average = not chosen.weighted and (sources.weights or default) == "average"
            team = _without_copies(team, sources.dedupe, average, pool)
        for ids in step.identical(team.adapters, team.inputs):
            screen.say(f"{_and(ids)} are byte-identical")
        samples = _samples(settings, given.options.method, sources.data, prompts.prompting(), team.adapters)
        plan = step.plan(
            team.adapters,
            team.weights,
            given.options if given.lock else _with_holder(given.options, names, gathered.adapters),
            base=gathered.base,
            skeleton=gathered.skeleton,
            coefficients=given.coefficients,
            inputs=samples,
        )
        asked = plan.settings | (samples.settings if samples is not None else {})
        if given.lock is not None and asked != given.lock.settings:
            raise Refused(
                "not the lock's coefficients, examples, prompts or base",
                hint="give the same --coef, --data, --base and options about prompts",
            )
        task = Job(
            verb="merge",
            settings=asked,
            inputs={**team.inputs, **(samples.inputs if samples is not None else {})},
            runs=settings.runs,
            out=job.out,
            name=f"merge-{plan.options.method}",
            device=plan.options.device,
        )
        if job.dry_run:
            screen.document("lora.merge.plan/1", {"out": str(task.folder), "modules": len(plan.written), **asked})
            return

        def work(run: "Run") -> "MergeReport":
            run.lock.update(locking.lock_of(plan, task.inputs, task.folder))
            with TemporaryDirectory() as spool:
                if samples is not None:
                    samples.collect(plan.adapters, plan.modules, Path(spool), progress=progress)
                return step.merge(plan, task.folder, run, replace=job.force, lock=given.lock, progress=progress)

        done = run_once(settings.db, task, work, force=job.force)
        if done.report is None and given.lock is not None:
            locking.demand_same_outputs(given.lock, done.run.outputs)
    show_output(screen, "lora.merge/1", task.folder, done.run.record())
    if done.report is None:
        screen.say(f"merge: {near(task.folder)} is up to date")
    else:
        for line in (outcome(plan, done.report), *_notes(plan, done.report)):
            screen.say(line)
    if gathered.unchecked:
        screen.say(f"  {gathered.unchecked}")
    for line in (*_of_readers(plan, done.run.results), *_to_serve(plan, task.folder, done.run.results, settings.base)):
        screen.say(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """The options of a merge with the lock or the learnt coefficients that the user named."""

    options: MergeOptions
    lock: "Lock | None" = None
    coefficients: "Coefficients | None" = None

    @property
    def parents(self) -> Collection[str]:
        """The adapters that the lock or the coefficients name."""
        if self.lock is not None:
            return self.lock.parents
        return self.coefficients.adapters if self.coefficients is not None else ()


def _given(context: typer.Context, options: MergeOptions, sources: Sources, device: str) -> _Given:
    """What the user gave; UsageError where options contradict a lock or learnt coefficients."""
    METHODS.check(options.method, options.knobs)
    from lora_cli.adapters.devices import resolve_device
    from lora_cli.steps.coefficients import read_coefficients
    from lora_cli.steps.lock import read_lock

    coefficients = None if sources.coef is None else read_coefficients(sources.coef)
    if sources.locked is not None:
        _demand_no_others(context, sources.locked)
        lock = read_lock(sources.locked)
        given = _Given(options=lock.options, lock=lock, coefficients=coefficients)
    else:
        options = replace(options, device=resolve_device(device))
        if coefficients is not None and context.params["method"] is None:
            # The coefficients were learnt for a weighted sum.
            options = replace(options, method="linear")
        given = _Given(options=options, coefficients=coefficients)
    if coefficients is not None and (sources.dedupe is not None or sources.weights is not None):
        raise UsageError("--weights and --dedupe cannot be combined with --coef, which holds the weights")
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class _Team:
    """The adapters of a merge, the weight of each, and `id@commit` → SHA-256 of its weights."""

    adapters: Sequence["OpenAdapter"]
    weights: Sequence[float]
    inputs: Mapping[str, str]


def _team(given: _Given, gathered: "Gathered", weights: Sequence[float]) -> _Team:
    """The adapters that are merged, with the weights of the lock or of the coefficients if these were given.

    Raises:
        Refused: adapters that are not those of the lock.
        UsageError: adapters that are not those of the coefficients.
    """
    from lora_cli.steps.coefficients import demand_fitting
    from lora_cli.steps.lock import demand_same_parents, under_locked_names

    adapters, inputs = list(gathered.adapters), dict(gathered.inputs)
    if given.lock is not None:
        adapters, inputs = under_locked_names(given.lock, adapters, inputs)
        demand_same_parents(given.lock, inputs)
        weights = given.lock.weights([adapter.ref.pinned for adapter in adapters])
    elif given.coefficients is not None:
        demand_fitting(given.coefficients, adapters)
        weights = [1.0] * len(adapters)
    return _Team(adapters=adapters, weights=weights, inputs=inputs)


def _without_copies(team: _Team, cosine: float, average: bool, pool: "Pool") -> _Team:
    """`team` without near copies of an earlier adapter; each is named on stderr. `average` spreads weights evenly."""
    from lora_cli.steps.compare import near_copies

    copies = near_copies(team.adapters, cosine, pool.progress)
    for kept, copy, measured in copies:
        pool.announce(f"left out {copy.ref.id}: cosine {measured:.3f} with {kept.ref.id}")
    out = [copy for _, copy, _ in copies]
    places = [place for place, adapter in enumerate(team.adapters) if adapter not in out]
    adapters = [team.adapters[place] for place in places]
    return _Team(
        adapters=adapters,
        weights=[1 / len(adapters) if average else team.weights[place] for place in places],
        inputs={adapter.ref.pinned: team.inputs[adapter.ref.pinned] for adapter in adapters},
    )


def _with_holder(options: MergeOptions, names: Sequence[str], adapters: Sequence["OpenAdapter"]) -> MergeOptions:
    """`options` with the adapter that --saved-modules names as `id@commit`."""
    what = options.saved_modules
    if what in ("refuse", "drop"):
        return options
    for name, adapter in zip(names, adapters, strict=True):
        if what in (name, adapter.ref.id, adapter.ref.pinned):
            return replace(options, saved_modules=adapter.ref.pinned)
    raise UsageError(f"--saved-modules takes refuse, drop or one of the adapters, not {what!r}")


def outcome(plan: "MergePlan", report: "MergeReport") -> str:
    """The one line that says what a merge did."""
    from lora_cli.steps.merge import rank_in_words

    n, modules = len(plan.adapters), len(report.modules)
    kept = (
        "dense"
        if plan.options.dense
        else f"{rank_in_words(plan, report)} · {percent(report.energy)} of the energy kept"
    )
    return (
        f"{plan.options.method}: {n} adapter{'s'[: n != 1]} → {modules} module{'s'[: modules != 1]} · {kept} · "
        f"norm {report.norm / report.mean_norm:.2f} of the adapters' mean · "
        f"{report.seconds:.1f} s · peak {report.peak_bytes / 1e9:.1f} GB"
    )


def _notes(plan: "MergePlan", report: "MergeReport") -> list[str]:
    """What a user should know besides: that little came out, or less than was asked for."""
    notes = []
    if dropped := [adapter for adapter in plan.adapters if adapter.saved and adapter is not plan.saved]:
        notes.append(f"  dropped what was saved whole: {_and([_saved_in(adapter) for adapter in dropped])}")
    if plan.saved is not None:
        notes.append(f"  beside the update as they were saved: {_saved_in(plan.saved)}")
    if report.norm < SMALL * report.mean_norm:
        notes.append(
            f"  the result is {percent(report.norm / report.mean_norm)} of the size of what went in: it will change "
            "little; --norm-match or --lambda makes it larger"
        )
    energy = plan.options.energy or 0.0
    if short := [one for one in report.modules if one.energy < energy - 1e-6]:
        notes.append(
            f"  {len(short)} of {len(report.modules)} modules hold less than --energy {energy:g} at this rank, "
            f"{short[0].module} {percent(short[0].energy)}"
        )
    return notes


def _saved_in(adapter: "OpenAdapter") -> str:
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in adapter.saved))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} of {adapter.ref.id}"


def _of_readers(plan: "MergePlan", results: Mapping[str, Any]) -> list[str]:
    """The programs that read the result otherwise than PEFT does, and why."""
    from lora_cli.steps.serving import READ_ONE_RANK, fused_parts_missing, sglang_loads

    if plan.options.dense:
        return []
    told = []
    if plan.options.compact and len({module["rank"] for module in results["modules"].values()}) > 1:
        told.append(f"  ranks differ: {_and(READ_ONE_RANK)} read this result wrongly or not at all")
    if kinds := plan.kinds_in_some_layers:
        told.append(
            f"  only some layers have {_and(kinds)}: LoRAX drops these, lmdeploy reads stray memory in the others"
        )
    # What the parents lack as well was not lost in the merge.
    if lost := plan.known.keys() & fused_parts_missing(plan.written):
        names = sorted({module.rpartition(".")[2] for module in lost})
        alone = "" if sglang_loads(plan.written) else ", and cannot load them alone"
        told.append(f"  SGLang fuses these modules with {_and(names)}{alone}: --for sglang puts zeros there")
    return told


def _to_serve(plan: "MergePlan", folder: Path, results: Mapping[str, Any], base: str | None) -> list[str]:
    """How to serve the result where that was asked for, and what the server may not take."""
    from lora_cli.steps.serving import TITLES, not_surely_served, serve_line

    if plan.options.for_ is None:
        return []
    # What adapters declare may be a folder of a machine that nobody here has.
    model = base or (plan.base if "/" in plan.base else "BASE-MODEL")
    lines = [f"  {serve_line(plan.options.for_, model, folder, results['rank'])}"]
    title = TITLES[plan.options.for_]
    if plan.zeros:
        lines.append(f"  {len(plan.zeros)} modules hold zeros: {title} fuses them with the others")
    if unsure := not_surely_served(plan.written):
        lines.append(f"  whether {title} adapts {', '.join(unsure)} depends on the model: not checked")
    if plan.saved is not None:
        lines.append(f"  whether {title} loads modules saved whole depends on the model: not checked")
    lines.append(f"  checked by the rules of {title}, not on a server")
    return lines


def _and(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _samples(
    settings: Settings, method: str, data: Sequence[str], prompting: Prompting, adapters: Sequence["OpenAdapter"]
) -> "ModuleInputs | None":
    """Samples of each module's activations for a method that needs them; None for the others."""
    if METHODS.get(method).needs != "inputs":
        if data or prompting.settings:
            what = "--data" if data else "options about prompts"
            raise UsageError(f"{method} takes no {what}", hint="regmean does; lora fit learns weights from examples")
        return None
    if not data:
        raise UsageError(
            f"--method {method} needs examples, to record the activations of each module", hint="give --data FILE.jsonl"
        )
    from lora_cli.base_model import pin
    from lora_cli.steps.inputs import ModuleInputs, data_of

    ref = pin(base_of(settings), device=settings.device, dtype=settings.dtype, prompting=prompting)
    return ModuleInputs(base=ref, files=data_of(data, adapters), seed=settings.seed)


def _demand_no_others(context: typer.Context, file: Path) -> None:
    """UsageError for an option that would contradict the lock in `file`."""
    fixed = {*MergeOptions.flags(), *METHODS.knobs, "weights", "selection", "dedupe", "device"}
    for name in fixed & context.params.keys():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = setting(name).replace("_", "-")
            raise UsageError(f"--locked takes every setting from {file}: leave out --{flag}")


def _weights(spelled: str, chosen: "Chosen") -> list[float]:
    """One weight per adapter, from --weights, or the method's default, unless each was given its own."""
    if chosen.weighted:
        own = [weight for weight in chosen.weights if weight is not None]
        if len(own) < len(chosen.weights):
            raise UsageError(
                "some adapters have a weight and some do not", hint="write ADAPTER=WEIGHT for each of them"
            )
        return own
    n = len(chosen.names)
    if spelled == "average":
        return [1 / n] * n
    if spelled == "sum":
        return [1.0] * n
    try:
        numbers = [float(part) for part in spelled.split(",")]
    except ValueError:
        raise UsageError(f"--weights takes average, sum or numbers with commas, not {spelled!r}") from None
    if len(numbers) != n:
        raise UsageError(f"--weights gives {len(numbers)} numbers for {n} adapters")
    return numbers


class MergeCommand(Command):
    """`lora merge`, whose help lists the options of a method where --method names one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for place, word in enumerate(args):
            flag, _, value = word.partition("=")
            if flag in ("-m", "--method"):
                ctx.meta["method"] = value or next(iter(args[place + 1 :]), "")
        return super().parse_args(ctx, args)

    def left_out(self, ctx: Any) -> Collection[str]:
        method = METHODS.methods.get(ctx.meta.get("method", ""))
        taken = METHODS.knobs_of(method.name) if method is not None else {}
        prompts = () if method is not None and method.needs == "inputs" else Prompts.flags()
        return {name for name in METHODS.knobs if name not in taken} | {*prompts}


def with_knobs(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with one option per knob of the merge methods; their values join `options.knobs`."""
    signature = inspect.signature(function)
    knobs = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name, owners))
        for name, owners in METHODS.knobs.items()
    ]

    @functools.wraps(function)
    def command(*, options: MergeOptions, **values: Any) -> None:
        given = {name: values.pop(name) for name in METHODS.knobs}
        taken = {name: value for name, value in given.items() if value is not None}
        function(options=replace(options, knobs=taken), **values)

    parameters = [*signature.parameters.values(), *knobs]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def _option(name: str, owners: dict[str, Knob]) -> Any:
    knob = next(iter(owners.values()))
    said: dict[str, list[str]] = {}
    for method, one in owners.items():
        limits = ", ".join(one.choices) or one.range()
        said.setdefault(one.help + (f" ({limits})" if limits else ""), []).append(method)
    defaults: dict[str, list[str]] = {}
    for method, one in owners.items():
        defaults.setdefault(str(one.default), []).append(method)
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        help="; ".join(f"{', '.join(methods)}: {text}" for text, methods in said.items()) + ".",
        show_default=next(iter(defaults))
        if len(defaults) == 1
        else "; ".join(f"{value} for {', '.join(methods)}" for value, methods in defaults.items()),
        rich_help_panel="Options of the method",
    )
    return Annotated[knob.type | None, option]


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
