"""Members of an open folder are files: their names come from the file names, a method's knobs from its signature.

A file holds one object, named as the file: a method is a function marked `@method(...)`. Names, help and knobs are read
from the source text, so that `--help` and completion list every member without importing torch; the code is imported
when the member is used.
"""

import ast
import importlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lora_cli.errors import UsageError
from lora_cli.text import in_words, nearest

F = TypeVar("F", bound=Callable[..., Any])

SECTIONS = ("Weights", "Cost", "Use", "Source")
"""The paragraphs in a merge method's docstring after its formula, each under its name and a colon."""
_SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):\s", re.MULTILINE)


def method(
    kind: str,
    *,
    weights: str = "average",
    inside: tuple[str, ...] = (),
    needs: str = "",
    score: str = "",
    better: str = "",
    lr: float = 0.0,
    ordered: bool = False,
) -> Callable[[F], F]:
    """Mark the one public function of a method file.

    Args:
        kind: the engine that runs the method.
        weights: the default weight of each adapter: "average" (1/N) or "sum" (1).
        inside: methods of the same folder that this one can run inside, the default first; the user chooses with
            `--inside`, and the inner method's knobs are then accepted too.
        needs: further input of the method: "inputs".
        score: the score that a metric makes of its values: "share" of those that are true, or their "mean".
        better: the direction of a metric: "higher" or "lower".
        lr: the usual learning rate of a fit by gradient descent.
        ordered: whether the result of a merge depends on the order in which the adapters are given.
    """

    def mark(function: F) -> F:
        return function

    return mark


@dataclass(frozen=True, slots=True)
class Knob:
    """An option of a method: written in the annotation as `Annotated[float, Knob("help", low=0, high=1)]`.

    `low` and `high` are inclusive bounds; `above` and `below` exclusive ones.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    name: str = ""
    type: type = str
    default: Any = None
    choices: tuple[str, ...] = ()

    def check(self, method_name: str, value: Any) -> Any:
        """`value` as this knob's type, or UsageError with the method, the knob and the allowed values."""
        flag = f"--{self.name.replace('_', '-')}"
        if self.choices and value not in self.choices:
            raise UsageError(f"{method_name}: {flag} is one of {', '.join(self.choices)}, not {value!r}")
        types: Any = (int, float) if self.type is float else self.type
        if not isinstance(value, types):
            raise UsageError(f"{method_name}: {flag} takes {self.type.__name__}, not {value!r}")
        outside = (
            (self.low is not None and not value >= self.low)
            or (self.high is not None and not value <= self.high)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )
        if outside:
            raise UsageError(f"{method_name}: {flag} {value} is out of range: {self.range()}")
        if self.type is float and not math.isfinite(value):
            raise UsageError(f"{method_name}: {flag} takes a finite number, not {value}")
        return value

    def range(self) -> str:
        """The allowed values in words: `0 < x <= 1`."""
        left = f"{self.low:g} <= " if self.low is not None else f"{self.above:g} < " if self.above is not None else ""
        right = (
            f" <= {self.high:g}" if self.high is not None else f" < {self.below:g}" if self.below is not None else ""
        )
        return f"{left}x{right}" if left or right else ""


@dataclass(frozen=True, slots=True)
class Method:
    """The facts about a method, from its file."""

    name: str
    kind: str
    doc: str
    knobs: Mapping[str, Knob]
    weights: str = "average"
    needs: str = ""
    score: str = ""
    better: str = ""
    lr: float = 0.0
    ordered: bool = False
    module: str = ""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return self.doc.splitlines()[0]

    @property
    def formula(self) -> str:
        """The part of its docstring between the first line and the first of SECTIONS."""
        return _SECTION.split(self.doc, maxsplit=1)[0].removeprefix(self.summary).strip("\n")

    @property
    def sections(self) -> dict[str, str]:
        """The SECTIONS in its docstring, in its order."""
        _, *parts = _SECTION.split(self.doc)
        return {name: text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}

    @property
    def arxiv(self) -> str:
        """The arXiv number of the first paper in its Source; "" for none."""
        found = re.search(r"arXiv[: ](\d{4}\.\d{4,5})", self.sections.get("Source", ""))
        return found[1] if found else ""


