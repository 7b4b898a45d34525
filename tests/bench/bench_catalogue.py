"""Lists and selection on a catalogue of 100,000 adapters: python -m tests.bench.bench_catalogue [ROWS].

First for the only base, then for a second one for which every adapter was judged as well.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import Adapter

BASE, OTHER = "acme/llama-8b", "acme/llama-8b-v2"
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CARD = "A LoRA that was trained on somebody's own data. " * 40
COMMANDS = (
    ("select", "--by", "random", "-k", "30"),
    ("select", "--by", "downloads", "-k", "30"),
    ("select", "--by", "rank", "-k", "30", "--max-per-author", "2"),
    ("select", "--by", "random", "-k", "30", "--where", "rank<=16"),
    ("pool", "stats"),
    ("pool", "search", "data"),
    ("pool", "search", "data own"),
    ("pool", "list", "-n", "20"),
    ("pool", "list", "-n", "20", "--sort", "-downloads"),
    ("pool", "list", "-n", "20", "--sort", "-created_at", "--where", "licence=mit", "--where", "rank<=16"),
    ("pool", "show", "author17/adpater-1017"),
)


def adapters(count: int) -> Iterator[Adapter]:
    """Adapters of an 8B model: seven modules in each of 32 layers, and a card of 2 kB."""
    modules = [f"model.layers.{layer}.{name}" for layer in range(32) for name in NAMES]
    for i in range(count):
        rank = (8, 16, 32, 64)[i % 4]
        yield Adapter(
            id=f"author{i % 1000}/adapter-{i}",
            commit=f"{i:040x}",
            source="hub",
            repo=f"author{i % 1000}/adapter-{i}",
            author=f"author{i % 1000}",
            base_declared=BASE,
            base=BASE,
            base_match="exact",
            peft_type="LORA",
            rank=rank,
            alpha=float(rank),
            scale=1.0,
            ranks=dict.fromkeys(modules, rank),
            target_modules=NAMES,
            modules=len(modules),
            layers=32,
            dtype="fp16",
            bytes=rank * 5_000_000,
            licence=("mit", "apache-2.0")[i % 2],
            downloads=i * 7919 % 100_003,
            likes=i % 50,
            created_at=f"2026-{1 + i % 12:02d}-{1 + i % 28:02d}T00:00:00.000Z",
            card=f"{CARD}{i}",
        )


def timed(command: tuple[str, ...], db: Path, base: str) -> tuple[float, float, int]:
    """Wall-clock seconds, CPU seconds and bytes held at most by one command."""
    started = time.perf_counter()
    words = [sys.executable, "-m", "lora_cli", *command, *([] if command == ("--version",) else ["--db", str(db)])]
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    process = os.posix_spawn(sys.executable, words, {**os.environ, "LORA_BASE": base}, file_actions=quiet)
    _, _, used = os.wait4(process, 0)
    return time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main(count: int = 100_000) -> None:
    """Print a table for each base: command, seconds, CPU seconds, megabytes, medians of three."""
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "catalogue.db"
        for base in (BASE, OTHER):
            started = time.perf_counter()
            with Catalogue(db) as catalogue:
                catalogue.add((replace(one, base=base) for one in adapters(count)), base=base)
            print(f"{base}: {count:,} in {time.perf_counter() - started:.1f} s, {db.stat().st_size / 1e9:.2f} GB")
            for command in (("--version",), *COMMANDS):
                wall, cpu, memory = sorted(timed(command, db, base) for _ in range(3))[1]
                print(f"{' '.join(command):<75} {wall:6.2f} s {cpu:6.2f} s CPU {memory / 1e6:8.0f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
