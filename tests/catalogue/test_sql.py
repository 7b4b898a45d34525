"""`pool sql` is bounded in time, memory and disk, whatever the query."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sql import query
from lora_cli.errors import LoraError, UsageError
from lora_cli.records import Adapter
from tests.cli import ok
from tests.paths import ROOT

NUMBERS = "with recursive n(i) as (select 1 union all select i + 1 from n limit {}) "
TIME, MEMORY, CELL, SIZE, ROWS = "stopped after", "of memory", "too big", "more than 100 MB", "more than 1,000,000 rows"
# Each query with the bounds that can end it: which is met first depends on the machine.
HEAVY: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "endless": ("with recursive x(n) as (select 1 union all select n + 1 from x) select count(*) from x", (TIME,)),
    "doubling": ("with recursive x(s) as (select 'a' union all select s || s from x) select s from x", (CELL,)),
    "blobs": (
        "with recursive x(s) as (select zeroblob(5000000) union all select s from x) select s from x",
        (SIZE, MEMORY, TIME),
    ),
    "zeroblob": ("select zeroblob(2000000000)", (CELL,)),
    "cells": (f"select {', '.join(['hex(zeroblob(4999999))'] * 500)}", (MEMORY,)),
    "random": (NUMBERS.format(10**5) + "select randomblob(1000000) from n", (SIZE, TIME, MEMORY)),
    "concatenation": (NUMBERS.format(10**8) + "select group_concat(hex(randomblob(1000))) from n", (CELL, TIME)),
    "groups": (
        NUMBERS.format(10**8) + "select group_concat(hex(zeroblob(9999))) from n group by i % 9999",
        (CELL, TIME),
    ),
    "sorting": (NUMBERS.format(10**7) + "select randomblob(2000) r from n order by r limit 1", (TIME, "of the disk")),
    "distinct": (NUMBERS.format(10**8) + "select count(distinct randomblob(1000)) from n", (TIME, "of the disk")),
    "replacing": ("select replace(replace(hex(zeroblob(999999)), '0', 'aaaa'), 'a', 'bbbbbb')", (CELL,)),
    "one function": ("select instr(hex(zeroblob(4000000)), hex(zeroblob(2000000)) || 'x')", (TIME,)),
    "join": (f"select count(*) from {', '.join(f'sqlite_master t{n}' for n in range(7))}", (TIME,)),
    "rows": (NUMBERS.format(10**7) + "select i from n", (ROWS, TIME)),
    "window": (NUMBERS.format(10**7) + "select sum(i) over (order by i desc) from n", (TIME, ROWS)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Catalogue(tmp_path / "catalogue.db") as catalogue:
        catalogue.add([Adapter(id="a/b", commit="a" * 40, source="hub", repo="a/b", downloads=7)])
        return catalogue.path


@pytest.mark.parametrize("name", ["endless", "one function", "zeroblob", "cells"])
def test_a_query_that_runs_away_is_stopped(path: Path, name: str) -> None:
    sql, bounds = HEAVY[name]
    begin = time.monotonic()
    seconds = 0.5 if TIME in bounds else 10.0
    with pytest.raises(UsageError) as caught:
        query(path, sql, seconds=seconds, memory=200_000_000)
    assert any(bound in caught.value.message for bound in bounds)
    assert time.monotonic() - begin < seconds + 2


def test_a_result_has_a_bound_on_its_rows_and_a_sort_on_its_file(path: Path) -> None:
    with pytest.raises(UsageError, match="more than 1,000 rows"):
        query(path, NUMBERS.format(5000) + "select i from n", rows=1000)
    with pytest.raises(UsageError, match=r"more than 1\.0 MB of the disk to sort"):
        query(path, NUMBERS.format(30000) + "select count(distinct randomblob(1000)) from n", disk=1_000_000)


def test_every_kind_of_value_comes_back_as_it_is(path: Path) -> None:
    names, rows = query(path, "select 1 a, 1.5, 'é\u2028\n', x'00ff', null, 9e999, 9223372036854775807")
    assert names[0] == "a"
    assert rows == [(1, 1.5, "é\u2028\n", b"\x00\xff", None, float("inf"), 9223372036854775807)]


def measured(path: Path, seconds: float) -> dict[str, tuple[str, float]]:
    """The message and the time of every heavy query."""
    found = {}
    for name, (sql, _) in HEAVY.items():
        begin = time.monotonic()
        try:
            said = f"{len(query(path, sql, seconds=seconds)[1])} rows"
        except LoraError as error:
            said = error.message
        found[name] = (said, time.monotonic() - begin)
    return found


def test_columns_of_one_name_are_all_there(path: Path) -> None:
    told = ok("pool", "sql", "select 1 a, 2 a, 3 a_2, 4 a", "--json", "--db", str(path))
    assert json.loads(told.out)["rows"] == [{"a": 1, "a_3": 2, "a_2": 3, "a_4": 4}]


_MEASURE = """
import json, resource, sys
from pathlib import Path
from lora_cli.formats.run_record import peak_bytes
from tests.catalogue.test_sql import measured
found = measured(Path(sys.argv[1]), 2.0)
peaks = [peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]
sys.stdout.write(json.dumps([found, peaks]))
"""


@pytest.mark.slow
def test_no_query_takes_more_than_its_time_and_memory(path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found: dict[str, Any]
    found, peaks = json.loads(told.stdout)
    for name, (said, seconds) in found.items():
        assert any(bound in said for bound in (TIME, *HEAVY[name][1])), (name, said)
        assert seconds < 2.0 + 3.0, name
    assert max(peaks) < 1_100_000_000
