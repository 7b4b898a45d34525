"""The house stands as docs/architecture.md draws it: floors, keepers of heavy imports, one file per method."""

import ast
import re
import tomllib
from collections.abc import Iterator

import pytest

from lora_cli.merge_options import METHODS
from lora_cli.methods import MethodFolder
from lora_cli.metrics import METRICS
from lora_cli.recipes import FIT_METHODS, SELECTION_METHODS
from tests.paths import ROOT

PACKAGE = ROOT / "lora_cli"

# Bottom up. A room may import rooms of its own floor and of lower ones; the longest matching name decides.
FLOORS = (
    (
        "errors",
        "precision",
        "records",
        "options",
        "text",
        "names",
        "files",
        "hashes",
        "columns",
        "redaction",
        "escapes",
        "licences",
    ),
    (
        "settings",
        "methods",
        "metrics",
        "recipes",
        "merge_options",
        "harness_options",
        "study_options",
        "outputs",
        "task",
        "scores",
        "screen",
        "plots",
        "reports",
        "hub",
    ),
    ("algebra",),
    ("formats", "checks", "imports"),
    ("catalogue",),
    ("models", "merge_methods", "selection_methods", "fit_methods", "sources", "exports"),
    ("steps.recorded", "steps.bases", "steps.task_view"),
    ("steps.pool",),
    ("steps.opened_pool",),
    ("steps.evaluate", "steps.train", "steps.bake", "steps.convert"),
    ("steps.merge",),
    ("steps.fit", "steps.export"),
    ("steps.memory", "steps.speed"),
    ("steps.estimate", "steps.select", "steps.push"),
    ("steps.estimate_eval",),
    ("steps.study",),
    ("executors",),
    ("world", "api"),
    ("commands",),
    ("app",),
    ("__main__",),
)  # fmt: skip
OPEN_FOLDERS = (
    "merge_methods/", "selection_methods/", "fit_methods/", "sources/", "exports/", "imports/", "metrics/",
    "executors/", "world/",
)  # fmt: skip
KEEPERS = {
    "torch": (
        "precision", "algebra", "formats.reader", "formats.writer", "formats.checkpoint", "formats.delta", "imports",
        "models", "merge_methods", "selection_methods", "fit_methods", "steps", "executors", "world",
    ),
    "transformers": ("models", "world"),
    "peft": ("models", "world"),
    "lm_eval": ("models.harness",),
    "gguf": ("formats.gguf", "imports.gguf"),
    "re2": ("formats.targets",),
    "tokenizers": ("world",),
    "msgspec": ("options", "recipes", "merge_options", "study_options", "steps", "commands"),
    "rapidfuzz": ("catalogue.adapters",),
    "safetensors": ("world", "models.new_adapter"),
    "huggingface_hub": ("hub",),
    "sqlite_utils": ("catalogue.sqlite",),
    "numba": ("algebra.compiled",),
    "scipy": ("steps", "checks.sketch"),
    "cma": ("steps.fit.search",),
    "ray": ("executors._ray_driver",),
    "matplotlib": ("plots",),
    "rich": ("screen",),
    "pyarrow": ("formats.tables",),
    "typer": ("app", "commands"),
    "click": (),
    "pickle": ("world",),
}  # fmt: skip


MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS, MOST_METHODS = 400, 60, 8, 30


