"""The choice of columns and formats in every list, and cells that a spreadsheet would run."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.columns import Column, on_request
from lora_cli.screen import Format, Screen
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok, refused
from tests.generate import commands
from tests.test_screen import on_terminal

SHAPES = {"model.layers.0.self_attn.q_proj": (16, 16), "model.layers.0.mlp.up_proj": (32, 16)}
COLUMNS = (
    Column("ADAPTER", "id"),
    Column("REV", "rev", of="commit", show=lambda row: row["commit"][:3]),
    Column("SIZE", "bytes", "right", minor=True, show=lambda row: f"{row['bytes'] / 1e6:,.1f} MB"),
    *on_request("commit", "norm"),
)
ROWS = [{"id": "ann/a", "commit": "abcdef", "bytes": 1234567890, "norm": 0.1234567890123}]


@pytest.fixture
def here(own_home: Path) -> Path:
    """A working folder with a catalogued pool of two adapters."""
    for rank, name in ((2, "one"), (4, "two")):
        write_adapter(own_home / "pool" / name, random_factors(SHAPES, rank, seed=rank), base="acme/base")
    ok("pool", "sync", "--from", "pool")
    return own_home


def shown(capsys: pytest.CaptureFixture[str], format: Format, columns: tuple[str, ...] = (), **more: Any) -> str:
    Screen(format, columns).rows("lora.x/1", COLUMNS, ROWS, **more)
    return capsys.readouterr().out


def test_people_get_words_and_programs_get_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "1,234.6 MB" in shown(capsys, "table")
    assert shown(capsys, "md").splitlines()[2] == "| ann/a | abc | 1,234.6 MB |"
    assert shown(capsys, "tsv") == "ann/a\tabc\t1234567890\n"
    assert shown(capsys, "csv") == "id,commit,bytes,norm\nann/a,abcdef,1234567890,0.1234567890123\n"
    assert json.loads(shown(capsys, "json"))["rows"] == ROWS


def test_columns_are_chosen_and_ordered_by_key_or_heading(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("norm", "Size", "id")
    assert shown(capsys, "tsv", chosen) == "0.1234567890123\t1234567890\tann/a\n"
    assert shown(capsys, "csv", chosen).startswith("norm,bytes,id\n")
    assert json.loads(shown(capsys, "jsonl", chosen)) == {"norm": 0.1234567890123, "bytes": 1234567890, "id": "ann/a"}
    assert shown(capsys, "md", chosen).splitlines()[0] == "| NORM | SIZE | ADAPTER |"
    assert shown(capsys, "quiet") == "ann/a\n"


def test_rows_show_the_column_that_they_are_sorted_by(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "tsv", sorted_by="norm") == "ann/a\tabc\t1234567890\t0.1234567890123\n"
    # A column that is there, or is there in short, is not repeated.
    assert shown(capsys, "tsv", sorted_by="bytes") == shown(capsys, "tsv", sorted_by="commit") == shown(capsys, "tsv")
    assert shown(capsys, "tsv", ("id",), sorted_by="norm") == "ann/a\n"


def test_a_cell_that_a_spreadsheet_would_run_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["=1+1", "+cmd", "-cmd", "@sum", "\t=1", "\r=1", "-5", "+1e3", "a=1", "\u202eb", "-inf"]
    rows = [{"id": text, "=key": -1.5} for text in texts]
    Screen("csv").rows("lora.x/1", (Column("ID", "id"),), rows)
    heading, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert heading == ["id", "'=key"]
    assert [line[0] for line in lines] == [
        "'=1+1", "'+cmd", "'-cmd", "'@sum", "'\\x09=1", "'\\x0d=1", "-5", "+1e3", "a=1", "\\u202eb", "'-inf"
    ]  # fmt: skip
    assert {line[1] for line in lines} == {"-1.5"}


def test_a_strangers_text_stays_text_in_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("md").rows("lora.x/1", (Column("ID", "id"),), [{"id": "a|b [x](http://y) <b> `c` \x1b"}])
    assert capsys.readouterr().out.splitlines()[2] == r"| a\|b \[x\](http://y) \<b> \`c\` \\x1b |"


def test_a_sorted_column_has_room_on_a_narrow_terminal() -> None:
    code = (
        "from lora_cli.columns import Column, on_request\nfrom lora_cli.screen import Screen\n"
        "columns = (Column('ADAPTER', 'id', wide=True), Column('SIZE', 'size', minor=True),\n"
        "    Column('B', 'b', minor=True))\n"
        "rows = [{'id': 'a' * 30, 'size': '123456789012 MB', 'b': 'b' * 20}]\n"
        "Screen().rows('s', columns, rows, sorted_by='size')\n"
    )
    assert "123456789012 MB" in on_terminal(code, 48)


def test_lists_take_columns_and_formats(here: Path) -> None:
    rows = json.loads(ok("pool", "list", "--json").out)["rows"]
    lines = ok("pool", "list", "--columns", "rank,adapter,bytes", "--fmt", "tsv").out.splitlines()
    assert lines == [f"{row['rank']}\t{row['id']}\t{row['bytes']}" for row in rows]
    by_norm = ok("pool", "list", "--sort", "-parameters").out.splitlines()
    assert [int(line.split("\t")[-1]) for line in by_norm] == sorted((row["parameters"] for row in rows), reverse=True)
    assert json.loads(ok("pool", "list", "--columns", "id", "--fmt", "json", "-n", "1").out)["rows"] == [
        {"id": rows[0]["id"]}
    ]
    assert ok("pool", "sql", "select 1 a, 2 b", "--columns", "b", "--csv").out == "b\n2\n"
    assert ok("methods", "ties", "--columns", "formula,method", "--fmt", "tsv").out.splitlines()[1] == "method\tties"


def test_an_unknown_column_is_one_line_before_any_work(here: Path) -> None:
    for command in (["pool", "list"], ["pool", "similarity", "--cut", "7"], ["runs", "list"], ["eval", "no-such"]):
        assert "no column 'statu'" in refused(2, *command, "--columns", "statu")
    assert refused(2, "pool", "list", "--columns", "rnak").splitlines() == [
        "lora: no column 'rnak'; did you mean 'rank'?"
    ]
    assert "-q prints ids alone" in refused(2, "pool", "list", "-q", "--columns", "id")
    assert "--json and --fmt csv exclude each other" in refused(2, "pool", "list", "--json", "--fmt", "csv")


def test_columns_are_completed_behind_a_comma() -> None:
    found = {words: command for words, command, _ in commands()}
    option = next(one for one in found["lora pool list"].params if one.name == "columns")
    offered = option.shell_complete(None, "id,ra")
    assert [item.value for item in offered] == ["id,rank"]


@pytest.mark.parametrize(
    "words",
    [
        "pool list", "pool search pool", "pool stats", "pool selections", "pool verify pool/one", "pool similarity",
        "diff pool/one pool/two", "select -k 2", "runs list", "methods", "config show",
        "pool sync --dry-run --from pool", "pool fetch pool/one --dry-run",
    ],
)  # fmt: skip
def test_every_key_of_a_list_is_a_column(here: Path, words: str) -> None:
    ok("select", "-k", "2", "--name", "two")
    if words == "runs list":
        ok("merge")
    rows = json.loads(ok(*words.split(), "--json").out)["rows"]
    assert rows
    assert json.loads(ok(*words.split(), "--json", "--columns", ",".join(rows[0])).out)["rows"] == rows
