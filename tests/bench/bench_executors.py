"""What executors take beside the cells: 40 cells that sleep for 5 s, by two workers.

    python -m tests.bench.bench_executors

The rows are local, ray on a cluster that runs, and ray with a cluster of its own. All processes that an executor starts
import tests/bench/sleeping_workers.py in place of lora_cli/steps/study/workers.py, by a hook of Python.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CELLS, WORKERS = 40, 2
HOOK = """\
import importlib.util, sys

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "lora_cli.steps.study.workers":
            return importlib.util.spec_from_file_location(name, {file!r})
        return None

sys.meta_path.insert(0, Finder)
"""


class Cell(NamedTuple):
    """A cell that needs nothing."""

    name: str
    needs: tuple[str, ...] = ()


def measure(what: str, name: str, folder: Path, address: str | None = None) -> None:
    """Print the seconds of one executor beside its cells: before the first ones, between them, and after the last."""
    from lora_cli.executors import Script, executor
    from lora_cli.records import silent, unheard
    from tests.bench.sleeping_workers import SECONDS, SleepingFolder

    run = executor(name, address=address)
    cells = [Cell(f"cell-{number:02}") for number in range(CELLS)]
    begin, ends = time.monotonic(), list[float]()
    outcomes = run(SleepingFolder(folder), cells, jobs=WORKERS, progress=silent, warn=unheard)
    assert not isinstance(outcomes, Script)
    for outcome in outcomes:
        assert not outcome.error
        ends.append(time.monotonic() - begin)
    took, least = time.monotonic() - begin, CELLS * SECONDS / WORKERS
    assert len(ends) == CELLS
    start, beside, end = ends[0] - SECONDS, took - least, took - ends[-1]
    print(f"{what:24}{took:7.1f} s, {beside:5.1f} s beside the cells = {beside / least:.1%} of {least:.0f} s", end="")
    print(f": start {start:.1f} s, between {beside - start - end:.1f} s, end {end:.1f} s, ", end="")
    print(f"load {os.getloadavg()[0]:.0f}", flush=True)


def main() -> None:
    """Print a row for each executor."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sleeping = Path(__file__).with_name("sleeping_workers.py")
        (folder / "sitecustomize.py").write_text(HOOK.format(file=str(sleeping)))
        os.environ["PYTHONPATH"] = place
        measure("local", "local", folder)
        hooks = Path(tempfile.mkdtemp(dir=place))
        words = [sys.executable, "-m", "tests.executors.ray_cluster", str(hooks), *["-"] * WORKERS]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
            assert cluster.stdout is not None
            line = next(line for line in cluster.stdout if line.startswith("cluster "))
            measure("ray, cluster that runs", "ray", folder, line.split()[1])
            cluster.communicate()
        measure("ray, cluster of its own", "ray", folder)


if __name__ == "__main__":
    main()
