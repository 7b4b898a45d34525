"""`lora export`: an adapter in the form of another program."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli.commands import completing
from lora_cli.commands.bake import Licensed
from lora_cli.commands.chosen import expand
from lora_cli.commands.options import OUTPUT, Command, JobOptions, downloads, examples, show_output, with_flags
from lora_cli.errors import UsageError
from lora_cli.methods import file_names
from lora_cli.options import Flag, Options
from lora_cli.precision import Precision
from lora_cli.screen import near
from lora_cli.text import counted, duration, size

if TYPE_CHECKING:
    Target = str
else:  # one choice per file of exports/
    Target = Literal[file_names("lora_cli.exports")]


class ExportOptions(Options, frozen=True, kw_only=True):
    """The output options of an export."""

    dtype: Annotated[
        Precision,
        Flag(help="Precision on disk; auto is the adapter's where no number changes, else fp32.", panel=OUTPUT),
    ] = "auto"
    base_name: Annotated[
        str,
        Flag(help="For ollama: its name of the base, such as llama3.1, or a GGUF file.", metavar="NAME", panel=OUTPUT),
    ] = ""


def export(
    target: Annotated[Target, typer.Argument(metavar="TARGET", help="The program.", show_default=False)],
    adapter: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER",
            help="Id of the catalogue or the Hub, folder, or - for stdin.",
            autocompletion=completing.adapters,
            show_default=False,
        ),
    ],
    *,
    setup: Licensed,
    options: ExportOptions,
    job: JobOptions,
) -> None:
    """Write an adapter in the form that another program reads, and check it by reading it back as the program does.

    The scale is kept where the program reads it rightly, and else goes into the factors. What the program cannot hold
    is refused by name before anything is written; docs/exchange.md lists it. The result is a folder with run.json; its
    path goes to stdout.
    """
    from lora_cli.steps.export.request import ExportRequest
    from lora_cli.steps.opened_pool import open_pool

    screen, settings = job.screen(), setup.load()
    names = expand([adapter])
    if len(names) != 1:
        raise UsageError(f"export takes one adapter, not {len(names)}", hint="merge them into one first: lora merge")
    if options.base_name and target != "ollama":
        raise UsageError("--base-name is for ollama, whose Modelfile names the base", hint="leave it out")
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        request = ExportRequest(pool, target, names[0], settings)
        if job.dry_run and (absent := request.absent()):
            screen.document("lora.export.plan/1", {"out": None, "for": target, **downloads(absent)})
            return
        exporting = request.prepare(dtype=options.dtype, called=options.base_name, out=job.out)
        folder, plan = exporting.job.folder, exporting.plan
        if job.dry_run:
            planned = {"out": str(folder), "modules": len(plan.source.modules), **exporting.job.settings}
            files = dict(plan.files)
            screen.document("lora.export.plan/1", {**planned, "files": files, "bytes": sum(files.values())})
            return
        done = exporting.run(settings.db, force=job.force, progress=progress)
    show_output(screen, "lora.export/1", folder, done.run.record())
    if done.report is None:
        screen.say(f"export: {near(folder)} is up to date")
    else:
        told = f"{duration(done.report.seconds)} · peak {size(done.report.peak_bytes)}"
        screen.say(f"export: {exporting.target.title} · {outcome(done.run.results)} · {told}")
    for note in exporting.notes:
        screen.say(f"  {note}")


def outcome(results: Mapping[str, Any]) -> str:
    """Modules, precision and exactness of an export."""
    errors: Mapping[str, float] = results["errors"]
    many = f"{counted(len(errors), 'module')} in {results['precision']}"
    changed = sum(error > 0 for error in errors.values())
    if not changed:
        return f"{many} · read back: every update as it was"
    return f"{many} · read back: {counted(changed, 'update')} rounded, by {max(errors.values()):.1g} at most"


def register(root: typer.Typer) -> None:
    """Add `lora export` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora export peft pool/tarn/mirror -o plain",
            "lora export mlx pool/mossy/double --dtype fp16 --json",
            "lora export vllm pool/tarn/mirror --dry-run",
        ),
    )(with_flags(export))
