"""A study that was done once in peace, for tests to compare with."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import small_study
from tests.cli import ok


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a base, a pool, a catalogue and the finished study `calm`; do not write into it."""
    before, db = Path.cwd(), os.environ.pop("LORA_DB", None)
    folder = small_study.build(tmp_path_factory.mktemp("small") / "place")
    os.chdir(folder)
    small_study.catalogued()
    ok(*small_study.WORDS, "-o", "calm", "--jobs", "1")
    yield folder
    os.chdir(before)
    if db is not None:
        os.environ["LORA_DB"] = db


@pytest.fixture
def place(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder in which the test stands."""
    folder = shutil.copytree(calm, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LORA_DB", raising=False)
    return folder
