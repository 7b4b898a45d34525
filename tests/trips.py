"""How far an adapter travels through the tool: what is derived again, and hand-overs between rooms.

python -m tests.trips          prints the counts of `lora merge` of one adapter that only the Hub knows
python -m tests.trips eval     those of `lora eval` of 100 examples by likelihood
"""

import json
import os
import sqlite3
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tests.paths import ROOT

PACKAGE = str(ROOT / "lora_cli") + os.sep


class Trip:
    """Counts of one piece of work: calls by function, and hand-overs from a function to one of another file."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.between: Counter[tuple[str, str]] = Counter()

    @property
    def rooms(self) -> set[str]:
        """The files that were entered."""
        return {name.partition(":")[0] for name in self.calls}

    @property
    def between_rooms(self) -> Counter[tuple[str, str]]:
        """The hand-overs from one file to another."""
        found: Counter[tuple[str, str]] = Counter()
        for (one, other), count in self.between.items():
            found[one.partition(":")[0], other.partition(":")[0]] += count
        return found

    @property
    def handovers(self) -> int:
        """How often a function of one file called one of another."""
        return sum(self.between.values())

    def count(self, *functions: str) -> int:
        """How often these functions, each `file:function`, were called."""
        return sum(self.calls[name] for name in functions)

    def _seen(self, frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        here = name.removeprefix(PACKAGE)
        # The classes around SQLite's connection and cursor stand for the library: a statement is no hand-over.
        if here == "catalogue/database.py" and isinstance(
            frame.f_locals.get("self"), sqlite3.Connection | sqlite3.Cursor
        ):
            return
        self.calls[f"{here}:{frame.f_code.co_name}"] += 1
        back = frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(PACKAGE):
            back = back.f_back
        if (
            back is not None
            and back.f_code.co_name != "<module>"
            and (there := back.f_code.co_filename.removeprefix(PACKAGE)) != here
        ):
            self.between[f"{there}:{back.f_code.co_qualname}", f"{here}:{frame.f_code.co_qualname}"] += 1


@contextmanager
def travelled() -> Iterator[Trip]:
    """Count what happens in the block, in all threads."""
    trip = Trip()
    threading.setprofile(trip._seen)
    sys.setprofile(trip._seen)
    try:
        yield trip
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def merge_from_the_hub(do: Callable[..., Any], folder: Path) -> Trip:
    """The trip of `lora merge alice/sql` where neither the catalogue nor the cache knows that adapter."""
    from tests.fake_hub import FakeHub, lora_files

    with FakeHub() as server:
        server.add("alice/sql", lora_files(value=0.5))
        os.environ["HF_ENDPOINT"] = server.endpoint
        do("merge", "--help")  # a command's own flags are made once, when it is imported
        with travelled() as trip:
            do("merge", "alice/sql", "-o", str(folder / "out"), "--db", str(folder / "c.db"))
    return trip


def evaluation_of_a_folder(do: Callable[..., Any], folder: Path, examples: int = 100) -> Trip:
    """The trip of `lora eval` of one adapter in a folder, by likelihood, on so many examples."""
    from tests.adapters_on_disk import random_factors, write_adapter
    from tests.tiny_bases import characters, tiny_llama

    tiny_llama().save_pretrained(folder / "base")
    characters().save_pretrained(folder / "base")
    factors = random_factors({"model.layers.0.mlp.up_proj": (48, 32)}, 4, seed=0)
    adapter = write_adapter(folder / "adapter", factors, base=str(folder / "base"))
    lines = [json.dumps({"prompt": f"{number} =", "completion": f" {number}"}) for number in range(examples)]
    (folder / "task.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["eval", str(adapter), "--base", str(folder / "base"), "--data", str(folder / "task.jsonl")]
    words += ["--metric", "nll", "--db", str(folder / "c.db"), "-o", str(folder / "scores.jsonl")]
    do("eval", "--help")
    with travelled() as trip:
        do(*words)
    return trip


def main() -> None:
    """Print the counts."""
    home = tempfile.mkdtemp()
    os.environ.update(HF_HOME=f"{home}/hf", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HOME=home)
    os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
    os.chdir(home)
    from tests.cli import ok

    trip = (evaluation_of_a_folder if sys.argv[1:] == ["eval"] else merge_from_the_hub)(ok, Path(home))
    print(f"{len(trip.rooms)} rooms, {sum(trip.calls.values()):,} calls, {trip.handovers} hand-overs")
    for counts in (trip.between_rooms, trip.between):
        print(f"\n{len(counts)} pairs, such as")
        for (one, other), count in counts.most_common(40):
            print(f"{count:5} {one} → {other}")
    print()
    for name, count in trip.calls.most_common():
        if any(word in name for word in ("parse_config", "parse_header", "sha256", "digest", "content_oid", "scan_w")):
            print(f"{count:5} {name}")


if __name__ == "__main__":
    main()
