"""Two syncs of 10,000 adapters, 2 % changed between them: python -m tests.bench.bench_sync [ADAPTERS] [PROFILE].

The stand-in Hub is a process of its own, so that the peak memory is that of the sync. With a PROFILE, the file gets the
figures of cProfile for the first sync.
"""

import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

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


def synced(db: Path, endpoint: str, profile: Sequence[str] = ()) -> tuple[dict[str, float], float, int]:
    """The report of `lora pool sync` in a process of its own, its seconds of CPU and its largest memory in bytes."""
    words = [sys.executable, *profile, "-m", "lora_cli", "pool", "sync", BASE, "--db", str(db), "--json"]
    home = str(db.parent)
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": home, "NO_PROXY": "127.0.0.1", "HOME": home}
    with (db.parent / "out.json").open("w+") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=subprocess.DEVNULL)
        _, _, used = os.wait4(process.pid, 0)
        out.seek(0)
        report = json.load(out)
    return report, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main(count: str = "10000", profile: str = "") -> None:
    """Print a line for each sync."""
    ours, theirs = mp.Pipe()
    server = mp.Process(target=serve, args=(int(count), theirs))
    server.start()
    endpoint = ours.recv()
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "catalogue.db"
        for which in ("first", "second", "third, 2 % changed"):
            if which.startswith("third"):
                ours.send("change")
                ours.recv()
            begin = time.perf_counter()
            how = ("-m", "cProfile", "-o", profile) if profile and which == "first" else ()
            report, cpu, memory = synced(db, endpoint, how)
            print(
                f"{which}: {report['new']:,} new, {report['changed']:,} changed; {report['requests']:,} requests, "
                f"{report['bytes'] / 1e6:.1f} MB, {time.perf_counter() - begin:.1f} s, {cpu:.1f} s of CPU, "
                f"{memory / 1e6:.0f} MB at most",
                flush=True,
            )
        print(f"catalogue: {db.stat().st_size / 1e6:.0f} MB")
    ours.send("end")
    server.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
