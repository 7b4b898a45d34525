"""A base model is known by what it is, not by what it is called: versions, public names, and what depends on them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_cli.formats.base_names import public_base
from lora_cli.models.base_model import BaseModel
from lora_cli.models.ref import load, pin
from lora_cli.recipes import EvalOptions, Recipe
from lora_cli.records import Example
from lora_cli.steps.evaluate.evaluate import System, evaluate
from lora_cli.steps.fit.fit import Fitting, fit
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.fake_hub import FakeHub
from tests.paths import ROOT
from tests.tiny_bases import characters, examples, opened, saved, tiny_llama


def write_task(file: str, n: int = 6) -> None:
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in examples(n)]
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(folder: str) -> str:
    return Path(folder, "run.json").read_text()


def test_the_version_of_a_folder_is_that_of_what_loading_reads(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    version = pin(str(folder)).version
    assert len(version) == 40
    assert int(version, 16)
    (folder / "README.md").write_text("a card")
    assert pin(str(folder)).version == version
    assert pin(str(shutil.copytree(folder, tmp_path / "copy")), name="other").version == version
    seen = {version}
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        changed = shutil.copytree(folder, tmp_path / name)
        data = (changed / name).read_bytes()
        (changed / name).write_bytes(data + b"\n" if name != "model.safetensors" else data[:-1] + bytes([data[-1] ^ 1]))
        seen.add(pin(str(changed)).version)
    assert len(seen) == 5


def in_cache(id: str, commit: str, **config: int) -> None:
    """Put a base into the Hub client's cache, as the commit that main names."""
    repo = Path(os.environ["HF_HOME"], "hub", "models--" + id.replace("/", "--"))
    saved(repo / "snapshots" / commit, **config)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)


def test_a_base_of_the_hub_is_loaded_at_the_commit_it_was_pinned_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError("the network was asked for what is in the cache")

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", asked)
    in_cache("acme/pinned", "a" * 40)
    ref = pin("acme/pinned")
    assert (ref.name, ref.version) == ("acme/pinned", "a" * 40)
    in_cache("acme/pinned", "b" * 40, num_hidden_layers=1)
    assert pin("acme/pinned").version == "b" * 40
    loaded = ref.load()
    assert (loaded.version, loaded.pinned) == ("a" * 40, f"acme/pinned@{'a' * 40}")
    assert "model.layers.1.mlp.up_proj" in loaded.shapes