class MethodFolder:
    """The methods of one package, by file name.

    Args:
        package: dotted name of the folder, such as "lora_cli.merge_methods".
        what: the word for one method in messages, such as "merge method".
    """

    def __init__(self, package: str, what: str) -> None:
        self.package = package
        self.what = what
        self.folder = Path(__file__).parent.joinpath(*package.split(".")[1:])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Every method of the folder by name, in alphabetical order."""
        files = sorted(file for file in self.folder.rglob("*.py") if not file.stem.startswith("_"))
        found = (_read(file, ".".join(file.relative_to(self.folder).with_suffix("").parts)) for file in files)
        return {one.name: one for one in sorted(found, key=lambda one: one.name)}

    @cached_property
    def knobs(self) -> dict[str, dict[str, Knob]]:
        """Every knob of the folder: knob name → method name → knob."""
        found: dict[str, dict[str, Knob]] = {}
        for name, one in self.methods.items():
            for knob in one.knobs.values():
                found.setdefault(knob.name, {})[name] = knob
        return found

    def get(self, name: str) -> Method:
        """The method called `name`; UsageError with the nearest names if there is none."""
        if name not in self.methods:
            hint = nearest(name, self.methods, f"there are {', '.join(self.methods)}")
            raise UsageError(f"unknown {self.what} {name!r}", hint=hint)
        return self.methods[name]

    def knobs_of(self, name: str) -> dict[str, Knob]:
        """Every knob of method `name`, and of the methods that it can run inside."""
        own = self.get(name).knobs
        inside = own["inside"].choices if "inside" in own else ()
        return {**own, **{knob: value for one in inside for knob, value in self.get(one).knobs.items()}}

    def check(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs of method `name`, `given` values over defaults; UsageError for a knob it lacks or out of range.

        The knobs of the method inside are included.
        """
        knobs = dict(self.get(name).knobs)
        if "inside" in knobs:
            chosen = knobs["inside"].check(name, given.get("inside", knobs["inside"].default))
            knobs |= self.get(chosen).knobs
            name = f"{name} with {chosen} inside"
        for knob in given:
            if knob not in knobs:
                flag = f"--{knob.replace('_', '-')}"
                takes = ", ".join(f"--{k.replace('_', '-')}" for k in knobs) or "no options of its own"
                others = f"; {flag} is an option of {in_words([*self.knobs[knob]])}" if knob in self.knobs else ""
                raise UsageError(f"{self.what} {name} takes no {flag}", hint=f"{name} takes {takes}{others}")
        return {key: knob.check(name, given[key]) if key in given else knob.default for key, knob in knobs.items()}

    def load(self, name: str) -> Callable[..., Any]:
        """Import the method called `name` and return its function."""
        module = importlib.import_module(f"{self.package}.{self.get(name).module}")
        function: Callable[..., Any] = getattr(module, self.get(name).module.rpartition(".")[2])
        return function


def file_names(package: str, kind: str = "") -> tuple[str, ...]:
    """The names of the members of an open folder, in alphabetical order, without importing one.

    Args:
        kind: only those whose file holds a class of this kind.
    """
    folder = Path(__file__).parent.joinpath(*package.split(".")[1:])
    files = [file for file in folder.glob("*.py") if not file.stem.startswith("_")]
    return tuple(sorted(_name(file) for file in files if not kind or f"({kind}):" in file.read_text(encoding="utf-8")))


def member(package: str, name: str) -> Any:
    """Import the file called `name` in an open folder, and return its object."""
    stem = re.sub(r"[-.]", "_", name)
    return getattr(importlib.import_module(f"{package}.{stem}"), stem)


def _name(file: Path) -> str:
    """The name of a file's member: `pi_tuning` is pi-tuning, and between digits stands a dot, as in arXiv numbers."""
    return re.sub(r"(?<=\d)_(?=\d)", ".", file.stem).replace("_", "-")


def _read(file: Path, module: str) -> Method:
    """Read the facts about the one marked function of `file`, without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == file.stem]
    if len(functions) != 1:
        raise TypeError(f"{file.name} must hold one function called {file.stem}")
    [function] = functions
    marks = [
        mark
        for mark in function.decorator_list
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "method"
    ]
    doc = ast.get_docstring(function)
    if len(marks) != 1 or not doc:
        raise TypeError(f"{file.name}: {file.stem} needs one @method(...) and a docstring")
    said = {word.arg: ast.literal_eval(word.value) for word in marks[0].keywords if word.arg}
    knobs = {}
    if inside := said.pop("inside", ()):
        knobs["inside"] = Knob(
            "method that merges in the space found", name="inside", default=inside[0], choices=inside
        )
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is None:
            raise TypeError(f"{file.name}: knob {argument.arg} needs a default")
        knobs[argument.arg] = _knob(file, argument, ast.literal_eval(default))
    return Method(_name(file), ast.literal_eval(marks[0].args[0]), doc, knobs, module=module, **said)


def _knob(file: Path, argument: ast.arg, default: Any) -> Knob:
    match argument.annotation:
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, ast.Call(args=[text]) as call])):
            bounds = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
            choices: tuple[str, ...] = ()
            if isinstance(kind, ast.Subscript):
                choices = tuple(ast.literal_eval(kind.slice))
            return Knob(
                ast.literal_eval(text),
                **bounds,
                name=argument.arg,
                type=type(default),
                default=default,
                choices=choices,
            )
    raise TypeError(f"{file.name}: knob {argument.arg} must be annotated as Annotated[type, Knob(help, ...)]")
