"""`lora push`: a result onto the Hub, the only command that writes there."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lora_cli.commands.options import Command, Document, Stored, examples, with_flags
from lora_cli.errors import UsageError
from lora_cli.licences import PolicyFlag
from lora_cli.options import Flag, Options
from lora_cli.screen import Screen
from lora_cli.text import counted, in_words, size


class Licensed(Stored, frozen=True, kw_only=True):
    """`Stored`, and the policy on licences."""

    license_policy: PolicyFlag = None


class PushOptions(Options, frozen=True, kw_only=True):
    """How a result is pushed."""

    yes: Annotated[bool, Flag(help="Make a public repository without a question.", short="-y")] = False
    dry_run: Annotated[bool, Flag(help="Print files, sizes and card as data; no login, no request.")] = False


def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of a result.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.", show_default=False)],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Whether a new repository is private.", show_default="public"),
    ] = None,
    *,
    setup: Licensed,
    options: PushOptions,
    form: Document,
) -> None:
    """Upload the adapter in a result's folder to the Hub, as one commit.

    Goes there: configuration, weights, run.json, coefficients, and a model card with parents, settings, scores and
    ways to load it; a README.md of your own goes in place of the card. A repository that does not exist is made; a
    public one only after a question, or with --yes. What is there already is not pushed again.
    """
    from lora_cli.steps.push.request import UP_TO_DATE, PushRequest

    screen, settings = form.screen(), setup.load()
    with screen.progress() as progress:
        request = PushRequest(folder, repo, settings, dry=options.dry_run, announce=screen.say, progress=progress)
    result = request.result
    said = [
        request.notice,
        _of_base(request.base_off_hub),
        _of_card(bool(result.own_card)),
        _of_files(result.unchecked),
    ]
    for line in filter(None, said):
        screen.say(line)
    if options.dry_run:
        screen.document("lora.push.plan/1", request.plan)
        return
    with screen.progress() as progress:
        found = request.look(progress)
    if found is None and not private and not options.yes:
        _demand_agreement(screen, repo)
    with screen.progress() as progress:
        pushed = request.run(found, private=bool(private), progress=progress)
    if form.json:
        screen.document(
            "lora.push/1",
            {
                "repo": pushed.repo,
                "commit": pushed.commit,
                "url": pushed.url,
                "private": pushed.private,
                "status": "pushed" if pushed.fresh else UP_TO_DATE,
                "files": request.plan["files"],
            },
        )
    else:
        screen.text(f"{pushed.url}\n")
    place = f"{pushed.repo}@{pushed.commit[:8]}"
    if not pushed.fresh:
        screen.say(f"push: {place} is up to date")
        return
    files = counted(len(request.uploads), "file")
    kind = "private" if pushed.private else "public"
    screen.say(f"push: {place} · {files}, {size(request.plan['bytes'])} · {kind}")


def _of_base(name: str) -> str:
    """The line about a base that others cannot load."""
    return (
        f"  adapter_config.json names the base {name}, which is no id of the Hub: others cannot load it" if name else ""
    )


def _of_card(own: bool) -> str:
    """The line about a README.md that is not lora's."""
    return "  README.md is your own and goes as it is; without it, lora writes the card" if own else ""


def _of_files(unchecked: Sequence[str]) -> str:
    """The line about files whose hash the record does not hold."""
    return f"  not compared, for run.json has no hash of it: {in_words(unchecked)}" if unchecked else ""


def at_a_terminal() -> bool:
    """Whether a user can be asked."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _demand_agreement(screen: Screen, repo: str) -> None:
    """UsageError unless the user, at a terminal, agrees to a public repository."""
    if not at_a_terminal():
        raise UsageError(
            f"{repo} does not exist, and would be public", hint="give --private, or --yes for a public one"
        )
    screen.say(f"{repo} does not exist: make it, public for everybody? [y/N]")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UsageError(f"{repo} was not made", hint="--private makes it for you alone")


def register(root: typer.Typer) -> None:
    """Add `lora push` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora push merged me/mirrored --dry-run",
            "lora push fitted me/fitted --private --dry-run --json",
        ),
    )(with_flags(push))
