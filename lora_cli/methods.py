"""Methods are files in a folder: their names come from the file names, their knobs from the signatures.

A method file holds one function, named as the file, marked `@method(...)`. Names, help and knobs are read from the
source text, so that `--help` and completion list every method without importing torch; the code is imported when the
method is used.
"""

import ast
import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lora_cli.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


def method(kind: str) -> Callable[[F], F]:
    """Mark the one public function of a method file; `kind` says which engine runs it."""

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
        """`value` as this knob's type, or UsageError naming the method, the knob and what it takes."""
        flag = f"--{self.name.replace('_', '-')}"
        if self.choices and value not in self.choices:
            raise UsageError(f"{method_name}: {flag} is one of {', '.join(self.choices)}, not {value!r}")
        outside = (
            (self.low is not None and not value >= self.low)
            or (self.high is not None and not value <= self.high)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )
        if outside:
            raise UsageError(f"{method_name}: {flag} {value} is out of range: {self.range()}")
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
    """What a method file says about itself."""

    name: str
    kind: str
    doc: str
    knobs: Mapping[str, Knob]

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return self.doc.splitlines()[0]


class MethodFolder:
    """The methods of one package, by file name.

    Args:
        package: dotted name of the folder, such as "lora_cli.merge_methods".
        what: how messages call one of them, such as "merge method".
    """

    def __init__(self, package: str, what: str) -> None:
        self.package = package
        self.what = what
        self.folder = Path(__file__).parent.joinpath(*package.split(".")[1:])

    @cached_property
    def methods(self) -> dict[str, Method]:
        """Every method of the folder by name, in alphabetical order."""
        files = sorted(file for file in self.folder.glob("*.py") if not file.stem.startswith("_"))
        return {_name(file): _read(file) for file in files}

    @cached_property
    def knobs(self) -> dict[str, dict[str, Knob]]:
        """Every knob of the folder: knob name → method name → knob."""
        found: dict[str, dict[str, Knob]] = {}
        for name, one in self.methods.items():
            for knob in one.knobs.values():
                found.setdefault(knob.name, {})[name] = knob
        return found

    def get(self, name: str) -> Method:
        """The method called `name`; UsageError with the nearest names when there is none."""
        if name not in self.methods:
            near = difflib.get_close_matches(name, self.methods, n=1)
            raise UsageError(
                f"unknown {self.what} {name!r}",
                hint=f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.methods)}",
            )
        return self.methods[name]

    def check(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All knobs of method `name`, `given` values over defaults; UsageError for a knob it lacks or out of range."""
        one = self.get(name)
        for knob in given:
            if knob not in one.knobs:
                flag = f"--{knob.replace('_', '-')}"
                takes = ", ".join(f"--{k.replace('_', '-')}" for k in one.knobs) or "no options of its own"
                raise UsageError(f"{self.what} {name} takes no {flag}", hint=f"{name} takes {takes}")
        return {key: knob.check(name, given[key]) if key in given else knob.default for key, knob in one.knobs.items()}

    def load(self, name: str) -> Callable[..., Any]:
        """Import the method called `name` and return its function."""
        self.get(name)
        stem = name.replace("-", "_")
        function: Callable[..., Any] = getattr(importlib.import_module(f"{self.package}.{stem}"), stem)
        return function


def _name(file: Path) -> str:
    return file.stem.replace("_", "-")


def _read(file: Path) -> Method:
    """Read name, kind, docstring and knobs of the one marked function of `file` without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == file.stem]
    if len(functions) != 1:
        raise TypeError(f"{file.name} must hold one function called {file.stem}")
    [function] = functions
    kinds = [
        ast.literal_eval(mark.args[0])
        for mark in function.decorator_list
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "method"
    ]
    doc = ast.get_docstring(function)
    if len(kinds) != 1 or not doc:
        raise TypeError(f"{file.name}: {file.stem} needs one @method(...) and a docstring")
    knobs = {}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is None:
            raise TypeError(f"{file.name}: knob {argument.arg} needs a default")
        knobs[argument.arg] = _knob(file, argument, ast.literal_eval(default))
    return Method(_name(file), kinds[0], doc, knobs)


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
