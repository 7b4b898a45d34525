"""Files that change under the work, records that were damaged, places that others use: one clear line, nothing lost."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import DataError, OutputError, Refused
from lora_cli.formats.reader import OpenAdapter
from lora_cli.formats.run_record import read_record
from lora_cli.outputs import whole_folder
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import lora, ok, refused
from tests.steps.test_merge import SHAPES, opened

TWO = ("one", "two")


@pytest.fixture(autouse=True)
def pool(own_home: Path) -> Path:
    for seed, name in enumerate(TWO):
        write_adapter(own_home / name, random_factors(SHAPES, 3, seed=seed))
    return own_home


def test_a_folder_that_came_to_be_during_the_work_is_not_replaced(own_home: Path) -> None:
    target = own_home / "out"
    with pytest.raises(OutputError, match="made by another process"), whole_folder(target) as partial:
        (partial / "ours").write_text("x")
        target.mkdir()
        (target / "precious").write_text("theirs")
    assert [path.name for path in target.iterdir()] == ["precious"]
    elsewhere = own_home / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(OutputError, match="a link"), whole_folder(own_home / "link") as partial:
        (own_home / "link").symlink_to(elsewhere)
    assert [path.name for path in own_home.iterdir() if path.name.startswith(".")] == []
    assert [*elsewhere.iterdir()] == []


@pytest.mark.slow
def test_of_two_merges_into_one_place_one_is_told_so() -> None:
    codes: dict[str, int] = {}
    errors: dict[str, str] = {}

    def merge(method: str) -> None:
        command = [sys.executable, "-m", "lora_cli", "merge", *TWO, "-m", method, "-o", "out"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
        codes[method], errors[method] = done.returncode, done.stderr

    threads = [threading.Thread(target=merge, args=(method,)) for method in ("linear", "ties")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes.values()) == [0, 1], errors
    [winner] = [method for method, code in codes.items() if code == 0]
    assert json.loads(Path("out/run.json").read_text())["settings"]["method"] == winner


def test_force_does_not_take_an_adapter_with_it() -> None:
    ok("merge", *TWO, "-o", "out")
    Path("one").rename("out/child")
    told = refused(1, "merge", "out/child", "two", "-o", "out", "--force")
    assert "holds one of the adapters to be merged" in told
    assert Path("out/child/adapter_model.safetensors").is_file()


def _without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _other_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 999}))


def _without_outputs(folder: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "outputs": {}}))


@pytest.mark.parametrize("damage", [_without_config, _other_alpha, _without_outputs])
def test_a_result_that_cannot_be_trusted_is_not_up_to_date(damage: Callable[[Path], None]) -> None:
    ok("merge", *TWO, "-o", "out")
    damage(Path("out"))
    assert "has changed since it was written" in refused(1, "merge", *TWO, "-o", "out")
    ok("merge", *TWO, "-o", "out", "--force")
    assert "up to date" in ok("merge", *TWO, "-o", "out").err


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": None}, {"outputs": []}, {"outputs": {".": "x"}}, {"outputs": {"a\0": "x"}},
        {"outputs": {"../../../../etc/passwd": "x"}}, {"results": None}, {"results": 5}, {"device": None},
        {"merge.lock": [1]}, {"key": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_is_no_record(change: dict[str, Any]) -> None:
    ok("merge", *TWO, "-o", "out")
    record = json.loads(Path("out/run.json").read_text())
    Path("out/run.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(DataError, match="a damaged record"):
        read_record(Path("out"))
    assert "out exists" in refused(1, "merge", *TWO, "-o", "out")


def test_a_record_too_deep_to_read() -> None:
    ok("merge", *TWO, "-o", "out")
    Path("out/run.json").write_text("[" * 200_000)
    assert "out exists" in refused(1, "merge", *TWO, "-o", "out")
    assert "not an output of lora" in refused(1, "merge", *TWO, "-o", "out", "--force")


def _overwritten(adapter: OpenAdapter) -> None:
    weights = adapter.files.weights
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(1, 1))


def _replaced(adapter: OpenAdapter) -> None:
    weights = adapter.files.weights
    other = weights.with_name("other")
    other.write_bytes(weights.read_bytes())
    other.replace(weights)


@pytest.mark.parametrize("change", [_overwritten, _replaced])
def test_weights_that_change_after_they_were_hashed_are_refused(
    change: Callable[[OpenAdapter], None], own_home: Path
) -> None:
    adapter = opened(own_home / "one")
    module = next(iter(SHAPES))
    adapter.read(module)
    change(adapter)
    with pytest.raises(Refused, match="its weights changed while they were used"):
        adapter.read(module)


def test_weights_that_vanish_are_named(own_home: Path) -> None:
    adapter = opened(own_home / "one")
    adapter.files.weights.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        adapter.read(next(iter(SHAPES)))


@pytest.mark.parametrize("alpha", [1e300, 1e160, -1e200])
def test_an_absurd_alpha_stops_no_sync(alpha: float) -> None:
    write_adapter(Path("tree/pool/loud"), random_factors(SHAPES, 3, seed=5), lora_alpha=alpha)
    write_adapter(Path("tree/pool/good"), random_factors(SHAPES, 3, seed=6))
    for _ in range(2):
        ok("pool", "sync", "acme/tiny", "--from", "tree/pool")
        rows = {row["id"]: row for row in json.loads(ok("pool", "list", "--json").out)["rows"]}
        assert rows["pool/good"]["status"] == "ok"
        assert "norm of its update is not finite" in rows["pool/loud"]["reason"]
    assert lora("pool", "verify", "tree/pool/loud", "--deep").code == 5
    assert "too large to compute with" in refused(5, "merge", "tree/pool/loud", "-o", "out")


@pytest.mark.parametrize(
    ("code", "words", "told"),
    [
        (1, ("merge", *TWO, "-o", "x" * 300), "cannot be read"),
        (1, ("merge", *TWO, "-o", "a\udcff"), "characters that do not print"),
        (2, ("merge", *TWO, "--scope", f"layers={'9' * 5000}"), "neither a layer"),
        (2, ("merge", *TWO, "--rank", "３"), "--rank is a number"),
        (2, ("merge", "one=1_0", "two=1"), "is not a number"),
        (2, ("merge", "one=１", "two=1"), "is not a number"),
        (2, ("merge", *TWO, "--device", "gpu"), "--device must be auto"),
        (2, ("runs", "list", "-n", "99999999999999999999"), "-n"),
    ],
)
def test_strange_arguments_get_one_line(code: int, words: tuple[str, ...], told: str) -> None:
    said = refused(code, *words)
    assert told in said
    assert len(said.strip().splitlines()) <= 2


@pytest.mark.parametrize("line", ['{"id":' + "[" * 100_000, '{"id": null}', '{"id": [1]}', "{}"])
def test_a_line_of_stdin_without_an_id(line: str) -> None:
    assert "stdin: no id in" in refused(2, "merge", "-", stdin=line)


def test_a_mark_of_encoding_on_stdin_is_no_part_of_an_id() -> None:
    ok("merge", "-", "-o", "out", stdin="\ufeffone\ntwo\n")


@pytest.mark.parametrize("text", [f"seed = {'9' * 5000}", f"a = {'[' * 100_000}", 'runs = "a\\u0000b"', "seed = '１'"])
def test_a_strange_lora_toml_gets_one_line(text: str) -> None:
    Path("lora.toml").write_text(text)
    said = refused(2, "config", "show")
    assert "lora.toml" in said
    assert len(said.strip().splitlines()) <= 2


@pytest.mark.slow
def test_a_full_stderr_changes_no_exit_code(own_home: Path) -> None:
    for words, code in ((["merge", "nowhere-at-all", "-m", "x"], 2), (["merge", *TWO, "-o", "out"], 0)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "lora_cli", *words], stdout=subprocess.PIPE, stderr=full, check=False
            )
        assert done.returncode == code


def test_a_run_that_was_killed_does_not_run_for_ever(own_home: Path) -> None:
    ok("merge", *TWO, "-o", "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_cli.steps.merge.request.merge", lambda *args, **options: os.kill(os.getpid(), 0) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lora("merge", *TWO, "-m", "ties", "-o", "other")
    import sqlite3

    with sqlite3.connect(os.environ["LORA_DB"]) as database:
        database.execute("UPDATE runs SET status = 'running' WHERE status = 'failed'")
    ok("merge", *TWO, "-m", "ties", "-o", "other")
    rows = json.loads(ok("runs", "list", "--json").out)["rows"]
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert rows[1]["error"] == "interrupted (no end was recorded)"
