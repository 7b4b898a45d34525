"""`lora demo`: one table over the whole tool, and a folder in which the next commands work."""

import json
import subprocess
import sys
from pathlib import Path


def demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_cli", "demo", str(folder), "--size", "test", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_demo_shows_what_the_tool_is_for(tmp_path: Path) -> None:
    done = demo(tmp_path / "world", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["system"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == [
        "base",
        "average of 3 random",
        "TIES of 3 random",
        "adaptive, 3 random",
        "adaptive, 3 nearest",
        "new LoRA on the same data",
        "control: random weights",
    ]
    assert rows["base"]["value"] < 0.2
    assert rows["adaptive, 3 nearest"]["value"] > 0.7
    assert rows["adaptive, 3 nearest"]["low"] > rows["control: random weights"]["high"]
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] == 100 for row in rows.values())
    assert "the nearest adapters hold pool/kestrel/outer" in done.stderr
    assert "lora merge --method ties" in done.stderr
    assert (tmp_path / "world" / "lora.toml").exists()

    again = demo(tmp_path / "world", "--json")
    assert again.returncode == 0, again.stderr
    values = {row["system"]: row["value"] for row in json.loads(again.stdout)["rows"]}
    assert values == {name: row["value"] for name, row in rows.items()}

    other = demo(tmp_path / "world", "--seed", "1")
    assert (other.returncode, other.stdout) == (1, "")
    assert "name another folder" in other.stderr
