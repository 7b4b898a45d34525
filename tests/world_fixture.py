"""The small world that the tests share: built once, it takes about ten seconds."""

import shutil
from pathlib import Path

import pytest

from lora_cli.world import World, build, load
from tests.shared import made_once


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world of size test, shared by all tests: read it, do not write into it."""
    return load(made_once(tmp_path_factory, "world", lambda folder: build(folder, size="test")))


@pytest.fixture
def own_world(world: World, tmp_path: Path) -> World:
    """A copy of the shared world that the test may write into."""
    return load(shutil.copytree(world.folder, tmp_path / "own-world"))
