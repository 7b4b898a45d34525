"""Kills, crowds, full disks and a faulty Hub: every long command, disturbed at random, ends as if left in peace.

python -m tests.soak [KILLS [SEED [DISKS [ADAPTERS]]]]     by default 200 kills, 4 full disks a command and a sync of
                                                           2,000 adapters through faults; the last line is the sum

A process with every library loaded forks the commands, so that a kill meets the work and not the imports.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.paths import ROOT
from tests.warm import load_libraries, run_command

SYNCED = 120
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
DISK = 8 << 20
LEFT = (1 << 14, 0, 1 << 17, 1 << 19)
TASK = ("--base", "../base", "--data", "../task.jsonl")
VERBS: Mapping[str, tuple[str, ...]] = {
    "sync": ("pool", "sync", "acme/tiny-llama"),
    "merge": ("merge", "../a", "../b", "../c", "-m", "ties", "-o", "out"),
    "bake": ("bake", "../a", "--base", "../base", "-o", "out"),
    "fit": ("fit", "../a", "../b", "../c", *TASK, "--steps", "40", "--checkpoint", "last", "-o", "out"),
    "train": ("train", *TASK, "--steps", "12", "--rank", "2", "-o", "out"),
    "eval": ("eval", "../a", "../b", *TASK, "--max-new-tokens", "6", "--batch-size", "2", "-o", "scores.jsonl"),
}


class Tally(NamedTuple):
    """The disturbances of one soak."""

    kills: int
    crowd: int
    full: int
    faults: int


class Calm(NamedTuple):
    """An undisturbed run: its seconds, and the state that it leaves."""

    seconds: float
    state: Mapping[str, object]


def build(folder: Path) -> None:
    """A base, three adapters and a task below `folder`."""
    from tests.adapters_on_disk import random_factors, write_adapter
    from tests.tiny_bases import examples, saved

    saved(folder / "base")
    shapes = {f"model.layers.{layer}.mlp.up_proj": (48, 32) for layer in range(2)}
    for seed, name in enumerate("abc"):
        write_adapter(folder / name, random_factors(shapes, 3 + seed, seed=seed), base=str(folder / "base"))
    lines = [f'{{"prompt": "{one.prompt}", "completion": "{one.completion}"}}\n' for one in examples(24)]
    (folder / "task.jsonl").write_text("".join(lines), encoding="utf-8")


@contextmanager
def hub() -> Iterator[str]:
    """The address of a stand-in Hub with adapters, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        from tests.fake_hub import FakeHub

        with FakeHub() as server:
            server.add_many(SYNCED)
            os.write(writing, server.endpoint.encode())
            os.close(writing)
            signal.pause()
    os.close(writing)
    with os.fdopen(reading) as told:
        endpoint = told.read()
    try:
        yield endpoint
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def start(folder: Path, words: tuple[str, ...]) -> int:
    """Fork `lora` in `folder`; its words go to the file `said` beside the folder. Returns the process's id."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    os.environ["LORA_DB"] = str(folder / "lora.db")
    said = os.open(folder.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os._exit(run_command(words))


def ended(child: int) -> int:
    """The exit code of a process, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(folder: Path) -> Path:
    """An empty folder, and an empty cache of the Hub's files."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    folder.mkdir()
    return folder


def _rows(file: Path) -> bytes:
    """The whole rows of an evaluation in one order, without times: those asked again end in another order."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [{**json.loads(line), "seconds": 0} for line in lines if line.endswith("\n")]
    return json.dumps(sorted(rows, key=lambda row: (row["system"], row["id"]))).encode()


def files(folder: Path) -> dict[str, object]:
    """Every file below a folder, the catalogue's aside, by its SHA-256."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.name.startswith("lora.db"):
            text = _rows(file) if file.name == "scores.jsonl" else file.read_bytes()
            found[str(file.relative_to(folder))] = hashlib.sha256(text).hexdigest()
    return found


def state(folder: Path) -> dict[str, object]:
    """The files below a folder, and the catalogue's rows, without times and the runs that failed."""
    found = files(folder)
    with closing(sqlite3.connect(folder / "lora.db")) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT * FROM adapters ORDER BY id")]
        found["adapters"] = [{name: row[name] for name in row if name not in ("key", "seen_at")} for row in rows]
        found["runs"] = sorted({*map(tuple, db.execute("SELECT command, status FROM runs WHERE status = 'done'"))})
        scores = "SELECT system, adapters, task_sha256, metric, value, low, high, n FROM scores"
        found["scores"] = sorted({*map(tuple, db.execute(scores))})
    return found


def said_by(folder: Path) -> str:
    """The words of the last command in a folder."""
    return folder.with_suffix(".said").read_text(encoding="utf-8", errors="replace")


def undisturbed(folder: Path, words: tuple[str, ...]) -> Calm:
    """Run a command in peace, twice: what takes longer the first time only is left out of the time."""
    for _ in range(2):
        began = time.monotonic()
        code = ended(start(fresh(folder), words))
        assert code == 0, said_by(folder)
        seconds = time.monotonic() - began
    return Calm(seconds, state(folder))


