"""`lora study`: is it worth to recycle the pool's adapters for a task? Its subcommands are files beside this one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_cli.commands.lazy import LazyGroup
from lora_cli.commands.options import OUTPUT, Listing, Loaded, Prompts, examples, with_flags
from lora_cli.commands.panels import write_panels
from lora_cli.commands.study.placing import Placing, demand_placing, placed
from lora_cli.commands.study.sequence import demand_fitting, sequence
from lora_cli.commands.study.shown import LINES, estimated, say_outcome, show_cells, show_table
from lora_cli.errors import UsageError
from lora_cli.licences import PolicyFlag
from lora_cli.options import Flag
from lora_cli.study_options import Asked, asked_options

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter


SUMMARIES = {
    "run": "Do the cells of a study's folder that have no result yet.",
    "collect": "Bring the folders of a study's shards together, and write its table.",
    "report": "Say whether recycling is worth it for the study's task, with the numbers behind it, as one HTML page.",
}


class Study(LazyGroup):
    """The `lora study` command, which runs a study without a subcommand."""

    package = "lora_cli.commands.study"
    summaries = SUMMARIES

    def format_options(self, ctx: "Context", formatter: "HelpFormatter") -> None:
        write_panels(self.get_params(ctx), ctx, formatter)
        self.format_commands(ctx, formatter)


class OnData(Loaded, frozen=True, kw_only=True):
    """`Loaded`, for a command that learns from some data and tests on others."""

    data: Annotated[Path | None, Flag(help="Task file, one JSON example per line.", default="the setting")] = None
    test: Annotated[
        Path | None, Flag(help="Task file for testing.", default="the setting, else a part of the data")
    ] = None
    license_policy: PolicyFlag = None


class Execution(Placing, frozen=True, kw_only=True):
    """The folder of a study, and where its cells are done."""

    out: Annotated[
        Path | None, Flag(help="The study's folder.", short="-o", default="below ./lora-runs", panel=OUTPUT)
    ] = None
    dry_run: Annotated[bool, Flag(help="Print the cells and change nothing.", panel=OUTPUT)] = False


def study(
    ctx: typer.Context,
    *,
    setup: OnData,
    asked: Asked,
    execution: Execution,
    listing: Annotated[Listing, LINES],
    prompts: Prompts,
) -> None:
    """Compare ways to recycle a pool's adapters for a task, with the controls that keep the answer honest.

    Each system is made from each pool by each seed, and scored on the same test examples: one cell. Cells have names
    that hold the hash of what decides them, so that done ones are never done again: a killed study goes on when it is
    run again, and systems or seeds that are added to it share what is there. A cell that fails is named, and the
    others go on (exit code 6).
    """
    if ctx.invoked_subcommand is not None:
        return
    screen, shard = listing.screen(), execution.part
    options, from_file = asked_options(asked)
    settings = setup.load(**{name: value for name, value in from_file.items() if getattr(setup, name, None) is None})
    demand_fitting(asked, options)
    demand_placing(execution)
    if options.sequence:
        if setup.data or setup.test:
            raise UsageError("--sequence takes no --data and no --test", hint="its tests are --sequence-test V1,V2")
        sequence(screen, settings, options, execution, prompts.prompting())
        return

    from lora_cli.catalogue.adapters import Catalogue
    from lora_cli.steps.study.estimate import Estimator
    from lora_cli.steps.study.plan import shard_of
    from lora_cli.steps.study.request import StudyRequest

    with screen.progress() as progress:
        with Catalogue(settings.db) as catalogue:
            request = StudyRequest(
                catalogue, settings, options, prompts.prompting(), announce=screen.say, progress=progress
            )
            planned = request.planned(execution.out)
        cells = shard_of(planned.cells, shard)
        if execution.dry_run:
            with estimated(screen, lambda: Estimator(planned, settings)) as estimator:
                show_cells(screen, planned, cells, estimator)
            return
        from lora_cli.steps.study.run import run_study

        planned.write()
        outcomes = placed(screen, planned.folder, cells, execution, progress)
        if outcomes is None:
            return
        told = partial(say_outcome, screen)
        ran = run_study(settings.db, planned, cells, outcomes, told=told, progress=progress)
    show_table(screen, ran.collected)
    ran.demand_all()


def register(root: typer.Typer) -> None:
    """Add `lora study` to the command tree."""
    app = typer.Typer(cls=Study, invoke_without_command=True)
    app.callback(
        epilog=examples(
            "lora study --quick --dry-run",
            "lora study --data task.jsonl --systems base,average,adaptive -k 3 --seeds 2 --steps 20 -o study",
            "lora study collect study",
            "lora study report study -o study.html",
        ),
    )(with_flags(study))
    root.add_typer(app, name="study")
