"""A study killed at random moments, again and again, ends as one that was left in peace.

python -m tests.soak_study [KILLS [SEED]]     by default 20 kills; every fifth study has two workers

A process with every library loaded forks the studies, so that a kill meets the work and not the imports.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests import small_study
from tests.paths import ROOT
from tests.soak import ended, said_by, start
from tests.warm import load_libraries


def words_of(number: int) -> tuple[str, ...]:
    """The words of the study with this number."""
    return (*small_study.WORDS, "-o", "out", "--jobs", "2" if number % 5 == 4 else "1")


def demand_sound(folder: Path, calm: dict[str, bytes]) -> int:
    """Every result that is there is that of the study left in peace; how many there are."""
    files = [*folder.glob("out/cells/*/result.json")]
    for file in files:
        assert file.read_bytes() == calm[file.parent.name], f"{file.parent.name} is not what it has to be"
    return len(files)


def soak(home: Path, count: int, seed: int) -> tuple[int, int]:
    """`count` kills below `home`; how many studies came to their end meanwhile, and the most cells that a kill met."""
    load_libraries()
    draw, place = random.Random(seed), small_study.build(home / "place")
    os.environ["LORA_DB"] = str(place / "lora.db")
    assert ended(start(place, ("pool", "sync"))) == 0, said_by(place)
    seconds = 0.0
    for _ in range(2):
        small_study.forget(place / "out")
        began = time.monotonic()
        assert ended(start(place, words_of(0))) == 0, said_by(place)
        seconds = time.monotonic() - began
    print(f"{seconds:.1f} s in peace", flush=True)
    calm = small_study.results(place / "out")
    small_study.forget(place / "out")
    killed = finished = most = 0
    while killed < count:
        child = start(place, words_of(killed))
        time.sleep(draw.uniform(0, seconds * (3 if killed % 5 == 4 else 0.5)))
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL), f"ended with {code}\n{said_by(place)}"
        killed += code != 0
        most = max(most, demand_sound(place, calm))
        if code == 0:
            assert small_study.results(place / "out") == calm
            small_study.forget(place / "out")
            finished += 1
    assert ended(start(place, words_of(0))) == 0, said_by(place)
    assert small_study.results(place / "out") == calm, "the study ended otherwise"
    left = [str(file) for file in (place / "out").rglob(".*") if file.name.endswith(".partial")]
    assert left == [], f"unfinished work is left: {left}"
    return finished, most


def main(count: int = 20, seed: int = 0) -> None:
    """Print what was survived."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        for given in [given for given in os.environ if given.startswith("LORA_")]:
            del os.environ[given]
        os.environ.update(HOME=str(home), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))
        finished, most = soak(home, count, seed)
        print(f"{count} kills of a study, {finished} ends between them, up to {most} cells there: nothing was lost")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
