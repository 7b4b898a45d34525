"""`lora study report`: a study as one HTML page, Markdown or JSON."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.commands.options import OUTPUT, Command, Document, examples, with_flags
from lora_cli.errors import OutputError, UsageError
from lora_cli.screen import near
from lora_cli.text import size

if TYPE_CHECKING:
    from lora_cli.reports.study_facts import Report

PAGES = (".html", ".htm", ".md")
BOLD = b"**"
"""The first bytes of a report in Markdown: its verdict comes first, in bold."""


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study or of a sequence.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The page, replaced if it is there.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Tables in short for a README, on stdout without -o.", rich_help_panel=OUTPUT),
    ] = False,
    *,
    form: Document,
) -> None:
    """Say whether recycling is worth it for the study's task, with the numbers behind it, as one HTML page.

    Of a sequence: whether merging keeps what was learnt, with the scores after each task.

    Every system is compared with the base, with a new LoRA on the same data and with random weights, on the same test
    examples. A difference that may be chance is called not separable, with the number of examples that would show it.
    The page asks for no other file, font or host, and has no script. Cells that failed or are missing are named. The
    same folder gives the same bytes.
    """  # fmt: skip
    screen = form.screen()
    if out is None and not markdown and not form.json:
        raise UsageError("nowhere to write the page", hint="give -o FILE.html, --markdown or --json")
    if out is None and markdown and form.json:
        raise UsageError("--markdown and --json exclude each other on stdout", hint="give -o FILE.md for the first")

    if out is not None and out.suffix not in PAGES and out.resolve().is_relative_to(folder.resolve()):
        raise OutputError(
            f"{out}: in a study's folder a report is called *.html or *.md", hint="all else there is the study's own"
        )

    from lora_cli.outputs import demand_own, whole_file
    from lora_cli.reports.page import BEGINNING
    from lora_cli.reports.study_tables import undone_in_words
    from lora_cli.steps.study.workers import is_sequence

    if out is not None:
        demand_own(out, (BEGINNING, BOLD), "report")
    found, page, schema, facts = (_of_sequence if is_sequence(folder) else _of_study)(folder, markdown)
    if warning := undone_in_words(found):
        screen.warn(warning)
    if out is not None:
        with whole_file(out) as file:
            file.write(page)
        screen.say(f"study: {found.verdict.summary} Report of {size(len(page))} in {near(out)}")
    if form.json:
        screen.document(schema, {"out": None if out is None else str(out), **_common(found), **facts})
    elif out is None:
        screen.text(page.decode())
    else:
        screen.text(f"{near(out)}\n")


def _of_study(folder: Path, markdown: bool) -> "tuple[Report, bytes, str, dict[str, Any]]":
    """The report of a study, its page, and what is data of it alone."""
    from dataclasses import asdict

    from lora_cli.reports.study import study_page
    from lora_cli.reports.study_facts import CONTROLS
    from lora_cli.reports.study_markdown import study_markdown
    from lora_cli.reports.study_tables import adapter_rows, gain_rows
    from lora_cli.steps.study.folder import StudyFolder
    from lora_cli.steps.study.report import study_report

    found = study_report(StudyFolder(folder))
    facts = {
        "gains": {control: gain_rows(found, control) for control in CONTROLS},
        "changes": None if found.changes is None else asdict(found.changes),
        "adapters": adapter_rows(found.adapters),
    }
    return found, study_markdown(found).encode() if markdown else study_page(found), "lora.study.report/1", facts


def _of_sequence(folder: Path, markdown: bool) -> "tuple[Report, bytes, str, dict[str, Any]]":
    """The same of a sequence."""
    from lora_cli.reports.sequence import SHOWN_CONTROLS, sequence_page
    from lora_cli.reports.sequence_markdown import sequence_markdown
    from lora_cli.reports.sequence_tables import lora_rows, order_rows, rule_rows, task_rows
    from lora_cli.reports.study_tables import gain_rows
    from lora_cli.steps.study.sequence.folder import SequenceFolder
    from lora_cli.steps.study.sequence.report import sequence_report

    found = sequence_report(SequenceFolder(folder))
    facts = {
        "gains": {control: gain_rows(found, control) for control in SHOWN_CONTROLS},
        "tasks": task_rows(found),
        "rules": rule_rows(found),
        "order": order_rows(found),
        "loras": lora_rows(found),
    }
    page = sequence_markdown(found).encode() if markdown else sequence_page(found)
    return found, page, "lora.sequence.report/1", facts


def _common(found: "Report") -> dict[str, Any]:
    """What both have."""
    from dataclasses import asdict

    from lora_cli.reports.study_tables import score_rows

    return {
        "metric": found.metric,
        "better": found.better,
        "n": found.n,
        "cells": found.planned,
        "done": found.done,
        "about": dict(found.about),
        "verdict": asdict(found.verdict),
        "scores": score_rows(found),
        "failed": dict(found.failed),
        "missing": [*found.missing],
    }


def register(root: typer.Typer) -> None:
    """Add `lora study report` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora study report study -o study.html",
            "lora study report study --markdown",
            "lora study report study --json",
        ),
    )(with_flags(report))
