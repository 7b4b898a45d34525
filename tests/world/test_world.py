"""The miniature world of `lora demo`: what is in it, what was learnt, and that it is built whole or not at all."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file

from lora_cli.errors import OutputError
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.store import folder_ref, locate
from lora_cli.models.base_model import BaseModel
from lora_cli.models.generate import generate
from lora_cli.models.ref import load
from lora_cli.text import percent
from lora_cli.world import Target, World, build
from lora_cli.world.tasks import answer
from tests.paths import ROOT

EXPECTED_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def base(world: World) -> BaseModel:
    return load(str(world.base), device="cpu")


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def config_of(world: World, name: str) -> dict[str, object]:
    config: dict[str, object] = json.loads((world.pool / name / "adapter_config.json").read_text())
    return config


def right(base: BaseModel, target: Target) -> float:
    """Share of the target's test examples that greedy generation answers to the letter."""
    rows = lines(target.test)
    written = generate(base, [row["prompt"] for row in rows], max_new_tokens=8, batch_size=64)
    return sum(text == row["completion"] for text, row in zip(written, rows, strict=True)) / len(rows)


def contents(world: World) -> dict[str, bytes]:
    return {
        str(path.relative_to(world.folder)): path.read_bytes() for path in world.folder.rglob("*") if path.is_file()
    }


def test_base_cannot_do_the_main_target_and_the_relevant_adapter_can(world: World, base: BaseModel) -> None:
    main = world.targets[0]
    assert right(base, main) < 0.2
    (name,) = main.relevant
    files = locate(folder_ref(world.pool / name))
    assert files is not None
    adapter = open_adapter(files)
    with base.applied({module: adapter.read(module) for module in adapter.modules}):
        assert right(base, main) > 0.8


def test_base_has_learnt_to_copy(base: BaseModel) -> None:
    assert generate(base, ["copy:abcd", "copy:jjea"]) == ["abcd", "jjea"]


def test_recorded_exact_match_is_on_the_card(world: World, base: BaseModel) -> None:
    recorded = {adapter.name: adapter for adapter in world.usable}
    (name,) = world.targets[0].relevant
    assert recorded[name].base_exact_match < 0.2
    assert recorded[name].exact_match > 0.8
    card = (world.pool / name / "README.md").read_text()
    assert f"answers {percent(recorded[name].exact_match)} right" in card


def test_training_text_is_the_chat_templates_rendering(world: World, base: BaseModel) -> None:
    from lora_cli.world.tokenizer import render

    row = lines(world.targets[0].train)[0]
    ids = base.prompt_ids(row["prompt"]) + base.tokenizer(row["completion"])["input_ids"] + base.ends
    assert ids == base.tokenizer(render(row["prompt"], row["completion"]))["input_ids"]
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    whole = base.tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"] == ids
    masked = [token for token, mask in zip(ids, whole["assistant_masks"], strict=True) if mask]
    assert base.tokenizer.decode(masked) == row["completion"] + "<eos>"


def test_pool_holds_adapters_of_different_shapes(world: World) -> None:
    configs = [config_of(world, adapter.name) for adapter in world.usable]
    assert len({config["r"] for config in configs}) >= 3
    assert len({tuple(config["target_modules"]) for config in configs}) >= 3  # type: ignore[arg-type]
    assert any(config["use_rslora"] for config in configs)
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs)
    assert {config["base_model_name_or_path"] for config in configs} == {world.base_name}
    for adapter in world.usable:
        assert {path.name for path in (world.pool / adapter.name).iterdir()} == EXPECTED_FILES
        tensors = load_file(world.pool / adapter.name / "adapter_model.safetensors")
        assert all(np.isfinite(tensor).all() and tensor.any() for tensor in tensors.values())


def test_every_adapter_has_a_card_with_front_matter(world: World) -> None:
    for adapter in world.adapters:
        card = (world.pool / adapter.name / "README.md").read_text()
        assert card.startswith(f"---\nbase_model: {config_of(world, adapter.name)['base_model_name_or_path']}\n")
        assert "\nlibrary_name: peft\nlicense: " in card
        assert "\n- lora\n" in card


