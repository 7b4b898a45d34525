"""Export of adapters and scores, import of a table and of a pool: python -m tests.bench.bench_tables [ROWS]."""

import random
import sys
import tempfile
from pathlib import Path

from lora_cli.catalogue.adapters import Catalogue
from tests.bench.bench_catalogue import BASE, adapters, timed

POOL, TASKS = 960, 62


def table(file: Path) -> None:
    """A table of scores with two columns of another's name and one cell in fifty empty."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        out.write(",".join(["adapter", *(f"task{n % (TASKS - 2)}" for n in range(TASKS))]) + "\n")
        for number in range(POOL):
            cells = ("" if draw.random() < 0.02 else f"{draw.random():.6f}" for _ in range(TASKS))
            out.write(",".join([f"author{number % 1000}/adapter-{number}", *cells]) + "\n")


def main(count: int = 100_000) -> None:
    """Print a table: command, seconds, CPU seconds, megabytes of memory, megabytes of the file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Catalogue(folder / "large.db") as catalogue:
            catalogue.add(adapters(count))
        with Catalogue(folder / "pool.db") as catalogue:
            catalogue.add(adapters(POOL))
        table(folder / "wide.csv")
        exports = [
            (folder / "large.db", ("pool", "export", "--what", "adapters", "-o", str(folder / f"out.{ending}")))
            for ending in ("csv", "parquet", "jsonl")
        ]
        task = "select id, value from adapter_scores where task = 'task1' order by value desc limit 30"
        scores = [
            (folder / "pool.db", words)
            for words in (
                ("pool", "import", str(folder / "wide.csv")),
                ("pool", "import", str(folder / "wide.csv")),
                ("pool", "sql", task),
                ("pool", "export", "--what", "scores", "-o", str(folder / "scores.csv")),
                ("pool", "export", "--what", "scores", "-o", str(folder / "scores.parquet")),
            )
        ]
        new = (folder / "new.db", ("pool", "import", str(folder / "out.jsonl")))
        for db, words in (*exports, *scores, new):
            wall, cpu, memory = timed(words, db, BASE)
            shown = " ".join(word.removeprefix(f"{folder}/") for word in words)
            made = Path(words[-1])
            size = f"{made.stat().st_size / 1e6:8.1f} MB" if made.is_file() else ""
            print(f"{shown[:60]:<60} {wall:6.2f} s {cpu:6.2f} s CPU {memory / 1e6:8.0f} MB {size}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
