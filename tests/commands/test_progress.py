"""Work that may take seconds before the first step reports its progress, in a notebook as in a command."""

import hashlib
from pathlib import Path

import pytest

import lora_cli
from lora_cli.formats.checkpoint import version_of_folder
from lora_cli.hashes import file_sha256
from lora_cli.records import patient
from lora_cli.world import World

Calls = list[tuple[str, int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """An empty list; files are hashed in blocks of a thousand bytes."""
    monkeypatch.setattr("lora_cli.hashes._BLOCK", 1000)
    return []


def test_hashing_a_large_file_reports_its_progress(calls: Calls, tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    for name, content in (("large", data), ("small", data[:999]), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        found = file_sha256(tmp_path / name, lambda *call: calls.append(call))
        assert found == hashlib.sha256(content).hexdigest()
    assert {what for what, _, _ in calls} == {"hashing large, MB"}
    assert calls[-1][1:] == (3, 3)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    calls.clear()
    file_sha256(tmp_path / "large", lambda *call: calls.append(call))
    assert calls == []


def test_quick_work_reports_nothing(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    version_of_folder(tmp_path, lambda *call: calls.append(call))
    assert calls == []
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    report = patient(lambda *call: calls.append(call))
    for now[0] in (101.9, 102.0, 103.0):
        report("work", int(now[0]), 200)
    assert calls == [("work", 102, 200), ("work", 103, 200)]


def test_hashing_and_loading_report_to_a_notebook(
    own_world: World, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_world.folder)
    monkeypatch.setattr("lora_cli.records.PATIENCE", 0.0)
    monkeypatch.setattr("lora_cli.hashes._known", {})
    adapters = [str(own_world.pool / "kestrel" / "outer"), str(own_world.pool / "tarn" / "mirror")]
    with lora_cli.open_pool(progress=lambda *call: calls.append(call)) as pool:

        def words() -> list[str]:
            found = list(dict.fromkeys(what for what, _, _ in calls))
            calls.clear()
            return [what for what in found if ".json" not in what]

        pool.fit("task.jsonl", adapters, steps=1)
        before = ["hashing adapters", "looking up adapters", "opening adapters"]
        hashing = "hashing model.safetensors, MB"
        assert words()[:7] == [hashing, *before, "loading the base", "loading adapters", "fit: adapters"]
        pool.fit("task.jsonl", adapters, steps=1)
        assert words()[-1].startswith("hashing "), "of the finished result"
        pool.evaluate("task.jsonl", adapters[:1])
        assert words()[:3] == [*before[1:], "loading the base"]
        pool.train("task.jsonl", steps=1, rank=2)
        assert words()[0] == "loading the base"
        dense = pool.merge(adapters, dense=True)
        assert "hashing delta.safetensors, MB" in words()
        monkeypatch.setattr("lora_cli.hashes._known", {})
        pool.bake(str(dense))
        assert words()[:2] == ["hashing delta.safetensors, MB", hashing]
