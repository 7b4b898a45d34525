"""`lora merge`: several adapters become one."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from lora_cli.commands.chosen import expand
from lora_cli.commands.options import (
    PROMPTING,
    Base,
    Db,
    Device,
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
    with_prompting,
)
from lora_cli.errors import NothingMatched, Refused, UsageError
from lora_cli.methods import Knob, MethodFolder
from lora_cli.models.encode import Prompting
from lora_cli.records import Server
from lora_cli.screen import Screen, near, percent
from lora_cli.settings import folder_of, load

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")
SMALL = 0.05


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
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            help="How; 'lora methods' lists and explains all of them.",
            autocompletion=lambda: [*METHODS.methods],
            show_default="norm-matched; linear with --coef",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="average (1/N each), sum (1 each), or numbers with commas.",
            show_default="the method's, mostly average",
        ),
    ] = None,
    rank: Rank = "auto",
    energy: Energy = None,
    out: Out = None,
    selection: Selection = None,
    dedupe: Annotated[
        float | None,
        typer.Option("--dedupe", help="Leave out adapters whose cosine with another reaches this, such as 0.95."),
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", help="Merge only these parts: layers=0-15,20 or modules=q_proj,*.mlp.*; repeatable, all hold."
        ),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            "--missing", help="Where an adapter lacks a module: zero counts it as zero, renorm leaves it out."
        ),
    ] = "zero",
    scaling: Annotated[float, typer.Option("--lambda", help="Factor on the whole result.")] = 1.0,
    norm_match: Annotated[
        bool, typer.Option("--norm-match", help="Scale each module to the weighted mean of its adapters' norms.")
    ] = False,
    coef: Annotated[
        Path | None, typer.Option("--coef", help="Learnt coefficients: the coefficients.json that lora fit wrote.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[ADAPTER=]FILE",
            help="For regmean: a task file that shows what each module is fed; repeat with ADAPTER= for own ones.",
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write whole updates (delta.safetensors) in place of a LoRA.")
    ] = False,
    compact: Annotated[
        bool,
        typer.Option("--compact", help="Leave each module at its own rank: smaller, but not every server reads it."),
    ] = False,
    serve: Annotated[
        Server | None,
        typer.Option("--for", help="Keep the rules of a server, and print the line that serves the result."),
    ] = None,
    saved_modules: Annotated[
        str,
        typer.Option(
            "--saved-modules",
            metavar="refuse|drop|ADAPTER",
            help="Heads and others saved whole: refuse them, drop them, or take those of this adapter.",
        ),
    ] = "refuse",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Precision on disk: auto (as the parents), fp32, bf16, fp16.")
    ] = "auto",
    device: Device = None,
    locked: Annotated[
        Path | None, typer.Option("--locked", help="Rebuild the merge of this run.json, byte for byte.")
    ] = None,
    base: Base = None,
    force: Force = False,
    dry_run: DryRun = False,
    db: Db = None,
    json: Json = False,
    *,
    prompting: Prompting,
    **knobs: Any,
) -> None:
    """Merge adapters into one LoRA, on the updates themselves and not on A and B apart.

    Ranks and target modules may differ. The result is a PEFT folder with a model card and run.json; its path goes to
    stdout, and how much of the merged update fits into the chosen rank is always said. The options at the
    end belong to single methods, named in their help.
    """
    from lora_cli import runs
    from lora_cli.adapters.devices import resolve_device
    from lora_cli.catalogue import Catalogue
    from lora_cli.steps import lock as locking
    from lora_cli.steps import merge as step
    from lora_cli.steps.coefficients import demand_fitting, read_coefficients
    from lora_cli.steps.gather import gather, to_fetch

    screen = screen_for(json)
    settings = load({"base": base, "db": db, "device": device})
    lock = None if locked is None else _read_lock(context, locked)
    # Learnt coefficients were learnt for a weighted sum.
    method = method or ("norm-matched" if coef is None else "linear")
    options: dict[str, Any] = {
        "method": method,
        "knobs": {name: value for name, value in knobs.items() if value is not None},
        "scope": scope or [],
        "rank": rank,
        "energy": energy,
        "scaling": scaling,
        "norm_match": norm_match,
        "missing": missing,
        "dense": dense,
        "compact": compact,
        "serve": serve,
        "dtype": dtype,
    }
    options = lock.options if lock is not None else options | {"device": resolve_device(settings.device)}
    step.METHODS.check(options["method"], options["knobs"])
    coefficients = None if coef is None else read_coefficients(coef)
    if coefficients is not None and (dedupe is not None or weights is not None):
        raise UsageError("--coef says what each adapter weighs: leave out --weights and --dedupe")
    everyone = lock.parents if lock is not None else coefficients.adapters if coefficients is not None else ()
    with Catalogue(settings.db) as catalogue, screen.progress() as progress:
        names, own_weights = named(adapters or [], catalogue, settings.base, selection, screen, everyone)
        if lock is not None and not adapters:
            names = locking.where_parents_are(lock, catalogue)
        numbers = [] if everyone else _weights(weights, own_weights, step.METHODS.get(method).weights)
        if dry_run and (
            left := to_fetch(catalogue, names, base=settings.base, aliases=settings.base_aliases, announce=screen.say)
        ):
            screen.document("lora.merge.plan/1", {"out": None, "method": options["method"], **download_plan(left)})
            return
        gathered = gather(
            catalogue,
            names,
            base=settings.base,
            aliases=settings.base_aliases,
            whole=(saved_modules if lock is None else lock.settings["saved_modules"]) != "refuse",
            announce=screen.say,
            progress=progress,
        )
        if lock is None:
            options["saved_modules"] = _holder(saved_modules, names, gathered.adapters)
        chosen, inputs = list(gathered.adapters), dict(gathered.inputs)
        if lock is not None:
            chosen, inputs = locking.under_locked_names(lock, chosen, inputs)
            locking.demand_same_parents(lock, inputs)
            numbers = lock.weights([adapter.ref.pinned for adapter in chosen])
        elif coefficients is not None:
            demand_fitting(coefficients, chosen)
            numbers = [1.0] * len(chosen)
        elif dedupe is not None:
            copies = _copies(screen, chosen, dedupe, progress)
            left_in = [i for i, adapter in enumerate(chosen) if adapter not in copies]
            chosen, numbers = [chosen[i] for i in left_in], [numbers[i] for i in left_in]
            if set(own_weights) == {None} and (weights or step.METHODS.get(method).weights) == "average":
                numbers = [1 / len(chosen)] * len(chosen)
            inputs = {adapter.ref.pinned: inputs[adapter.ref.pinned] for adapter in chosen}
        for ids in step.identical(chosen, inputs):
            screen.say(f"{_and(ids)} are byte-identical")
        samples = _samples(settings, options["method"], data or [], prompting, chosen)
        plan = step.plan(
            chosen,
            numbers,
            base=gathered.base,
            skeleton=gathered.skeleton,
            coefficients=coefficients,
            inputs=samples,
            **options,
        )
        asked = plan.settings | (samples.settings if samples is not None else {})
        inputs |= samples.inputs if samples is not None else {}
        if lock is not None and asked != lock.settings:
            raise Refused(
                "not the lock's coefficients, examples, prompts or base",
                hint="give the same --coef, --data, --base and options about prompts",
            )
        key = runs.key_of("merge", asked, inputs)
        folder = out or settings.runs / f"merge-{plan.method}-{key[:8]}"
        if dry_run:
            screen.document("lora.merge.plan/1", {"out": str(folder), "modules": len(plan.written), **asked})
            return
        done = runs.claim(folder, key, force=force)
        with runs.recorded(settings.db, "merge", asked, inputs, folder) as run, TemporaryDirectory() as spool:
            run.device = plan.device
            run.lock.update(locking.lock_of(plan, inputs, folder))
            if done:
                run.take(folder)
                if lock is not None:
                    locking.demand_same_outputs(lock, run.outputs)
                told = [f"merge: {near(folder)} is up to date"]
            else:
                if samples is not None:
                    samples.collect(plan.adapters, plan.modules, Path(spool), progress=progress)
                report = step.merge(plan, folder, run, replace=force, lock=lock, progress=progress)
                told = [outcome(plan, report), *_notes(plan, report)]
            told += [f"  {gathered.unchecked}"] if gathered.unchecked else []
            told += [*_of_readers(plan, run.results), *_to_serve(plan, folder, run.results, settings.base)]
    show_output(screen, "lora.merge/1", folder, run.record())
    for line in told:
        screen.say(line)


def named(
    arguments: list[str],
    catalogue: Any,
    base: str | None,
    selection: str | None,
    screen: Screen,
    recorded: Iterable[str] = (),
) -> tuple[list[str], list[float | None]]:
    """The adapters meant by ADAPTER[=WEIGHT] arguments (or by none), and the weight of each that was given one.

    `recorded` are those of a file that says what each of them weighs.
    """
    from lora_cli.steps.gather import default_names

    known = [*recorded]
    if known and not arguments and selection is None:
        return known, [None] * len(known)
    if not arguments:
        names, note = default_names(catalogue, base, selection)
        screen.say(note)
        return names, [None] * len(names)
    if selection is not None:
        raise UsageError("name adapters or a --selection, not both")
    pairs = [_split(argument) for argument in expand(arguments)]
    if not pairs:
        raise NothingMatched("no adapters on stdin")
    weights = [weight for _, weight in pairs]
    if known and any(weight is not None for weight in weights):
        raise UsageError("the file says what each adapter weighs: leave out =WEIGHT")
    return [name for name, _ in pairs], weights


def _holder(what: str, names: Sequence[str], adapters: Sequence[Any]) -> str:
    """--saved-modules with the adapter that it names as `id@commit`."""
    if what in ("refuse", "drop"):
        return what
    for name, adapter in zip(names, adapters, strict=True):
        if what in (name, adapter.ref.id, adapter.ref.pinned):
            return str(adapter.ref.pinned)
    raise UsageError(f"--saved-modules is refuse, drop or one of the adapters, not {what!r}")


def download_plan(missing: Sequence[Any]) -> dict[str, Any]:
    """What a command would have to download before it can plan further."""
    return {"fetch": [row.ref.pinned for row in missing], "fetch_bytes": sum(row.bytes for row in missing)}


def outcome(plan: Any, report: Any) -> str:
    """The one line that says what a merge did."""
    from lora_cli.steps.merge import rank_in_words

    n, modules = len(plan.adapters), len(report.modules)
    kept = "dense" if plan.dense else f"{rank_in_words(plan, report)} · {percent(report.energy)} of the energy kept"
    return (
        f"{plan.method}: {n} adapter{'s'[: n != 1]} → {modules} module{'s'[: modules != 1]} · {kept} · "
        f"norm {report.norm / report.mean_norm:.2f} of the adapters' mean · "
        f"{report.seconds:.1f} s · peak {report.peak_bytes / 1e9:.1f} GB"
    )


def _notes(plan: Any, report: Any) -> list[str]:
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
    if short := [one for one in report.modules if plan.energy and one.energy < plan.energy - 1e-6]:
        notes.append(
            f"  {len(short)} of {len(report.modules)} modules hold less than --energy {plan.energy:g} at this rank, "
            f"{short[0].module} {percent(short[0].energy)}"
        )
    return notes


def _saved_in(adapter: Any) -> str:
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in adapter.saved))
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} of {adapter.ref.id}"


def _of_readers(plan: Any, results: Mapping[str, Any]) -> list[str]:
    """The programs that read the result otherwise than PEFT does, and why."""
    from lora_cli.steps.serving import READ_ONE_RANK, fused_parts_missing, sglang_loads

    if plan.dense:
        return []
    told = []
    if plan.compact and len({module["rank"] for module in results["modules"].values()}) > 1:
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


def _to_serve(plan: Any, folder: Path, results: Mapping[str, Any], base: str | None) -> list[str]:
    """How to serve the result where that was asked for, and what the server may not take."""
    from lora_cli.steps.serving import TITLES, not_surely_served, serve_line

    if plan.serve is None:
        return []
    # What adapters declare may be a folder of a machine that nobody here has.
    model = base or (plan.base if "/" in plan.base else "BASE-MODEL")
    lines = [f"  {serve_line(plan.serve, model, folder, results['rank'])}"]
    title = TITLES[plan.serve]
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


def _samples(settings: Any, method: str, data: list[str], prompting: Prompting, adapters: Sequence[Any]) -> Any:
    """Where a method that needs them finds samples of what each module is fed; None for the others."""
    if METHODS.get(method).needs != "inputs":
        if data or prompting.settings:
            what = "--data" if data else "options about prompts"
            raise UsageError(f"{method} takes no {what}", hint="regmean does; lora fit learns weights from examples")
        return None
    if not data:
        raise UsageError(f"{method} needs examples to see what each module is fed", hint="give --data FILE.jsonl")
    if settings.base is None:
        raise UsageError(f"{method} needs the base model", hint="give --base, set LORA_BASE, or set base in lora.toml")
    from lora_cli.base_model import pin
    from lora_cli.steps.inputs import ModuleInputs, data_of

    ref = pin(settings.base, device=settings.device, dtype=settings.dtype, prompting=prompting)
    return ModuleInputs(base=ref, files=data_of(data, adapters), seed=settings.seed)


def _copies(screen: Screen, adapters: Sequence[Any], cosine: float, progress: Any) -> list[Any]:
    """The adapters that are near copies of an earlier one; each is named on stderr."""
    from lora_cli.steps.compare import near_copies

    copies = near_copies(adapters, cosine, progress)
    for kept, copy, measured in copies:
        screen.say(f"left out {copy.ref.id}: cosine {measured:.3f} with {kept.ref.id}")
    return [copy for _, copy, _ in copies]


def _read_lock(context: typer.Context, file: Path) -> Any:
    """The lock in `file`; UsageError where other options would contradict it."""
    from lora_cli.steps.lock import read_lock

    allowed = {"adapters", "locked", "coef", "data", "base", "out", "force", "dry_run", "db", "json", *PROMPTING}
    for name in context.params.keys() - allowed:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--locked takes every setting from {file}: leave out --{name.replace('_', '-')}")
    return read_lock(file)


def _split(argument: str) -> tuple[str, float | None]:
    name, equals, weight = argument.rpartition("=")
    if not equals or folder_of(argument) is not None:
        return argument, None
    try:
        if not weight.isascii() or "_" in weight:
            raise ValueError("a spelling of Python's own")
        return name, float(weight)
    except ValueError:
        raise UsageError(f"{argument}: the weight after = is no number") from None


def _weights(spelled: str | None, own: list[float | None], default: str) -> list[float]:
    """One weight per adapter, from --weights or from ADAPTER=WEIGHT, else the method's default."""
    if any(weight is not None for weight in own):
        if spelled is not None:
            raise UsageError("give weights by --weights or by ADAPTER=WEIGHT, not both")
        if any(weight is None for weight in own):
            raise UsageError(
                "some adapters have a weight and some do not", hint="write ADAPTER=WEIGHT for each of them"
            )
        return [weight for weight in own if weight is not None]
    spelled = default if spelled is None else spelled
    if spelled == "average":
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
    )
    return Annotated[knob.type | None, option]


def register(root: typer.Typer) -> None:
    """Add `lora merge` to the command tree."""
    root.command(
        epilog=examples(
            "lora merge --method ties",
            "lora merge pool/tarn/mirror=0.7 pool/mossy/double=0.3 -o merged",
            "lora merge pool/tarn/mirror pool/mossy/double -m ties --density 0.4 --dry-run",
        )
    )(with_knobs(with_prompting(merge)))
