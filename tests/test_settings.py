"""Settings: who wins, what is refused, where paths point."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_cli.app import app
from lora_cli.errors import UsageError
from lora_cli.settings import folder_of, load, user_file


def test_flag_beats_environment_beats_project_beats_user_beats_default(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (load().seed, load().origin("seed")) == (0, "default")
    user_file().parent.mkdir(parents=True)
    user_file().write_text("seed = 1")
    assert (load().seed, load().origin("seed")) == (1, str(user_file()))
    (own_home / "lora.toml").write_text("seed = 2")
    assert (load().seed, load().origin("seed")) == (2, "lora.toml")
    monkeypatch.setenv("LORA_SEED", "3")
    assert (load().seed, load().origin("seed")) == (3, "LORA_SEED")
    assert (load({"seed": 4}).seed, load({"seed": 4}).origin("seed")) == (4, "flag")
    assert load({"seed": None}).seed == 3


def test_paths_are_relative_to_the_file_that_names_them(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "lora.toml").write_text('pool = "pool"\nbase = "base"\ntest = "~/t.jsonl"')
    assert load().pool == own_home / "pool"
    assert load().base == "base"
    (own_home / "base").mkdir()
    assert load().base == str(own_home / "base")
    assert load().test == Path.home() / "t.jsonl"
    (own_home / "lora.toml").write_text('base = "acme/base"')
    assert load().base == "acme/base"
    (own_home / "odd@main").mkdir()
    for text, base in {"acme/base@main": "acme/base", "acme/base@v1": "acme/base@v1"}.items():
        assert load({"base": text}).base == base
    assert load({"base": "odd@main"}).base == str(own_home / "odd@main")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sede = 1", "unknown setting 'sede'"),
        ("seed = 'many'", "seed must be a whole number from 0, not 'many'"),
        ("seed = true", "seed must be a whole number"),
        ("seed = -1", "seed must be a whole number from 0, not -1"),
        ("data = '~nosuchuser/x'", "data must be a path, not '~nosuchuser/x'"),
        ("dtype = 'int4'", "dtype must be one of"),
        ("device = 'tpu'", "device must be"),
        ("base_aliases = 3", "base_aliases must be a list of texts"),
        ("base = ''", "base must be a text"),
        ("seed = ", "cannot be read"),
    ],
)
def test_a_wrong_setting_is_named(own_home: Path, text: str, words: str) -> None:
    (own_home / "lora.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        load()


def test_aliases_and_pool_belong_to_the_base_beside_them(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "lora.toml").write_text('base = "acme/one"\nbase_aliases = ["acme/uno"]\npool = "pool"')
    monkeypatch.setenv("LORA_BASE", "acme/one")
    assert (load().base_aliases, load().pool) == (("acme/uno",), own_home / "pool")
    monkeypatch.setenv("LORA_BASE", "acme/two")
    assert (load().base_aliases, load().pool) == ((), None)
    assert load().origin("pool") == "default: that of lora.toml is for another base"
    assert load({"base": "acme/one"}).base_aliases == ("acme/uno",)
    assert load({"pool": "here"}).pool == own_home / "here"
    monkeypatch.setenv("LORA_BASE_ALIASES", "acme/due")
    assert load().base_aliases == ("acme/due",)


def test_what_names_no_base_holds_for_every_base(own_home: Path) -> None:
    (own_home / "lora.toml").write_text('pool = "pool"')
    assert load({"base": "acme/any"}).pool == own_home / "pool"


def test_a_text_that_can_be_no_path_is_no_folder(own_home: Path) -> None:
    for text in ("x" * 300, "~nosuchuser/x", "a\0b", "", "missing"):
        assert folder_of(text) is None, text
    assert folder_of("~") == Path.home()
    assert load({"base": "x" * 300}).base == "x" * 300


def test_config_show_says_where_each_value_is_from(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BASE_ALIASES", "a/b, c/d")
    (own_home / "lora.toml").write_text("seed = 7")
    result = CliRunner().invoke(app, ["config", "show"])
    assert result.exit_code == 0
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert ["seed", "7", "lora.toml"] in lines
    assert ["base_aliases", '["a/b", "c/d"]', "LORA_BASE_ALIASES"] in lines
    assert ["device", "auto", "default"] in lines
