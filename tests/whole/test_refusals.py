"""Bad input, as people meet it: one clear line, its exit code, and nothing half-written."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.fake_hub import FakeHub

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.0.mlp.up_proj": (40, 16)}


@pytest.fixture
def pool(own_home: Path) -> Iterator[Path]:
    """Two good adapters and several bad ones, in folders of the working folder; whatever fails must leave nothing."""
    folder = own_home / "pool"
    good = random_factors(SHAPES, 4, seed=1)
    write_adapter(folder / "good", good)
    write_adapter(folder / "other", random_factors(SHAPES, 2, seed=2))
    write_adapter(folder / "third", random_factors(SHAPES, 2, seed=6))
    write_adapter(folder / "stranger", random_factors(SHAPES, 2, seed=3), base="acme/other")
    write_adapter(folder / "dora", good, use_dora=True)
    nan = random_factors(SHAPES, 2, seed=4)
    nan["model.layers.0.mlp.up_proj"][1][0, 0] = float("inf")
    write_adapter(folder / "nan", nan)
    write_adapter(folder / "silent", {m: (torch.zeros_like(b), a) for m, (b, a) in good.items()})
    cut = write_adapter(folder / "cut", good) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (folder / "empty").mkdir()
    before = sorted(own_home.rglob("*"))
    yield folder
    assert sorted(own_home.rglob("*")) == before


@pytest.mark.parametrize(
    ("adapters", "code", "words"),
    [
        (["pool/good", "pool/stranger"], 5, "two base models: "),
        (["pool/good", "pool/nan"], 5, "NaN or Inf in model.layers.0.mlp.up_proj"),
        (["pool/good", "pool/cut"], 5, "pool/cut: truncated"),
        (["pool/good", "pool/dora"], 5, "DoRA"),
        (["pool/good", "pool/silent"], 5, "lora_B or lora_alpha is zero"),
        (["pool/good", "pool/good"], 5, "is given twice"),
        (["pool/good", "pool/empty"], 5, "no adapter_config.json"),
        (["pool/good", "missing"], 3, "missing: not in the catalogue"),
    ],
)
def test_adapters_that_cannot_be_merged(pool: Path, adapters: list[str], code: int, words: str) -> None:
    assert words in refused(code, "merge", *adapters, "-o", "out")


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"lora_B.bias": (24,)}, {"lora_bias": True}, "lora_bias"),
        ({"lora_magnitude_vector.weight": (24,)}, {"use_dora": True}, "DoRA"),
        ({"modules_to_save.weight": (24, 16)}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_embedding_A": (2, 24), "lora_embedding_B": (16, 2)}, {}, "embedding"),
        ({"lora_A.weight": (2, 16, 3, 3), "lora_B.weight": (24, 2, 1, 1)}, {}, "conv"),
        ({"lora_A.weight": (2, 17), "lora_B.weight": (24, 2)}, {}, "24×17 in"),
    ],
)
def test_what_is_not_a_product_of_two_matrices(
    pool: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], config: dict[str, object], words: str
) -> None:
    module = "model.layers.0.self_attn.q_proj"
    folder = write_adapter(tmp_path / "odd", random_factors({module: (24, 16)}, 2, seed=5), **config)
    file = folder / "adapter_model.safetensors"
    odd = {f"base_model.model.{module}.{name}": torch.ones(shape) for name, shape in tensors.items()}
    save_file(load_file(file) | odd, file, metadata={"format": "pt"})
    assert words in refused(5, "merge", "pool/good", str(folder), "-o", "out")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-m", "ties", "--density", "0"], 2, "out of range: 0 < x <= 1"),
        (["-m", "ties", "--density", "1.5"], 2, "out of range"),
        (["-m", "dare", "--density", "nan"], 2, "out of range"),
        (["-m", "linear", "--density", "0.5"], 2, "linear takes no --density"),
        (["-m", "core", "--inside", "linear", "--density", "0.5"], 2, "core with linear inside takes no --density"),
        (["-m", "core", "--inside", "karcher"], 2, "--inside is one of"),
        (["-m", "tie"], 2, "did you mean 'ties'?"),
        (["--rank", "9" * 5000], 2, "--rank is a number"),
        (["--rank", "²"], 2, "--rank is a number"),
        (["--lambda", "1e308"], 2, "--lambda"),
        (["-m", "regmean"], 2, "give --data"),
        (["-m", "karcher", "--weights", "0,0"], 5, "zero"),
        (["-m", "norm-matched", "--weights", "0,0"], 5, "the merged update is zero"),
        (["-m", "slerp", "pool/third"], 5, "two adapters"),
        (["-m", "peft-ties"], 5, "rank"),
        (["-m", "lego", "--clusters", "7"], 5, "7"),
        (["--missing", "renorm", "--weights", "1,-1"], 5, "sum to zero"),
    ],
)
def test_options_that_a_method_cannot_use(pool: Path, options: list[str], code: int, words: str) -> None:
    assert words in refused(code, "merge", "pool/good", "pool/other", *options, "-o", "out")


@pytest.mark.parametrize("name", ["~nosuchuser/x", "a" * 300, "a\0b", "../" * 50 + "x"])
def test_names_that_no_file_can_have_are_unknown_adapters(own_home: Path, name: str) -> None:
    assert "not in the catalogue" in refused(3, "merge", name, "-o", "out")


def test_modules_may_be_named_in_any_script(own_home: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_adapter(own_home / name, random_factors({"layers.².q_proj": (24, 16)}, 2, seed=seed))
    ok("merge", "one", "two", "-o", "out")


def test_a_catalogued_adapter_is_refused_with_the_reason_of_the_catalogue(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    assert "pool/nan: NaN or Inf in" in refused(5, "merge", "pool/nan", "-o", "out")
    assert "did you mean pool/good" in refused(3, "merge", "good", "-o", "out")


def test_weights_that_changed_since_the_sync_are_noticed(pool: Path) -> None:
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    ok("select", "--by", "random", "-k", "2")
    file = pool / "good" / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-4] + b"\0\0\0\0")
    message = refused(5, "merge", "-o", "out")
    file.write_bytes(data)
    assert "pool/good: its files changed since the last sync" in message


def test_outputs_that_exist_or_cannot_be_written(own_home: Path) -> None:
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1))
    (own_home / "out").mkdir()
    (own_home / "out" / "precious").write_text("mine")
    assert "out exists" in refused(1, "merge", "a", "-o", "out")
    assert (own_home / "out" / "precious").read_text() == "mine"
    (own_home / "file").write_text("")
    assert "cannot be written" in refused(1, "merge", "a", "-o", "file/out")
    (own_home / "link").symlink_to(own_home / "elsewhere")
    assert "link" in refused(1, "merge", "a", "-o", "link")
    assert "file" in refused(1, "merge", "a", "-o", "done", "--db", "file/x.db")
    assert not (own_home / "done").exists()


def test_force_replaces_what_lora_made_and_nothing_else(own_home: Path) -> None:
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1))
    (own_home / "thesis").mkdir()
    (own_home / "thesis" / "chapter.txt").write_text("mine")
    assert "not an output of lora" in refused(1, "merge", "a", "-o", "thesis", "--force")
    assert "not an output of lora" in refused(1, "merge", "a", "-o", "a", "--force")
    assert (own_home / "thesis" / "chapter.txt").read_text() == "mine"
    ok("merge", "a", "-o", "out")
    assert "one of the adapters to be merged" in refused(1, "merge", "out", "-o", "out", "--force")
    (own_home / "empty").mkdir()
    ok("merge", "a", "-o", "empty", "--force")


def test_weights_that_leave_nothing_are_refused(own_home: Path) -> None:
    factors = random_factors(SHAPES, 4, seed=1)
    write_adapter(own_home / "a", factors)
    write_adapter(own_home / "again", {m: (2 * b, a / 2) for m, (b, a) in factors.items()})
    assert "the merged update is zero" in refused(5, "merge", "a=0", "-o", "out")
    assert "the merged update is zero" in refused(5, "merge", "a=1", "again=-1", "-o", "out")
    assert "the merged update is zero" in refused(5, "merge", "a=1", "again=-1", "--method", "ties", "-o", "out")
    ok("merge", "a=1", "again=-0.999", "-o", "out")


def test_values_that_overflow_in_the_product_are_refused(own_home: Path) -> None:
    b = torch.tensor([[3.0, -3.0]]).repeat(24, 1)
    a = torch.full((2, 16), 3e38)
    write_adapter(own_home / "huge", {"model.layers.0.self_attn.q_proj": (b, a)})
    for method in ("linear", "ties"):
        assert "too large to compute with" in refused(5, "merge", "huge", "--method", method, "-o", "out")


def test_a_configuration_that_changed_since_the_sync_is_noticed(own_home: Path) -> None:
    folder = write_adapter(own_home / "pool" / "a", random_factors(SHAPES, 4, seed=1))
    ok("pool", "sync", "acme/tiny", "--from", "pool")
    ok("select", "-k", "1")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 40}))
    assert "its files changed since the last sync" in refused(5, "merge", "-o", "out")


def test_a_folder_with_an_equals_sign_is_a_folder(own_home: Path) -> None:
    write_adapter(own_home / "lr=0.5", random_factors(SHAPES, 4, seed=1))
    ok("merge", "lr=0.5", "-o", "out")
    ok("merge", "lr=0.5=2", "-o", "twice")
    record = json.loads((own_home / "twice" / "run.json").read_text())
    assert list(record["settings"]["weights"].values()) == [2.0]


def test_the_order_of_adapters_changes_nothing(own_home: Path) -> None:
    factors = random_factors(SHAPES, 4, seed=1)
    write_adapter(own_home / "a", factors, base="acme/tiny")
    write_adapter(own_home / "b", random_factors(SHAPES, 3, seed=2), base="unsloth/tiny")
    ok("merge", "a", "b", "-o", "ab")
    ok("merge", "b", "a", "-o", "ba")
    for file in ("run.json", "adapter_config.json", "README.md", "adapter_model.safetensors"):
        assert (own_home / "ab" / file).read_bytes() == (own_home / "ba" / file).read_bytes()


def test_a_strangers_base_name_stays_text_in_the_card(own_home: Path) -> None:
    name = "acme/`x`\n# Owned\n| a"
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1), base=name)
    told = lora("merge", "a", "-o", "out")
    if told.code == 0:
        card = (own_home / "out" / "README.md").read_text()
        assert "\n# Owned" not in card
        assert "`x`" not in card.split("---")[2]


def test_an_unchanged_output_counts_as_written_last(own_home: Path, tmp_path: Path) -> None:
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1))
    ok("merge", "a", "-o", "out")
    ok("merge", "a", "-o", "out", "--db", str(tmp_path / "other.db"))
    listed = json.loads(ok("runs", "list", "--db", str(tmp_path / "other.db"), "--json").out)["rows"]
    assert [(row["command"], row["status"], row["out"]) for row in listed] == [("merge", "done", "out")]


def test_a_finished_output_is_up_to_date_and_force_redoes_it(own_home: Path) -> None:
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1))
    write_adapter(own_home / "b", random_factors(SHAPES, 2, seed=2))
    assert ok("merge", "a", "b", "-o", "out").out == "out\n"
    weights = own_home / "out" / "adapter_model.safetensors"
    before = (weights.stat().st_ino, weights.read_bytes())
    told = ok("merge", "b", "a", "-o", "out")
    assert (told.out, told.err.splitlines()[0]) == ("out\n", "merge: out is up to date")
    assert weights.stat().st_ino == before[0]
    ok("merge", "a", "b", "-o", "out", "--force")
    assert weights.stat().st_ino != before[0]
    assert weights.read_bytes() == before[1]
    assert "out exists" in refused(1, "merge", "a=1", "b=2", "-o", "out")
    (own_home / "out" / "run.json").write_text("{")
    assert "out exists" in refused(1, "merge", "a", "b", "-o", "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n', "task.jsonl:2: "),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "c"\n', "task.jsonl:2: "),
        ('{"prompt": "a"}\n', "task.jsonl:1: "),
        ('{"prompt": 3, "completion": "b"}\n', "task.jsonl:1: "),
        ("", "task.jsonl"),
    ],
)
def test_a_bad_line_of_a_task_is_named(own_home: Path, text: str, words: str) -> None:
    (own_home / "task.jsonl").write_text(text)
    for command in ("fit", "train", "eval"):
        assert words in refused(
            1, command, "--data", "task.jsonl", "--base", "acme/tiny", *_some_adapter(own_home, command)
        )


def test_a_task_that_is_not_there(own_home: Path) -> None:
    assert "none.jsonl" in refused(1, "fit", "--data", "none.jsonl", "--base", "acme/tiny")
    assert "no task file" in refused(2, "fit", "--base", "acme/tiny")


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_gated_base_asks_for_access(own_home: Path, fake: FakeHub, command: str) -> None:
    (own_home / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    fake.add("acme/tiny", {"config.json": b"{}", "model.safetensors": b""}, gated="manual")
    words = [command, "--data", "task.jsonl", "--base", "acme/tiny", *_some_adapter(own_home, command)]
    told = refused(4, *words)
    assert "acme/tiny" in told
    assert "gated" in told


@pytest.mark.parametrize("command", ["eval", "fit", "train"])
def test_a_base_that_the_hub_does_not_have(own_home: Path, fake: FakeHub, command: str) -> None:
    (own_home / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    words = [command, "--data", "task.jsonl", "--base", "acme/nope", *_some_adapter(own_home, command)]
    told = refused(3, *words)
    assert "lora: no base model acme/nope\n" in told
    assert [path.name for path in own_home.iterdir() if path.name.startswith(".")] == []


def test_plans_change_nothing(own_home: Path) -> None:
    write_adapter(own_home / "a", random_factors(SHAPES, 4, seed=1))
    before = sorted(own_home.rglob("*"))
    plan = json.loads(ok("merge", "a", "--method", "ties", "--dry-run", "--json").out)
    assert plan["schema"] == "lora.merge.plan/1"
    assert plan["knobs"] == {"density": 0.2, "election": "total", "per": "module"}
    assert plan["modules"] == 2
    assert sorted(own_home.rglob("*")) == before


def test_debug_gives_the_traceback_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LORA_DEBUG", "1")
    told = lora("merge", "nobody-knows")
    assert told.code == 3
    assert "Traceback" in told.err


def _some_adapter(folder: Path, command: str) -> list[str]:
    if command == "train":
        return []
    if not (folder / "a").exists():
        write_adapter(folder / "a", random_factors(SHAPES, 4, seed=1))
    return ["a"]


def test_a_catalogued_folder_is_refused_by_its_id(own_home: Path) -> None:
    write_adapter(own_home / "pool" / "ann" / "good", random_factors(SHAPES, 4, seed=1))
    cut = write_adapter(own_home / "pool" / "ann" / "cut", random_factors(SHAPES, 4, seed=2))
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-100])
    ok("pool", "sync", "--from", "pool")
    assert "pool/ann/cut" in ok("pool", "list", "--where", "status!=ok", "-q").out
    assert refused(5, "merge", "pool/ann/good", "pool/ann/cut").startswith("lora: pool/ann/cut: truncated")
    assert "lora: pool/ann/cut: truncated" in refused(5, "diff", "pool/ann/good", "./pool/ann/cut")
