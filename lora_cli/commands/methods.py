"""`lora methods`: the ways to merge, and what each of them does."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any

import typer

from lora_cli.commands.options import Csv, Json, Jsonl, Quiet, examples, screen_for
from lora_cli.methods import Knob, Method, MethodFolder
from lora_cli.screen import Column

METHODS = MethodFolder("lora_cli.merge_methods", "merge method")
CLASSES = {
    "exact low rank": "a weighted sum of factored updates, without error at rank Σ r_i; nothing dense is formed",
    "spectral": "singular values and subspaces of factored updates, rank Σ r_i at most; nothing dense is formed",
    "elementwise": "entry by entry on the dense updates, streamed; of full rank, and reduced afterwards",
    "A and B apart": "what others do to the factors, to have their results again; depends on how these are written",
}
"""What is computed on, from the simplest to what is there for comparison only."""
_CLASS_OF_KIND = {"low-rank": 0, "coefficients": 0, "factors": 0, "spectral": 1, "space": 1, "elementwise": 2}
DEFAULTS = {"average": "1/N each", "sum": "1 each"}
_WIDTH = 80

_COLUMNS = (
    Column("METHOD", "method"),
    Column("CLASS", "class"),
    Column("WEIGHTS", "weights", minor=True),
    Column("ARXIV", "arxiv", minor=True),
    Column("SUMMARY", "summary", wide=True),
)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[METHOD]",
            help="The method to explain.",
            show_default="all",
            autocompletion=lambda: [*METHODS.methods],
        ),
    ] = None,
    json: Json = False,
    jsonl: Jsonl = False,
    csv: Csv = False,
    quiet: Quiet = False,
) -> None:
    """List the merge methods, or explain one: its formula, its options, what it costs and when to use it.

    WEIGHTS is what every adapter weighs where merge is told nothing: average is 1/N each, sum is 1 each.
    """
    screen = screen_for(json, jsonl, csv, quiet)
    if name is None:
        rows = [row_of(one) for one in by_class(METHODS)]
        screen.rows("lora.methods/1", _COLUMNS, rows, identity="method")
    elif screen.format == "auto":
        screen.text(page(METHODS.get(name), METHODS))
    else:
        screen.document("lora.methods.one/1", facts_of(METHODS.get(name), METHODS), identity="method")


def class_of(one: Method) -> str:
    """Which of CLASSES a method belongs to."""
    return "A and B apart" if one.module.startswith("compat.") else [*CLASSES][_CLASS_OF_KIND[one.kind]]


def by_class(folder: MethodFolder) -> list[Method]:
    """The methods in the order of CLASSES, then by name."""
    order = [*CLASSES]
    return sorted(folder.methods.values(), key=lambda one: (order.index(class_of(one)), one.name))


def row_of(one: Method) -> dict[str, Any]:
    """A method in the list."""
    return {
        "method": one.name,
        "class": class_of(one),
        "weights": one.weights,
        "arxiv": one.arxiv,
        "summary": one.summary,
        "needs": one.needs,
    }


def facts_of(one: Method, folder: MethodFolder) -> dict[str, Any]:
    """All that a method says of itself."""
    return {
        **row_of(one),
        "formula": one.formula,
        "options": [_option(knob) for knob in one.knobs.values()],
        "inside": {name: [_option(knob) for knob in knobs] for name, knobs in inside(one, folder).items()},
        "sections": {name.lower(): text for name, text in one.sections.items()},
    }


def inside(one: Method, folder: MethodFolder) -> dict[str, list[Knob]]:
    """The methods that it can run inside itself, each with the options that come with it."""
    choices = one.knobs["inside"].choices if "inside" in one.knobs else ()
    return {name: [*folder.get(name).knobs.values()] for name in choices}


def page(one: Method, folder: MethodFolder) -> str:
    """A method explained in plain text, 80 columns wide."""
    parts = [f"{one.name} · {class_of(one)}", _filled(one.summary), _filled(one.formula)]
    if one.knobs:
        parts.append("Options\n" + _told([*one.knobs.values()]))
    parts += [f"Options with --inside {name}\n" + _told(knobs) for name, knobs in inside(one, folder).items() if knobs]
    for name, text in one.sections.items():
        note = f" ({DEFAULTS[one.weights]} unless told otherwise)" if name == "Weights" else ""
        parts.append(f"{name}{note}\n" + _filled(text))
    return "\n\n".join(part for part in parts if part) + "\n"


def blocks(text: str) -> Iterator[tuple[bool, str]]:
    """The paragraphs of a docstring, each with whether it is indented: a formula, whose lines stay as they are."""
    for indented, lines in groupby(text.splitlines(), lambda line: line[:1] == " " if line else None):
        if indented is not None:
            yield indented, textwrap.dedent("\n".join(lines))


def allowed(knob: Knob) -> str:
    """What an option takes, in words; "" for anything of its type."""
    return ", ".join(knob.choices) or knob.range()


def flag(knob: Knob) -> str:
    """How an option is written."""
    return f"--{knob.name.replace('_', '-')}"


def _option(knob: Knob) -> dict[str, Any]:
    return {
        "option": flag(knob),
        "type": knob.type.__name__,
        "default": knob.default,
        "allowed": allowed(knob),
        "help": knob.help,
    }


def _told(knobs: Sequence[Knob]) -> str:
    width = max(len(flag(knob)) for knob in knobs) + 4
    lines = []
    for knob in knobs:
        takes = f"{allowed(knob)}; " if allowed(knob) else ""
        text = f"  {flag(knob)}".ljust(width) + f"{knob.help} ({takes}default {knob.default})"
        lines += textwrap.wrap(text, _WIDTH, subsequent_indent=" " * width, break_on_hyphens=False)
    return "\n".join(lines)


def _filled(text: str) -> str:
    """Prose broken anew and formulas as they are, all indented by two."""
    filled = []
    for formula, block in blocks(text):
        if formula:
            filled.append(textwrap.indent(block, " " * 6))
        else:
            indent = " " * 2
            filled.append(
                textwrap.fill(block, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            )
    return "\n\n".join(filled)


def register(root: typer.Typer) -> None:
    """Add `lora methods` to the command tree."""
    root.command(epilog=examples("lora methods", "lora methods ties", "lora methods --json"))(methods)
