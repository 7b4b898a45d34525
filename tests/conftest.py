"""Every test has its own home: no test sees the user's settings, catalogue, Hub login or cache, or leaves 127.0.0.1."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_HOME = tempfile.mkdtemp(prefix="lora-tests-")
# huggingface_hub reads these once, when it is imported. Nothing listens on port 9.
os.environ.update(
    HF_ENDPOINT="http://127.0.0.1:9",
    HF_HOME=f"{_HOME}/hf",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    NO_PROXY="127.0.0.1",
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)

pytest_plugins = ["tests.world_fixture"]


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: a model this small is slower on two, and one gives the same result on every machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
