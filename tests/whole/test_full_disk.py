"""A disk without room: one line with code 1, and nothing half-written, from every command that writes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.world import World
from tests.paths import ROOT

# Runs in a mount namespace of its own, whose disk of 64 kB has 16 kB left.
_COMMANDS = """
import json, os, subprocess, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import tests.conftest
import torch
from tests.cli import lora
from tests.fake_hub import FakeHub, lora_files

torch.set_num_threads(1)
small = Path("small").absolute()
small.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)], check=True)
os.environ.update(HOME=str(small), MPLCONFIGDIR=str(Path("fonts").absolute()))
lora("pool", "sync")
ids = lora("pool", "list", "-q", "--where", "status=ok").out.split()
found = []

def ask(*words, rest=45056):
    subprocess.run(f"rm -rf {small}/* {small}/.[a-z]*", shell=True, check=True)
    (small / ".bashrc").write_text("export MINE=1\\n")
    (small / "rest").write_bytes(b"x" * rest)
    told = lora(*words)
    # What a base's class holds may be kept in the cache, where it fits: a whole file or none.
    kept = [file for file in small.rglob("*.json") if file.parent.name == "skeletons"]
    assert all(json.loads(file.read_text()) for file in kept)
    left = sorted(file.name for file in small.rglob("*") if file.is_file() and file not in kept)
    found.append([words, int(told.code), told.out, told.err, left])

ask("merge", *ids, "-o", "small/out")
ask("merge", *ids, "--dense", "-o", "small/out")
ask("fit", "--data", "task.jsonl", "--steps", "3", "-o", "small/out")
ask("train", "--data", "task.jsonl", "--steps", "3", "-o", "small/out")
ask("eval", ids[0], "--data", "task.jsonl", "-o", "small/rows.jsonl")
ask("bake", ids[0], "-o", "small/out")
lora("export", "mlx", ids[0], "-o", "as-mlx")
ask("convert", "as-mlx", "-o", "small/out")
ask("merge", "as-mlx", "-o", "merged")
lora("bake", ids[0], "-o", "tuned")
ask("extract", "tuned", "--rank", "16", "-o", "small/out")
ask("diff", *ids[:2], "--plot", "small/plot.png")
ask("pool", "similarity", *ids, "--plot", "small/plot.png")
ask("pool", "sync", "--db", "small/new.db")
with FakeHub() as hub:
    hub.add("ann/large", lora_files(rank=64, hidden=512))
    os.environ.update(
        HF_ENDPOINT=hub.endpoint, LORA_BASE="acme/tiny-llama", LORA_POOL="", LORA_DB=str(Path("hub.db").absolute())
    )
    os.chdir("/")
    lora("pool", "sync")
    os.environ["HF_HUB_CACHE"] = str(small / "hub")
    ask("pool", "fetch", "ann/large")
ask("completion", "bash", "--install", rest=61440)
print(json.dumps(found), file=sys.__stdout__)
"""
_KEPT = {"fit": ".fit-", "eval": "rows.jsonl", "pool": "new.db"}
"""The beginning of the names of files that a command keeps for its next run."""


@pytest.mark.slow
def test_every_command_on_a_full_disk_is_one_line_and_leaves_nothing(own_world: World, tmp_path: Path) -> None:
    inside = ["unshare", "-Urm"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode != 0:
        pytest.skip("no namespaces here")
    done = subprocess.run(
        [*inside, sys.executable, "-c", _COMMANDS, str(ROOT)],
        cwd=own_world.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 14
    for words, code, out, err, left in found:
        assert (code, out) == (1, ""), (words, code, err)
        told = err.strip().splitlines()
        assert any("no space left on the disk" in line or " free " in line for line in told[-2:]), (words, err)
        assert "Traceback" not in err
        kept = _KEPT.get(words[0], "nothing")
        assert [name for name in left if not name.startswith(kept)] == [".bashrc", "rest"], (words, left)


_READS = """
import subprocess, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import tests.conftest
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import Adapter
from tests.cli import ok

small = Path("small").absolute()
small.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=True)
with Catalogue(small / "lora.db") as catalogue:
    catalogue.add([Adapter(id="ann/one", commit="a" * 40, source="hub", repo="ann/one")])
try:
    (small / "rest").write_bytes(b"x" * 2**20)
except OSError:
    pass
for words in (["list", "-q"], ["search", "one", "-q"], ["sql", "select id from adapters"]):
    print(ok("pool", *words, "--db", str(small / "lora.db")).out, end="", file=sys.__stdout__)
"""


@pytest.mark.slow
def test_a_catalogue_on_a_full_disk_can_be_read(tmp_path: Path) -> None:
    inside = ["unshare", "-Urm"]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], check=False).returncode != 0:
        pytest.skip("no namespaces here")
    done = subprocess.run(
        [*inside, sys.executable, "-c", _READS, str(ROOT)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.stdout.split("\n") == ["ann/one", "ann/one", "ann/one", ""], done.stderr


@pytest.mark.parametrize("words", ["--help", "--version", "merge --help"])
def test_help_that_cannot_be_written_is_one_line(words: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lora_cli", *words.split()], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"lora: no space left on the disk")
    assert b"Traceback" not in done.stderr
