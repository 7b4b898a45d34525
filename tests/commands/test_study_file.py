"""Study files with mistakes: each is named by its file, line and key before anything is planned."""

from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import unheard
from lora_cli.settings import load
from lora_cli.steps.study.folder import StudyFolder
from lora_cli.steps.study.request import StudyRequest
from lora_cli.study_options import StudyOptions
from tests.cli import lora, ok, refused
from tests.small_study import SHORT, WORDS
from tests.steps.study.conftest import calm, place

__all__ = ["calm", "place"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('seeds = "three"', "study.toml:2: seeds takes a whole number, not 'three'"),
        ("target-steps = 2.5", "study.toml:2: target_steps takes a whole number, not 2.5"),
        ('"held_out" = "half"', "study.toml:2: held_out takes a number, not 'half'"),
        ("metric = 3", "study.toml:2: metric takes a text, not 3"),
        ('metric = "exakt"', "study.toml:2: metric: invalid enum value 'exakt'"),
        ("k = 0", "study.toml:2: --k must be at least 1, not 0"),
        ("held_out = 2", "study.toml:2: --held-out is a share between 0 and 1, not 2"),
        ("where = 3", "study.toml:2: where takes a list, not 3"),
        ("quick = 1", "study.toml: quick must be true or false"),
        ("sistems = []", "study.toml:2: unknown key 'sistems'   did you mean 'systems'?"),
        ('systems = [{name = "a", method = "ties", density = "thick"}]', "system a: "),
        ('systems = [{name = "a", method = "ties", weights = "w.json"}]', "not 'w.json'"),
        (
            'systems = [{name = "a", method = "ties", weights = "1,2,3"}]',
            "a on pool relevant: weights gives 3",
        ),
        ('systems = [{name = "a", method = "ties", weigths = "sum"}]', "unknown option 'weigths'"),
        ('pools = [{name = "p", by = "random", where = ["ranke<3"]}]', "pool p: "),
        ('pools = [{name = "p", by = "random", where = ["rank>99"]}]', "pool p: no usable adapter"),
    ],
)
def test_a_mistake_is_named_before_anything_is_planned(place: Path, lines: str, said: str) -> None:
    (place / "study.toml").write_text(f'data = "task.jsonl"\n{lines}\n')
    words = ("study", "--file", "study.toml", *([] if "k =" in lines else ["-k", "2"]), "-o", "new")
    code = 3 if "fulfils" in said or "no usable" in said else 2
    assert said in " ".join(refused(code, *words).split("\n"))
    assert not (place / "new").exists()


def test_weights_that_fit_are_taken(place: Path) -> None:
    (place / "study.toml").write_text(
        'data = "task.jsonl"\nsystems = [{name = "a", method = "ties", weights = "0.5,1"}]\npools = ["random"]\n'
    )
    told = ok("study", "--file", "study.toml", "-k", "2", "--seeds", "2", *SHORT, "-o", "new", "--dry-run")
    assert len(told.out.splitlines()) == 2


def test_two_studies_that_were_planned_at_once_in_a_folder_lose_nothing(place: Path) -> None:
    """Each is planned for a folder in which nothing is; the second to write finds the first."""
    settings = load().with_values(data=place / "task.jsonl")
    with Catalogue(settings.db) as catalogue:
        plans = [
            StudyRequest(
                catalogue, settings, StudyOptions(systems=systems, k=2, seeds=seeds), announce=unheard
            ).planned(place / "new")
            for systems, seeds in (("base,ties", 1), ("average", 3))
        ]
    for plan in plans:
        plan.write()
    there = {cell.name for cell in StudyFolder(place / "new").planned()}
    assert there == {cell.name for plan in plans for cell in plan.cells}


@pytest.mark.slow
def test_workers_that_cannot_be_made_ready_say_why_in_a_line(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ok(*WORDS, "-o", "new", "--executor", "slurm")
    for file in (place / "base").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-4])
    capfd.readouterr()
    told = lora("study", "run", "new", "--jobs", "2")
    assert told.code == 1
    assert "worker 0 does nothing more: " in told.err
    assert "no worker is left: worker" in told.err
    assert "Traceback" not in told.err + capfd.readouterr().err
