"""A study that was done once in peace, for tests to compare with."""

import os
import shutil
from pathlib import Path

import pytest

from tests import small_study
from tests.cli import ok
from tests.shared import made_once


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a pool, a catalogue and the finished study `calm`; do not write into it."""

    def make(folder: Path) -> None:
        home = tmp_path_factory.mktemp("home")
        small_study.build(folder)
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("LORA_")]:
                patch.delenv(name)
            for name in ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
                patch.setenv(name, str(home))
            patch.chdir(folder)
            small_study.catalogued()
            ok(*small_study.WORDS, "-o", "calm", "--jobs", "1")

    return made_once(tmp_path_factory, "study", make)


@pytest.fixture
def place(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder in which the test stands."""
    folder = shutil.copytree(calm, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORA_DB", raising=False)
    return folder
