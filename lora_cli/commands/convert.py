"""`lora convert`: an adapter of another program becomes a PEFT folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_cli.commands.options import OUTPUT, Catalogued, Command, JobOptions, examples, show_output, with_flags
from lora_cli.options import Flag, Options
from lora_cli.precision import Precision
from lora_cli.screen import near
from lora_cli.text import counted, duration, percent, size


class ConvertOptions(Options, frozen=True, kw_only=True):
    """The output options of a conversion."""

    rank: Annotated[int | None, Flag(help="Highest rank; the error of what is cut off is told.", minimum=1)] = None
    adapter: Annotated[str, Flag(help="The one of several adapters in a file.", metavar="NAME")] = ""
    dtype: Annotated[
        Precision, Flag(help="Precision on disk; auto keeps that of an exact conversion, else fp32.", panel=OUTPUT)
    ] = "auto"


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder or file of another program's adapter.", show_default=False)
    ],
    *,
    setup: Catalogued,
    options: ConvertOptions,
    job: JobOptions,
) -> None:
    """Convert an adapter of another program into a PEFT folder.

    The program is recognised by the files. Where it only names and arranges the factors otherwise, they are copied bit
    for bit. merge, diff, bake and 'pool sync --from' take such adapters as they are: they convert them into a cache.
    An (IA)³ or OFT multiplies the base's weights: --base and --rank make the best LoRA of that rank. The result's path
    goes to stdout.
    """
    from lora_cli.steps.convert.request import convert_job

    screen, settings = job.screen(), setup.load()
    with screen.progress() as progress:
        converting = convert_job(
            source,
            settings,
            rank=options.rank,
            dtype=options.dtype,
            adapter=options.adapter,
            out=job.out,
            announce=screen.say,
            progress=progress,
        )
        foreign, folder = converting.conversion.foreign, converting.job.folder
        if job.dry_run:
            planned = {"out": str(folder), "modules": len(foreign.modules), **converting.job.settings}
            screen.document("lora.convert.plan/1", planned)
            return
        done = converting.run(settings.db, force=job.force, progress=progress)
    show_output(screen, "lora.convert/1", folder, done.run.record())
    if done.report is None:
        screen.say(f"convert: {near(folder)} is up to date")
    else:
        told = f"{duration(done.report.seconds)} · peak {size(done.report.peak_bytes)}"
        screen.say(f"convert: {foreign.kind} · {outcome(done.run.results)} · {told}")
    for note in foreign.notes:
        screen.say(f"  {note}")
    if not foreign.base and not foreign.config.get("base_model_name_or_path"):
        screen.say("  it declares no base model: give --base, here or wherever it is used")


def outcome(results: Mapping[str, Any]) -> str:
    """Modules, rank and exactness of a conversion."""
    modules = results["modules"]
    if not modules:
        return "tensors as in the files"
    rank = max(one["rank"] for one in modules.values())
    many = f"{counted(len(modules), 'module')} · rank {rank} in {results['precision']}"
    if results["exact"]:
        return f"{many} · factors as in the file"
    if results["error"] == 0:
        return f"{many} · scale folded into the factors"
    worst = max(modules, key=lambda name: modules[name]["error"])
    error, most = percent(results["error"]), percent(modules[worst]["error"])
    return f"{many} · relative error {error}, {most} in {worst}"


def register(root: typer.Typer) -> None:
    """Add `lora convert` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora export mlx pool/tarn/mirror -o mlx && lora convert mlx -o mirror",
            "lora convert mlx --rank 4 --dtype bf16 --json",
        ),
    )(with_flags(convert))
