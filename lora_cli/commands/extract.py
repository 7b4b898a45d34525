"""`lora extract`: a fine-tuned model becomes a LoRA of its base."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from lora_cli.columns import Column
from lora_cli.commands.options import OUTPUT, Catalogued, Command, JobOptions, examples, show_output, with_flags
from lora_cli.options import Flag, Options
from lora_cli.screen import near
from lora_cli.text import counted, duration, percent, size

_MODULES = (
    Column("MODULE", "module", wide=True),
    Column("RANK", "rank", "right"),
    Column("NORM", "norm", "right"),
    Column("ERROR", "error", "right"),
)


class ExtractOptions(Options, frozen=True, kw_only=True):
    """The options of an extraction."""

    rank: Annotated[int | None, Flag(help="Rank of every layer.", minimum=1)] = None
    energy: Annotated[
        float | None, Flag(help="Instead of a rank: the share of each layer's squared difference to keep.")
    ] = None
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], Flag(help="Precision on disk.", panel=OUTPUT)] = "fp32"


def extract(
    tuned: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="The fine-tuned model: Hub id or folder.", show_default=False),
    ],
    modules: Annotated[
        bool, typer.Option("--modules", help="Show rank, norm and error of each layer, in place of the path.")
    ] = False,
    *,
    setup: Catalogued,
    options: ExtractOptions,
    job: JobOptions,
) -> None:
    """Make a LoRA of the difference between a fine-tuned model and its base, and report the error of each layer.

    Each linear layer's difference is approximated by the best matrix of the rank, one layer at a time. Embeddings,
    norms and biases cannot be in a LoRA: those that changed are named, and stay as in the base. A DoRA becomes a LoRA
    in this way after PEFT has merged it into its base.
    """
    from lora_cli.steps.convert.extract import extract_job

    screen, settings = job.screen(), setup.load()
    with screen.progress() as progress:
        extracting = extract_job(
            tuned,
            settings,
            rank=options.rank,
            energy=options.energy,
            dtype=options.dtype,
            out=job.out,
            announce=screen.say,
            progress=progress,
        )
        folder = extracting.job.folder
        if job.dry_run:
            planned = {"out": str(folder), "modules": len(extracting.pair.modules), **extracting.job.settings}
            screen.document("lora.extract.plan/1", planned)
            return
        done = extracting.run(settings.db, force=job.force, progress=progress)
    results, report = done.run.results, done.report
    if modules and not job.json:
        rows = [{"module": name, **one} for name, one in results["modules"].items()]
        screen.rows("lora.extract/1", _MODULES, rows, identity="module", caption="ERROR of the norm: 0.01 is 1 %")
    else:
        show_output(screen, "lora.extract/1", folder, done.run.record())
    if report is None:
        screen.say(f"extract: {near(folder)} is up to date")
    else:
        screen.say(f"{outcome(results)} · {duration(report.seconds)} · peak {size(report.peak_bytes)}")
    if left := left_out(results["left_out"]):
        screen.say(f"  {left}")
    if short := short_of(results, options.energy):
        screen.say(f"  {short}")


def outcome(results: Mapping[str, Any]) -> str:
    """The one-line summary of an extraction."""
    modules = results["modules"]
    worst = max(modules, key=lambda name: modules[name]["error"])
    unchanged = f" ({results['unchanged']} unchanged)" if results["unchanged"] else ""
    return (
        f"extract: {counted(len(modules), 'layer')}{unchanged} · rank {results['rank']} · relative error "
        f"{percent(results['error'])}, {percent(modules[worst]['error'])} in {worst}"
    )


def left_out(changes: Mapping[str, float | None]) -> str:
    """A note on the changed tensors that no LoRA can hold, "" for none."""
    if not changes:
        return ""
    known = {name: change for name, change in changes.items() if change is not None}
    most = max(known, key=lambda name: known[name], default="")
    by = f", most in {most} ({percent(known[most])} of its norm)" if most else f", such as {next(iter(changes))}"
    many = counted(len(changes), "tensor")
    return f"left as in the base, though changed: {many} in none of these layers{by}"


def short_of(results: Mapping[str, Any], energy: float | None) -> str:
    """A note on layers that keep less than the share that was asked for, "" for none."""
    if energy is None:
        return ""
    short = [name for name, one in results["modules"].items() if 1 - one["error"] ** 2 < energy - 1e-6]
    return f"less than --energy {energy:g} at the highest rank in {counted(len(short), 'layer')}" if short else ""


def register(root: typer.Typer) -> None:
    """Add `lora extract` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora bake pool/tarn/mirror -o tuned && lora extract tuned --rank 8 -o extracted",
            "lora bake pool/mossy/double -o tuned2 && lora extract tuned2 --energy 0.9 --modules",
        ),
    )(with_flags(extract))
