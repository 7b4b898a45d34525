"""Every test has its own home: no test sees the user's settings, catalogue, Hub login or cache, or leaves 127.0.0.1."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.fake_hub import FakeHub

_HOME = tempfile.mkdtemp(prefix="lora-tests-")
# huggingface_hub reads these once, when it is imported. Nothing listens on port 9.
os.environ.update(
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HOME=f"{_HOME}/hf",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    NO_PROXY="127.0.0.1",
    TOKENIZERS_PARALLELISM="false",
    # Tests run beside each other: a thread that waits must not take a core from another test.
    OMP_WAIT_POLICY="PASSIVE",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)

pytest_plugins = ["tests.world_fixture"]
_LONGEST = ("whole", "commands", "executors", "world")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders of the longest tests: the last files must not keep all processes but one waiting."""
    items.sort(key=lambda item: item.nodeid.split("/")[1] not in _LONGEST)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, catalogue and configuration for the test; returns the working folder."""
    for name in [name for name in os.environ if name.startswith("LORA_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    work = tmp_path_factory.mktemp("work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("LORA_DB", str(home / "catalogue.db"))
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["FakeHub"]:
    """A stand-in for the Hub with an empty cache, whose client does not wait long before it asks again."""
    from huggingface_hub import close_session

    from tests.fake_hub import FakeHub

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("lora_cli.hub.connection._FIRST_WAIT", 0.01)
    # An earlier test's Hub may have had the port that a stranger's server has now.
    monkeypatch.setattr("lora_cli.hub.session._trusted", set())
    with FakeHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server
        close_session()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: a model this small is slower on two, and one gives the same result on every machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