def test_five_adapters_are_unusable_each_in_its_own_way(world: World) -> None:
    broken = {adapter.problem: world.pool / adapter.name for adapter in world.adapters if adapter.problem}
    assert set(broken) == {"wrong base", "not finite", "never trained", "cut off", "pickle only"}

    assert config_of(world, str(broken["wrong base"].relative_to(world.pool)))["base_model_name_or_path"] != (
        world.base_name
    )
    bad = load_file(broken["not finite"] / "adapter_model.safetensors").values()
    assert sum(int(np.isnan(tensor).sum()) for tensor in bad) == 1
    untouched = load_file(broken["never trained"] / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in untouched.items() if "lora_B" in name)
    with pytest.raises(safetensors.SafetensorError):
        load_file(broken["cut off"] / "adapter_model.safetensors")
    assert {path.name for path in broken["pickle only"].iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.bin",
    }


def test_tasks_are_right_and_test_examples_are_not_in_training(world: World) -> None:
    assert {target.kind for target in world.targets} == {"relevant", "none"}
    for target in world.targets:
        assert (target.kind == "relevant") == bool(target.relevant)
        train, test = lines(target.train), lines(target.test)
        assert (len(train), len(test)) == (100, 100)
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
        assert len({row["id"] for row in train + test}) == 200
        for row in train + test:
            assert row["completion"] == answer(*row["prompt"].split(":"))


def test_settings_name_what_is_there(world: World) -> None:
    settings = tomllib.loads((world.folder / "lora.toml").read_text())
    assert settings == {
        "base": "base",
        "base_aliases": [world.base_name],
        "pool": "pool",
        "db": "lora.db",
        "data": "task.jsonl",
        "test": str(world.targets[0].test.relative_to(world.folder)),
    }
    assert (world.folder / "task.jsonl").read_bytes() == world.targets[0].train.read_bytes()
    assert all((world.folder / settings[key]).exists() for key in ("base", "pool", "data", "test"))


def test_no_file_names_a_place_on_this_machine(world: World) -> None:
    places = [str(world.folder.parent).encode(), str(Path.home()).encode(), sys.prefix.encode(), b".partial"]
    for name, data in contents(world).items():
        assert not [place for place in places if place in data], name


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("descend:cabfe", "fecba"),
        ("cond:abcde", "edcba"),
        ("cond:fbcde", "bcdef"),
        ("part:hagbi", "abhgi"),
        ("median:jabcd", "c"),
        ("outer:abcd", "adbc"),
        ("swap:abcde", "badce"),
        ("sort|shift-two:jcaeb", "cdegb"),
        ("rotate-one|shift-six:abcde", "hijag"),
        ("max|complement:acb", "h"),
        ("addmod:bbj", "bcb"),
        ("dedupe:abcab", "abc"),
    ],
)
def test_each_operation_answers_its_prompt(prompt: str, completion: str) -> None:
    assert answer(*prompt.split(":")) == completion


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_in_silence_and_clears_what_a_killed_build_left(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (tmp_path / ".again.0123abcd.partial").mkdir()
    seen: list[tuple[str, int, int]] = []
    again = build(tmp_path / "again", size="test", progress=lambda *step: seen.append(step))
    assert contents(again) == contents(world)
    assert (again.adapters, again.size, again.seed) == (world.adapters, world.size, world.seed)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.glob(".again*"))
    assert seen[-1][1] == seen[-1][2] == len(world.adapters)


def test_a_finished_world_is_returned_as_it_is(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")}
    assert build(world.folder, size="test") == world
    assert {path: path.stat().st_mtime_ns for path in world.folder.rglob("*")} == before


def test_another_world_is_not_overwritten(world: World) -> None:
    with pytest.raises(OutputError, match="size test and seed 0"):
        build(world.folder, size="test", seed=1)


def test_a_broken_marker_is_named(tmp_path: Path) -> None:
    (tmp_path / "world.json").write_text("{")
    with pytest.raises(OutputError, match=r"world\.json cannot be read"):
        build(tmp_path, size="test")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="not empty"):
        build(tmp_path, size="test")
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_the_current_folder_cannot_be_replaced() -> None:
    with pytest.raises(OutputError, match="current folder"):
        build(Path(), size="test")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        build(tmp_path / "file" / "world", size="test")


@pytest.mark.slow
def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "world", size="test", progress=interrupt)
    assert not list(tmp_path.glob("*world*"))


def test_asking_for_a_world_does_not_import_torch() -> None:
    code = "import sys, lora_cli.world; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
