"""`lora methods`: the merge methods and the presets of fit, and an explanation of each."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.options import Command, Listing, examples, with_flags
from lora_cli.errors import UsageError
from lora_cli.merge_options import METHODS
from lora_cli.methods import Knob, Method, MethodFolder
from lora_cli.recipes import FIT_METHODS
from lora_cli.text import nearest

CLASSES = ("exact low rank", "spectral", "elementwise", "A and B apart")
"""The classes of methods by the object they compute on; the last one is for reproducing others' results."""
PRESET = "preset of fit"
"""The class of the presets in the list."""
OF_FIT = "fit:"
"""The beginning of a preset's name in the list: a merge method may have the same name."""
_WAYS = {"gradient": "gradient descent", "search": "search without gradients", "routing": "routing, without learning"}
_CLASS_OF_KIND = {"low-rank": 0, "coefficients": 0, "factors": 0, "spectral": 1, "space": 1, "elementwise": 2}
DEFAULTS = {"average": "1/N each", "sum": "1 each"}
_WIDTH = 80
_SOLID = "\N{NO-BREAK SPACE}"

_COLUMNS = (
    Column("METHOD", "method"),
    Column("CLASS", "class"),
    Column("SUMMARY", "summary", wide=True, least=38),
    Column("WEIGHTS", "weights", minor=True),
    Column("ARXIV", "arxiv", minor=True),
    *on_request("needs"),
)


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="METHOD",
            help="The merge method or preset to explain; fit:NAME is always the preset.",
            show_default="all",
            autocompletion=lambda: [*METHODS.methods, *FIT_METHODS.methods],
        ),
    ] = None,
    *,
    listing: Listing,
) -> None:
    """List the merge methods and the presets of fit, or explain one: its formula, its options, and when to use it.

    WEIGHTS is the default weight of every adapter in a merge: average is 1/N each, sum is 1 each. fit:NAME is a preset
    of 'lora fit'.
    """
    screen = listing.screen()
    if name is None:
        rows = [row_of(one) for one in [*by_class(METHODS), *FIT_METHODS.methods.values()]]
        screen.rows("lora.methods/1", _COLUMNS, rows, identity="method", caption="lora methods METHOD explains one.")
        return
    one = called(name)
    if screen.format == "auto":
        screen.text(page_of_preset(one) if _is_preset(one) else page(one, METHODS))
    else:
        screen.document("lora.methods.one/1", facts_of(one, METHODS), identity="method")


def called(name: str) -> Method:
    """The merge method of this name, else the preset; UsageError with the nearest name if there is neither."""
    preset = name.removeprefix(OF_FIT)
    if preset != name or (name not in METHODS.methods and name in FIT_METHODS.methods):
        return FIT_METHODS.get(preset)
    if name not in METHODS.methods:
        known = [*METHODS.methods, *FIT_METHODS.methods]
        raise UsageError(f"unknown method {name!r}", hint=nearest(name, known, "lora methods lists all of them"))
    return METHODS.get(name)


def _is_preset(one: Method) -> bool:
    return one.kind in _WAYS


def class_of(one: Method) -> str:
    """The class of a method, from CLASSES, or PRESET."""
    if _is_preset(one):
        return PRESET
    return CLASSES[-1] if one.module.startswith("compat.") else CLASSES[_CLASS_OF_KIND[one.kind]]


def by_class(folder: MethodFolder) -> list[Method]:
    """The methods in the order of CLASSES, then by name."""
    return sorted(folder.methods.values(), key=lambda one: (CLASSES.index(class_of(one)), one.name))


def row_of(one: Method) -> dict[str, Any]:
    """A method in the list."""
    return {
        "method": f"{OF_FIT}{one.name}" if _is_preset(one) else one.name,
        "class": class_of(one),
        "weights": "" if _is_preset(one) else one.weights,
        "arxiv": one.arxiv,
        "summary": one.summary,
        "needs": one.needs,
    }


