"""The part of `lora fit` that makes a router."""

from typing import TYPE_CHECKING

from lora_cli.commands.chosen import expand
from lora_cli.commands.fit import Licensed, verdict
from lora_cli.commands.options import DrawnJob, Prompts, downloads, show_output
from lora_cli.errors import UsageError
from lora_cli.recipes import FitOptions, Recipe, Shape
from lora_cli.screen import near
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.fit.write_router import RouteReport


def fit_router(
    adapters: list[str] | None,
    selection: str | None,
    setup: Licensed,
    shape: Shape,
    recipe: Recipe,
    options: FitOptions,
    job: DrawnJob,
    prompts: Prompts,
) -> None:
    """Write a router over adapters, and measure it if there is a task."""
    screen, settings = job.screen(), setup.load()
    task = None if settings.data is None else setup.task(settings)
    if job.plot is not None:
        raise UsageError(f"{shape.preset} takes no --plot: it learns nothing", hint="lora eval --plot draws scores")
    if task is None and prompts != Prompts():
        raise UsageError("options about prompts need examples", hint="give --data FILE.jsonl")

    from lora_cli.steps.fit.route import RouteRequest
    from lora_cli.steps.opened_pool import open_pool

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = pool.unweighted(expand(adapters or []), selection, verb="fit")
        request = RouteRequest(pool, names, settings, shape, recipe, options, task=task)
        if job.dry_run and (absent := request.absent()):
            screen.document("lora.fit.plan/1", {"out": None, **downloads(absent)})
            return
        routing = request.prepare(prompts.prompting(), out=job.out)
        folder = routing.job.folder
        if job.dry_run:
            plan = {"out": str(folder), "adapters": len(routing.plan.adapters), **routing.job.settings}
            screen.document("lora.fit.plan/1", plan)
            return
        done = routing.run(settings.db, force=job.force, progress=progress)
    show_output(screen, "lora.fit/1", folder, done.run.record())
    for line in [f"fit: {near(folder)} is up to date"] if done.report is None else outcome(done.report):
        screen.say(line)
    if routing.notice:
        screen.say(f"  {routing.notice}")


def outcome(report: "RouteReport") -> list[str]:
    """The summary of a router: what it is, who can run it, and a line on each comparison."""
    router, measured = report.router, report.measured
    made = f"fit: router of {counted(len(router.adapters), 'adapter')} in {counted(report.modules, 'module')}"
    runs = "lora eval and PEFT's Arrow run it" if router.peft else f"lora eval runs it; {router.why_not}"
    lines = [f"{made} by {router.preset}; no single LoRA equals it", f"  {runs}"]
    if measured is not None:
        base = measured.comparisons[0]
        of = counted(measured.n_validation, "validation example")
        lines.append(f"  validation loss {base.loss:.3f} → {measured.loss:.3f}, {of}")
        lines += [f"  {verdict(one)}" for one in measured.comparisons]
    return lines