def rooms() -> list[tuple[str, ast.Module]]:
    """Every module of the package by its name below it, parsed."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, ast.parse(file.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.Module, *, at_start: bool = False) -> Iterator[str]:
    """Dotted names a module imports; `at_start` leaves out what stands inside functions."""
    later = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) or _is_for_types(n)] if at_start else []
    inside = {id(n) for node in later for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def under(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def floor(name: str) -> int | None:
    for level, names in enumerate(FLOORS):
        if any(under(name, room) for room in names):
            return level
    return None


def breaches(name: str, tree: ast.Module) -> list[str]:
    """What one module does that its floor or the keepers forbid."""
    found = []
    here = floor(name)
    for imported in imports(tree):
        if imported.startswith("lora_cli."):
            there = floor(imported.removeprefix("lora_cli."))
            if here is None or (there is not None and there > here):
                found.append(f"{name} imports {imported} from a higher floor")
        package = imported.partition(".")[0]
        if package in KEEPERS and not any(under(name, keeper) for keeper in KEEPERS[package]):
            found.append(f"{name} imports {package}")
    return found


@pytest.mark.parametrize(
    ("folder", "ground"),
    [("merge_methods", ("algebra",)), ("fit_methods", ("models.mixture", "algebra.routing", "names")), ("metrics", ())],
)
def test_the_files_of_a_folder_of_methods_stand_on_little(folder: str, ground: tuple[str, ...]) -> None:
    allowed = ("methods", "errors", folder, *ground)
    for name, tree in rooms():
        if under(name, folder):
            used = {
                imported.removeprefix("lora_cli.") for imported in imports(tree) if imported.startswith("lora_cli.")
            }
            assert [one for one in used if not any(under(one, room) for room in allowed)] == [], name


def test_every_room_has_its_floor() -> None:
    assert [name for name, _ in rooms() if name not in ("", "steps") and floor(name) is None] == []


def test_the_drawing_names_every_room_and_no_other() -> None:
    drawing = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8").partition("**Floors**")[0]
    named = drawn_files(drawing)
    files = {file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py")}
    # Folders of methods and the embedded world are open: the drawing names them as a whole, with examples.
    rooms = {file for file in files if not file.startswith(OPEN_FOLDERS) and not file.endswith("/__init__.py")}
    assert rooms - named == set()
    assert named - files == set()


def drawn_files(drawing: str) -> set[str]:
    """The files of the tree in docs/architecture.md, by their path below the package."""
    folders: list[tuple[int, str]] = []
    files = set()
    for line in drawing.splitlines():
        names = re.match(r"( +)((?:\w+(?:\.py|/) ?)+)", line)
        if names is None:
            continue
        depth = len(names[1])
        folders = [(deep, folder) for deep, folder in folders if deep < depth]
        for name in names[2].split():
            if name.endswith("/"):
                folders.append((depth, name))
            else:
                files.add("".join(folder for _, folder in folders[1:]) + name)
    return files


def test_no_room_reaches_up_or_keeps_what_is_not_its_own() -> None:
    # The package itself is the door: it hands out what lies on higher floors, when it is asked for.
    assert [breach for name, tree in rooms() if name for breach in breaches(name, tree)] == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("catalogue", "from lora_cli.steps.merge.stream import merge"),
        ("formats.header", "import torch"),
        ("commands.pool.sync", "from huggingface_hub import HfApi"),
        ("steps.fit", "def f():\n    import peft"),
        ("screen", "import click"),
        ("errors", "from lora_cli import records, screen"),
    ],
)
def test_a_planted_breach_is_seen(room: str, line: str) -> None:
    assert breaches(room, ast.parse(line)) != []


def test_commands_import_nothing_heavy_at_the_start() -> None:
    heavy = (
        "torch", "transformers", "peft", "huggingface_hub", "sqlite_utils", "numpy", "scipy", "numba", "matplotlib",
        "lora_cli.steps", "rich",
    )  # fmt: skip
    found = []
    for name, tree in rooms():
        if under(name, "commands") or under(name, "app") or under(name, "settings") or under(name, "methods"):
            found += [f"{name}: {i}" for i in imports(tree, at_start=True) if any(under(i, h) for h in heavy)]
    assert found == []


def annotated_with_any(tree: ast.Module) -> list[int]:
    """The lines where a parameter or a result of a function is annotated `Any` alone."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        taken = function.args
        marks = [one.annotation for one in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
        marks += [one.annotation for one in (taken.vararg, taken.kwarg) if one is not None]
        found += [mark.lineno for mark in (*marks, function.returns) if isinstance(mark, ast.Name) and mark.id == "Any"]
    return found


def test_commands_name_the_types_of_their_values() -> None:
    assert annotated_with_any(ast.parse("def planted(one: int, *two: Any) -> Any: ...")) == [1, 1]
    found = {name: annotated_with_any(tree) for name, tree in rooms() if under(name, "commands")}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_nobody_loads_a_pickle_or_runs_what_it_reads() -> None:
    text = {file: file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    banned = r"torch\.load\(|pickle\.loads?\(|\beval\(|\bexec\(|trust_remote_code=True|yaml\.load\(|shell=True"
    assert [f"{file.name}: {m}" for file, t in text.items() for m in re.findall(rf"(?<![.\w])(?:{banned})", t)] == []


def test_no_expression_repeats_a_group_possessively() -> None:
    """Python before 3.11.5 matches such a repeat wrongly; one character may be repeated so."""
    text = {file: file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    assert [(file.name, found) for file, t in text.items() for found in re.findall(r"\)[*+?]\+|\(\?>", t)] == []


def test_one_room_writes_to_the_hub() -> None:
    text = {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py")}
    writers = r"create_commit|preupload_lfs_files|upload_f|repos/create|client\.(?:post|put|delete)\("
    assert [name for name, t in text.items() if re.search(writers, t)] == ["hub/push.py"]


def test_nobody_prints_beside_the_screen() -> None:
    talkers = [
        name
        for name, tree in rooms()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert talkers == []


@pytest.mark.parametrize(
    "folder", [METHODS, SELECTION_METHODS, FIT_METHODS, METRICS], ids=["merge", "select", "fit", "eval"]
)
def test_one_file_is_one_method_that_names_its_source(folder: MethodFolder) -> None:
    for name, one in folder.methods.items():
        assert callable(folder.load(name))
        assert one.summary.endswith("."), name
        assert "Source:" in one.doc or name == "downloads", name
        for knob in one.knobs.values():
            assert knob.help, (name, knob.name)


@pytest.mark.parametrize("name", sorted(METHODS.methods))
def test_a_merge_method_tells_its_weights_cost_use_and_source(name: str) -> None:
    sections = METHODS.get(name).sections
    assert [*sections] == ["Weights", "Cost", "Use", "Source"]
    assert all(text.endswith(".") for text in sections.values())


def too_long(file: str, text: str) -> list[str]:
    """What of a file is larger than the house allows: the file, its functions, their parameters, its classes.

    A docstring does not count: that of a method or a command is its page. The entry function of a command has one
    parameter per option.
    """
    found = [f"{file} has {count} lines"] if (count := len(text.splitlines())) > MOST_LINES else []
    room = file.removesuffix(".py").replace("/", ".")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) is not None and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1 + node.body[0].lineno - node.lineno
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            given = [one for one in arguments if one.arg not in ("self", "cls")]
            if lines > MOST_LINES_OF_A_FUNCTION:
                found.append(f"{room}.{node.name} has {lines} lines")
            if len(given) > MOST_PARAMETERS and not is_entry(file, node):
                found.append(f"{room}.{node.name} has {len(given)} parameters")
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(one, ast.FunctionDef) for one in node.body)
            if methods > MOST_METHODS:
                found.append(f"{room}.{node.name} has {methods} methods")
    return found


def is_entry(file: str, function: ast.FunctionDef) -> bool:
    """Whether Typer calls a function, with one parameter per option: it is in commands/ and takes the `setup`."""
    return file.startswith("commands/") and any(one.arg == "setup" for one in function.args.kwonlyargs)


def test_files_functions_and_classes_stay_small() -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        found += too_long(name, file.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n" * 401, "steps/x.py has 401 lines"),
        ("def f():\n" + "    x = 1\n" * 61, "steps.x.f has 62 lines"),
        ('def f():\n    """' + "\n" * 70 + '"""\n' + "    x = 1\n" * 61, "steps.x.f has 62 lines"),
        ("def f(a, b, c, d, e, *, f, g, h, i): ...", "steps.x.f has 9 parameters"),
        ("class C:\n" + "    def f(self): ...\n" * 31, "steps.x.C has 31 methods"),
    ],
)
def test_what_is_too_large_is_seen(text: str, said: str) -> None:
    assert too_long("steps/x.py", text) == [said]


def test_every_file_of_the_package_that_is_no_code_is_installed_with_it() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["lora_cli"]
    installed = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    assert installed
    found = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {file for file in found if file.suffix != ".py"} == installed


def test_only_the_top_level_that_was_asked_for() -> None:
    root = PACKAGE.parent
    allowed = {
        "pyproject.toml",
        "README.md",
        "lora_cli",
        "tests",
        "completions",
        "docs",
        "findings",
        "LICENSE",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    }
    visible = {p.name for p in root.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert visible - {"build", "lora-demo", "lora-runs"} <= allowed


# Rooms that read files of the package, of the system, or that they wrote themselves.
OWN_FILES = (
    "files", "methods", "world", "formats.base_names", "formats.run_record", "formats.writer", "catalogue.database",
    "steps.merge.inputs", "commands.completion", "reports.page",
)  # fmt: skip


def test_files_of_others_are_opened_by_one_room() -> None:
    """A pipe in a pool would hang whatever opens it as a file."""
    found = []
    for name, tree in rooms():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute) or any(under(name, room) for room in OWN_FILES):
                continue
            first = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
            if call.func.attr in ("read_text", "read_bytes") or (call.func.attr == "open" and str(first)[:1] == "r"):
                found.append(f"{name}:{call.lineno}")
    assert found == []
