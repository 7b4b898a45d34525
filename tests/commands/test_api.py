"""The door for notebooks: the examples of docs/python.md run, and do what the commands do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_cli
from lora_cli.errors import LoraError, UsageError
from lora_cli.world import World
from tests.cli import ok
from tests.paths import ROOT

DOCS = ROOT / "docs" / "python.md"


@pytest.fixture
def here(own_world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small world of one's own, its pool in the catalogue."""
    monkeypatch.chdir(own_world.folder)
    ok("pool", "sync")
    return own_world.folder


@pytest.mark.slow
def test_the_examples_of_the_page_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    told = capsys.readouterr().out
    assert "unknown merge method 'tie' - did you mean 'ties'?" in told
    assert len(re.findall(r"^\S+ +\d+\.\d{3} \[\d+\.\d{3}, \d+\.\d{3}\]$", told, flags=re.MULTILINE)) == 3
    for name in ("merged", "twice", "fitted", "trained", "baked"):
        folder = names[name]
        assert isinstance(folder, Path)
        assert (folder / "run.json").is_file()


def test_python_and_the_commands_make_the_same_result_once(here: Path) -> None:
    names = ok("pool", "list", "-q", "--where", "status=ok", "-n", "2").out.splitlines()
    folder = Path(ok("merge", *names, "-m", "ties", "--density", "0.4", "--lambda", "2").out.strip())
    before = (folder / "adapter_model.safetensors").stat().st_ino
    with lora_cli.open_pool() as pool:
        again = pool.merge(names, method="ties", density=0.4, lambda_=2)
        assert again.resolve() == folder.resolve()
        assert (folder / "adapter_model.safetensors").stat().st_ino == before
        pool.merge(names, method="ties", density=0.4, lambda_=2, force=True)
    assert (folder / "adapter_model.safetensors").stat().st_ino != before
    runs = json.loads(ok("runs", "list", "--json").out)["rows"]
    assert [run["command"] for run in runs] == ["merge"] * 3


def test_learnt_coefficients_are_merged_as_the_command_merges_them(here: Path) -> None:
    with lora_cli.open_pool() as pool:
        fitted = pool.fit("task.jsonl", pool.select(k=2), steps=5)
        merged = pool.merge(coef=str(fitted / "coefficients.json"))
    assert json.loads((merged / "run.json").read_text())["settings"]["method"] == "linear"
    assert Path(ok("merge", "--coef", str(fitted / "coefficients.json")).out.strip()).resolve() == merged.resolve()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pool: pool.merge(["x"], densty=0.3), "unknown option 'densty'"),
        (lambda pool: pool.merge(["x"], missing="skip"), "missing"),
        (lambda pool: pool.merge(["x"], method="ties", density=2.0), "density"),
        (lambda pool: pool.fit("task.jsonl", steps="many"), "steps"),
        (lambda pool: pool.fit("task.jsonl", ["x=0.5"]), "fit takes adapters without =WEIGHT"),
        (lambda pool: pool.evaluate("task.jsonl", ["x=0.5"]), "eval takes adapters without =WEIGHT"),
        (lambda pool: pool.train("task.jsonl", rnk=4), "unknown option 'rnk'"),
        (lambda pool: pool.evaluate("task.jsonl", ["x"], metric="bleu"), "metric"),
        (lambda pool: lora_cli.open_pool(sede=1), "unknown setting 'sede'"),
        (lambda pool: pool.list("rnk<=3"), "rnk"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(here: Path, call: object, words: str) -> None:
    assert callable(call)
    with lora_cli.open_pool() as pool, pytest.raises(UsageError) as caught:
        call(pool)
    assert words in f"{caught.value.message} {caught.value.hint}"
    assert not (here / "lora-runs").exists()


def test_a_frame_has_a_column_per_fact(here: Path) -> None:
    pandas = pytest.importorskip("pandas")
    with lora_cli.open_pool() as pool:
        frame = pool.frame("status=ok")
        assert isinstance(frame, pandas.DataFrame)
        assert list(frame["id"]) == [row.id for row in pool.list("status=ok")]


def test_the_package_itself_imports_nothing() -> None:
    code = (
        "import sys, lora_cli; print(sorted({'torch', 'msgspec', 'lora_cli.api'} & set(sys.modules)), lora_cli.errors)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("[] <module 'lora_cli.errors'")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_cli.nothing


def test_errors_say_what_the_commands_say(here: Path) -> None:
    with lora_cli.open_pool() as pool, pytest.raises(LoraError) as caught:
        pool.merge(["pool/nobody/none"])
    assert caught.value.message == "pool/nobody/none: no such folder and not in the catalogue"
    assert caught.value.exit_code == 3
