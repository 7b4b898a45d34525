"""Three syncs of 10,000 adapters, 2 % changed before the last: python -m tests.bench.bench_sync [ADAPTERS] [PYTHON…].

The stand-in Hub is a process of its own, so that the peak memory is that of the sync. Each PYTHON is one in which an
older version is installed: it and this version sync 1,000 adapters in turns, three times each.
"""

import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from tests.fake_hub import BASE, FakeHub, lora_files

_RANKS = (2, 4, 8, 16)


def serve(count: int, line: Connection) -> None:
    """Serve adapters until told to end; any other word changes 2 % of them."""
    with FakeHub() as fake:
        start = datetime(2026, 1, 1, tzinfo=UTC)
        pool = [lora_files(rank=rank) for rank in _RANKS]
        for n in range(count):
            made = start + timedelta(minutes=n)
            fake.add(f"author{n % 500}/lora-{n:05d}", dict(pool[n % 4]), created=made, downloads=n, likes=n % 7)
        line.send(fake.endpoint)
        while line.recv() != "end":
            for repo in [*fake.repos.values()][::50]:
                files = {name.replace(".", "__"): data for name, data in lora_files(rank=32).items()}
                repo.commit(**files)
            line.send(None)


def synced(db: Path, endpoint: str, python: str = sys.executable) -> tuple[dict[str, float], float, int]:
    """The report of `lora pool sync` in a process of its own, its seconds of CPU and its largest memory in bytes."""
    words = [python, "-m", "lora_cli", "pool", "sync", BASE, "--db", str(db), "--json"]
    home = str(db.parent)
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": home, "NO_PROXY": "127.0.0.1", "HOME": home}
    with (db.parent / "out.json").open("w+") as out:
        process = subprocess.Popen(words, env=environment, cwd=home, stdout=out, stderr=subprocess.DEVNULL)
        _, _, used = os.wait4(process.pid, 0)
        out.seek(0)
        report = json.load(out)
    return report, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


@contextmanager
def served(count: int) -> Iterator[tuple[str, Connection]]:
    """The address of a stand-in Hub of so many adapters, and the line to its process."""
    ours, theirs = mp.Pipe()
    server = mp.Process(target=serve, args=(count, theirs))
    server.start()
    yield ours.recv(), ours
    ours.send("end")
    server.join()


def beside(peers: list[str]) -> None:
    """Print a line for each version: the medians of three first syncs of 1,000 adapters, in turns."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    with served(1000) as (endpoint, _):
        for _ in range(3):
            for python in (sys.executable, *peers):
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.perf_counter()
                    _, cpu, memory = synced(Path(folder) / "catalogue.db", endpoint, python)
                    found.setdefault(python, []).append((time.perf_counter() - begin, cpu, memory))
    for python, runs in found.items():
        wall, cpu, memory = map(median, zip(*runs, strict=True))
        name = "this version" if python == sys.executable else python
        print(f"1,000 by {name}: {wall:.1f} s, {cpu:.1f} s of CPU, {1000 / wall:.0f} a second, {memory / 1e6:.0f} MB")


def main(count: str = "10000", *peers: str) -> None:
    """Print a line for each sync."""
    with served(int(count)) as (endpoint, line), tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "catalogue.db"
        for which in ("first", "second", "third, 2 % changed"):
            if which.startswith("third"):
                line.send("change")
                line.recv()
            begin = time.perf_counter()
            report, cpu, memory = synced(db, endpoint)
            print(
                f"{which}: {report['new']:,} new, {report['changed']:,} changed; {report['requests']:,} requests, "
                f"{report['bytes'] / 1e6:.1f} MB, {time.perf_counter() - begin:.1f} s, {cpu:.1f} s of CPU, "
                f"{memory / 1e6:.0f} MB at most",
                flush=True,
            )
        print(f"catalogue: {db.stat().st_size / 1e6:.0f} MB")
    if peers:
        beside([*peers])


if __name__ == "__main__":
    main(*sys.argv[1:])
