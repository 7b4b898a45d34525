"""A base's skeleton from the user's cache: the same as the one that is built, and built anew where it must be."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from lora_cli.formats.skeleton import Skeleton
from lora_cli.models import kept_skeleton as module
from lora_cli.models.kept_skeleton import kept_skeleton
from lora_cli.models.skeleton import skeleton
from tests import architectures
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.tiny_bases import tiny_llama


def kept(home: Path) -> list[Path]:
    return sorted((home / ".cache" / "lora" / "skeletons").glob("*"))


def found_in(folder: Path) -> Skeleton | None:
    return kept_skeleton(folder, (folder / "config.json").read_bytes())


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return Path(os.environ["HOME"])


def base(folder: Path, kind: str = "llama") -> Path:
    architectures.config(kind).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(architectures.SPECS))
def test_it_is_the_one_that_is_built(tmp_path: Path, home: Path, kind: str) -> None:
    folder = base(tmp_path, kind)
    built = skeleton(folder)
    assert built is not None
    for _ in range(2):
        found = found_in(folder)
        assert found is not None
        for name in (one.name for one in fields(found) if one.name not in ("renamed", "stored")):
            assert getattr(found, name) == getattr(built, name), name
    tensors = {one.parameter: one.stored for one in built.matrices.values()}
    assert found.stored(tensors) == built.stored(tensors)
    names = [f"model.{name}" for name in built.matrices]
    assert found.renamed(names, ".weight") == built.renamed(names, ".weight")
    assert len(kept(home)) == 1


def test_it_is_built_once_for_a_configuration_and_the_versions(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = base(tmp_path)
    first = found_in(folder)
    monkeypatch.setattr(module, "_built", lambda folder: pytest.fail("it was built again"))
    found = found_in(folder)
    assert first is not None
    assert found is not None
    assert found.matrices == first.matrices
    assert found_in(folder) is found  # what is derived from it is derived once
    monkeypatch.setattr(module, "_built", skeleton)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"intermediate_size": 80}))
    other = found_in(folder)
    assert other is not None
    assert other.matrices["model.layers.0.mlp.up_proj"].shape == (80, 32)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda package: "another")
    found_in(folder)
    assert len(kept(home)) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"matrices": []}', "null", '{"matrices": {"a": 1}}'])
def test_a_damaged_file_is_made_anew(tmp_path: Path, home: Path, text: str) -> None:
    folder = base(tmp_path)
    found_in(folder)
    [file] = kept(home)
    whole = file.read_text()
    file.write_text(text)
    module._read.cache_clear()
    found = found_in(folder)
    assert found is not None
    assert found.architecture == "LlamaForCausalLM"
    assert file.read_text() == whole


def test_without_a_place_it_is_built_each_time(tmp_path: Path, home: Path) -> None:
    (home / ".cache").write_text("no folder")
    assert found_in(base(tmp_path)) is not None


def imported_by(*words: str) -> str:
    """Those of the packages that a merge can do without which the command imports."""
    code = (
        f"import sys; sys.argv = {['lora', *words]!r}\n"
        "from lora_cli.__main__ import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'transformers', 'peft', 'scipy', 'httpx2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_a_second_merge_for_a_base_on_disk_imports_no_transformers(tmp_path: Path, home: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    factors = random_factors({"model.layers.0.mlp.up_proj": (48, 32)}, 4, seed=0)
    adapter = str(write_adapter(tmp_path / "adapter", factors, base=str(tmp_path / "base")))
    ok("merge", adapter, "-o", str(tmp_path / "first"))
    assert imported_by("merge", adapter, "-o", str(tmp_path / "second")) == "[]"
    weights = "adapter_model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (tmp_path / "second" / weights).read_bytes()


def test_offline_no_client_is_made_to_ask_for_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    factors = random_factors({"model.layers.0.mlp.up_proj": (48, 32)}, 4, seed=0)
    adapter = str(write_adapter(tmp_path / "adapter", factors, base="acme/8b"))
    assert imported_by("merge", adapter, "-o", str(tmp_path / "out")) == "[]"