def test_an_adapter_that_lies_beside_a_base_is_not_worn(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base")
    shapes = {"model.layers.0.mlp.up_proj": (48, 32)}
    example = Example(id="1", prompt="abc", completion="de")
    plain = load(str(folder)).log_likelihoods([example])
    adapter = write_adapter(tmp_path / "adapter", random_factors(shapes, 4, seed=0), lora_alpha=64)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    assert load(str(folder)).log_likelihoods([example]) == plain


def printed(code: str, endpoint: str, cache: Path) -> list[str]:
    """The words that Python code prints with this Hub and this cache."""
    done = subprocess.run(
        [sys.executable, "-c", f"import warnings; warnings.simplefilter('ignore')\n{code}"],
        env={**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.slow
def test_an_encoder_of_the_hub_needs_no_weights_and_no_network_the_second_time(tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in saved(tmp_path / "base").iterdir()}
    code = (
        "from lora_cli.models.ref import load_encoder\n"
        "encoder = load_encoder('acme/remote')\n"
        "print(encoder.name, encoder.longest, *encoder.ends)"
    )
    with FakeHub() as hub:
        hub.add("acme/remote", files)
        assert printed(code, hub.endpoint, tmp_path / "home") == ["acme/remote", "64", "2"]
        assert hub.paths("tokenizer.json")
        assert hub.paths("model.safetensors") == []
    assert printed(code, "http://127.0.0.1:9", tmp_path / "home") == ["acme/remote", "64", "2"]


@pytest.mark.slow
def test_a_downloaded_base_is_the_same_tomorrow_and_without_a_network(tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in saved(tmp_path / "base").iterdir()}
    code = "from lora_cli.models.ref import pin\nref = pin('acme/remote')\nprint(ref.version, ref.load().version)"

    def told(endpoint: str) -> list[str]:
        return printed(code, endpoint, tmp_path / "home")

    with FakeHub() as hub:
        repo = hub.add("acme/remote", files)
        first = repo.sha
        assert told(hub.endpoint) == [first, first]
        repo.commit(README__md=b"news")
        hub.forget()
        assert told(hub.endpoint) == [first, first]
        assert hub.asked == []
    assert told("http://127.0.0.1:9") == [first, first]


def test_rows_and_states_of_another_base_of_the_same_name_are_not_taken_up(tmp_path: Path) -> None:
    one, other = (BaseModel("acme/tiny", tiny_llama(), characters(), version) for version in ("1" * 40, "2" * 40))
    rows = tmp_path / "rows.jsonl"
    counted: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        counted.append(f"{what} {done}")

    evaluate(one, [System(name="base")], examples(4), EvalOptions(metric="nll"), rows_path=rows)
    evaluate(one, [System(name="base")], examples(4), EvalOptions(metric="nll"), rows_path=rows, progress=progress)
    assert counted.pop(0) == "base 4"
    evaluate(other, [System(name="base")], examples(4), EvalOptions(metric="nll"), rows_path=rows, progress=progress)
    assert counted[0] == "base 0"

    shapes = {"model.layers.0.mlp.up_proj": (48, 32)}
    adapter = opened(write_adapter(tmp_path / "adapter", random_factors(shapes, 2, seed=0)))
    state, recipe = tmp_path / "state.npz", Recipe(steps=2, every=1)
    fit(one, [adapter], examples(5), Fitting(recipe=recipe), checkpoint=state)
    for base, begins in ((one, 2), (other, 0)):
        counted.clear()
        fit(base, [adapter], examples(5), Fitting(recipe=recipe), checkpoint=state, progress=progress)
        assert counted[0] == f"fit: adapters {begins}"


def test_a_run_names_the_version_of_its_base_and_is_done_again_for_another(tmp_path: Path) -> None:
    write_task("task.jsonl")
    command = ("train", "--data", "task.jsonl", "--rank", "2", "--steps", "2")
    found = set()
    for layers in (1, 2):
        base = saved(tmp_path / str(layers) / "base", num_hidden_layers=layers)
        told = ok(*command, "--base", str(base))
        version = pin(str(base)).version
        written = json.loads(record(told.out.strip()))
        assert written["inputs"][f"base:base@{version}"] == version
        found.add(told.out)
    assert len(found) == 2


def test_auto_is_the_same_run_as_what_it_means(tmp_path: Path) -> None:
    write_task("task.jsonl")
    command = ("train", "--data", "task.jsonl", "--rank", "2", "--dry-run", "--base", str(saved(tmp_path / "base")))
    ref = pin(str(tmp_path / "base"))
    spelled = ("--device", ref.device, "--dtype", ref.dtype)

    def planned(*more: str) -> list[str]:
        # The estimate begins with the memory that this process already holds.
        return [line for line in ok(*command, *more).out.splitlines() if not line.startswith(("memory", "time"))]

    assert planned() == planned(*spelled) == planned("--dtype", "auto") != planned("--dtype", "fp16")


def test_a_public_name_is_never_a_place_on_this_machine(tmp_path: Path, own_home: Path) -> None:
    Path("models", "mine").mkdir(parents=True)
    cached = tmp_path / "models--acme--tiny" / "snapshots" / ("c" * 40)
    cached.mkdir(parents=True)
    assert public_base("acme/tiny", ["other/name"]) == "acme/tiny"
    assert public_base("models/mine") == public_base(str(own_home / "models" / "mine")) == "mine"
    assert public_base("models/mine", ["acme/tiny"]) == "acme/tiny"
    assert public_base("models/mine", declared=["b/b", "a/a", "b/b"]) == "b/b"
    assert public_base("", declared=["b/b", "a/a"]) == "a/a"
    assert public_base("/somewhere/else/model") == "model"
    assert public_base(str(cached)) == "acme/tiny"


def test_a_base_without_a_name_leaves_no_path_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "b1")
    write_task("task.jsonl")
    monkeypatch.setenv("LORA_BASE", "b1")
    ok("train", "--data", "task.jsonl", "--rank", "2", "--steps", "2", "-o", "new")
    for file in Path("new").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
    assert json.loads(record("new"))["settings"]["base"] == "b1"
    assert json.loads(Path("new/adapter_config.json").read_text())["base_model_name_or_path"] == "b1"


def test_a_reference_may_be_given_the_name_that_adapters_use(tmp_path: Path) -> None:
    ref = replace(pin(str(saved(tmp_path / "base"))), name="acme/tiny")
    assert ref.settings == {"base": "acme/tiny", "device": ref.device, "dtype": ref.dtype}
    assert ref.load().pinned == f"acme/tiny@{ref.version}"