def facts_of(one: Method, folder: MethodFolder) -> dict[str, Any]:
    """All facts about a method, as data."""
    return {
        **row_of(one),
        "formula": one.formula,
        "options": [_option(knob) for knob in one.knobs.values()],
        "inside": {name: [_option(knob) for knob in knobs] for name, knobs in inside(one, folder).items()},
        "sections": {name.lower(): text for name, text in one.sections.items()},
    }


def inside(one: Method, folder: MethodFolder) -> dict[str, list[Knob]]:
    """The methods that a method can run inside, each with the options that it adds."""
    choices = one.knobs["inside"].choices if "inside" in one.knobs else ()
    return {name: [*folder.get(name).knobs.values()] for name in choices}


def page(one: Method, folder: MethodFolder) -> str:
    """A method explained in plain text, 80 columns wide."""
    needs = " · needs --data" if one.needs == "inputs" else ""
    within = [_told(f"With --inside {name}", knobs) for name, knobs in inside(one, folder).items()]
    also = f"lora methods {OF_FIT}{one.name} explains the preset of the same name." * (one.name in FIT_METHODS.methods)
    weights = f"weights {one.weights} ({DEFAULTS[one.weights]}) by default{needs}"
    return _page(f"{one.name} · {class_of(one)} · {weights}", one, *within, after=also)


def page_of_preset(one: Method) -> str:
    """A preset explained in plain text, 80 columns wide."""
    rate = f" · --lr {one.lr:g}" if one.lr else ""
    return _page(f"{one.name} · {PRESET} · by {_WAYS[one.kind]}{rate}", one)


def _page(heading: str, one: Method, *within: str, after: str = "") -> str:
    """The page of a method: `within` stands behind its options, `after` at the end."""
    parts = [
        heading,
        _filled(one.summary),
        _filled(one.formula),
        _told("Options and their defaults", [*one.knobs.values()]),
        *within,
        *(_labelled(name, text) for name, text in one.sections.items()),
        after,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def blocks(text: str) -> Iterator[tuple[bool, str]]:
    """The paragraphs of a docstring, each with whether it is indented. An indented one is a formula: keep its lines."""
    for indented, lines in groupby(text.splitlines(), lambda line: line[:1] == " " if line else None):
        if indented is not None:
            yield indented, textwrap.dedent("\n".join(lines))


def allowed(knob: Knob) -> str:
    """The allowed values of an option, in words; "" for any value of its type."""
    return ", ".join(knob.choices) or knob.range()


def flag(knob: Knob) -> str:
    """The option's name on the command line."""
    return f"--{knob.name.replace('_', '-')}"


def _option(knob: Knob) -> dict[str, Any]:
    return {
        "option": flag(knob),
        "type": knob.type.__name__,
        "default": knob.default,
        "allowed": allowed(knob),
        "help": knob.help,
    }


def _told(heading: str, knobs: Sequence[Knob]) -> str:
    if not knobs:
        return ""
    examples = [f"  {flag(knob)} {knob.default}" for knob in knobs]
    width = 2 + max(len(example) for example in examples)
    lines = [heading]
    for knob, example in zip(knobs, examples, strict=True):
        takes = allowed(knob).replace(" ", _SOLID) if not knob.choices else allowed(knob)
        text = f"{knob.help} ({takes})" if takes else knob.help
        lines.append(_wrapped(text, example.ljust(width), " " * width))
    return "\n".join(lines)


def _labelled(name: str, text: str) -> str:
    return _wrapped(text, name.ljust(9), " " * 9)


def _filled(text: str) -> str:
    """Prose re-wrapped, formulas line by line."""
    filled = []
    for formula, block in blocks(text):
        if formula:
            filled.append("\n".join(_wrapped(line, " " * 4, " " * 8) for line in block.splitlines()))
        else:
            filled.append(_wrapped(block, "", ""))
    return "\n\n".join(filled)


def _wrapped(text: str, first: str, rest: str) -> str:
    filled = textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace(_SOLID, " ")


def register(root: typer.Typer) -> None:
    """Add `lora methods` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples("lora methods", "lora methods ties", "lora methods adamerging", "lora methods --json"),
    )(with_flags(methods))