def demand_whole(folder: Path, calm: Calm) -> None:
    """A result stands there whole or not at all, and the catalogue is sound."""
    for name, digest in files(folder).items():
        if name.startswith("out/"):
            assert digest == calm.state[name], f"{folder.name}: {name} is half-written"
    with closing(sqlite3.connect(folder / "lora.db")) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def demand_equal(folder: Path, calm: Calm) -> None:
    """The state is that of an undisturbed run."""
    now = state(folder)
    wrong = [name for name in {*now, *calm.state} if now.get(name) != calm.state.get(name)]
    assert not wrong, f"{folder.name}: {wrong}\n{said_by(folder)}"


def kills(folder: Path, words: tuple[str, ...], calm: Calm, count: int, draw: random.Random) -> int:
    """Kill a command that many times at random moments, go on after each, and compare what it ends with."""
    done = finished = 0
    fresh(folder)
    while done < count:
        number = draw.choice(SIGNALS)
        child = start(folder, words)
        time.sleep(draw.uniform(0, calm.seconds))
        os.kill(child, number)
        code = ended(child)
        assert code in (0, -number, 128 + number), f"{folder.name}: ended with {code}\n{said_by(folder)}"
        done += code != 0
        demand_whole(folder, calm)
        if number == signal.SIGTERM and code == 128 + number:
            assert [*folder.glob("**/.*.partial")] == [], f"{folder.name}: unfinished work is left after SIGTERM"
        if code == 0:
            finished += 1
            demand_equal(folder, calm)
            fresh(folder)
    assert ended(start(folder, words)) == 0, said_by(folder)
    demand_equal(folder, calm)
    return done


def crowd(folder: Path, calm: Calm, count: int = 8) -> int:
    """So many syncs at once into one catalogue."""
    fresh(folder)
    children = [start(folder, VERBS["sync"]) for _ in range(count)]
    codes = [ended(child) for child in children]
    assert codes == [0] * count, f"{codes}\n{said_by(folder)}"
    demand_equal(folder, calm)
    return count


def full_disk(folder: Path, words: tuple[str, ...], calm: Calm, left: int) -> bool:
    """Run a command on a disk of 8 MB with so many bytes left, then with room. True if it met the end of the disk."""
    fresh(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        (folder / "filler").write_bytes(bytes(DISK - left - 8192))
        code = ended(start(folder, words))
        said = said_by(folder)
        assert code in (0, 1, 6), f"{folder.name}: ended with {code}\n{said}"
        if code:
            assert "no space left" in said, said
            assert "Traceback" not in said, said
            assert {path.name for path in folder.iterdir() if not path.name.startswith("lora.db")} == {"filler"}, said
        (folder / "filler").unlink()
        assert ended(start(folder, words)) == 0, said_by(folder)
        demand_equal(folder, calm)
        return code != 0
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    subprocess.run(["umount", "-l", str(folder)], check=True)
    return True


def soak(folder: Path, count: int, seed: int, disks: int, adapters: int) -> Tally:
    """Every command disturbed below `folder`: `count` kills in all, a crowd of syncs, `disks` full disks each; then a
    sync of `adapters` through faults of the Hub, 0 for none.
    """
    load_libraries()
    draw = random.Random(seed)
    build(folder)
    mounted = can_mount(folder / "disk")
    killed = met = crowded = 0
    for place, (verb, words) in enumerate(VERBS.items()):
        began = time.monotonic()
        calm = undisturbed(folder / f"{verb}-calm", words)
        share = count // len(VERBS) + (place < count % len(VERBS))
        killed += kills(folder / verb, words, calm, share, draw)
        if verb == "sync":
            assert {row["status"] for row in calm.state["adapters"]} == {"ok"}
            crowded = crowd(folder / verb, calm)
        if mounted:
            met += sum(full_disk(folder / f"{verb}-full", words, calm, left) for left in LEFT[:disks])
        print(f"{verb}: {calm.seconds:.2f} s in peace, {share} kills, {time.monotonic() - began:.0f} s", flush=True)
    faults = 0
    if adapters:
        from tests.sources.endure import endure

        played, syncs = endure(fresh(folder / "faults"), adapters, seed)
        faults = sum(played.values())
        print(f"faults: {faults:,} of {len(played)} kinds in {syncs} syncs of {adapters:,} adapters", flush=True)
    return Tally(killed, crowded, met, faults)


def main(count: int = 200, seed: int = 0, disks: int = len(LEFT), adapters: int = 2000) -> None:
    """Print what was survived."""
    with tempfile.TemporaryDirectory() as name, hub() as endpoint:
        home = Path(name)
        os.environ.update(
            HF_HOME=str(home / "hf"), HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1",
            HOME=str(home), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", LORA_POOL="",
        )  # fmt: skip
        for given in [given for given in os.environ if given.startswith("LORA_")]:
            del os.environ[given]
        os.chdir(ROOT)
        tally = soak(home, count, seed, disks, adapters)
        said = f"{tally.kills} kills, {tally.crowd} syncs at once, {tally.full} full disks"
        print(f"{said}, {tally.faults:,} faults of a Hub: nothing was lost")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
