"""What reaches a terminal or a script, and in which form."""

import csv
import io
import json
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.commands.options import screen_for
from lora_cli.errors import UsageError
from lora_cli.screen import Column, Screen, safe

COLUMNS = (Column("ADAPTER", "id"), Column("RANK", "rank", "right"))
ROWS = [{"id": "ann/a", "rank": 8, "card": "x\ny"}, {"id": "bob/\x1b[31mb", "rank": None, "card": ""}]


@given(st.text())
def test_whatever_the_text_only_what_prints_comes_out(text: str) -> None:
    shown = safe(text)
    assert shown.isprintable()
    assert not set(shown) & set("\u202e\u200b\u2066\ufeff\u00ad")
    if text.isascii() and text.isprintable():
        assert shown == text


def test_escapes_are_readable() -> None:
    assert safe("a\x1b]8;;\x07\u202eb\U000e0041") == "a\\x1b]8;;\\x07\\u202eb\\U000e0041"


def test_rows_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("json").rows("lora.x/1", COLUMNS, ROWS, extra={"n": 2})
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": "lora.x/1", "n": 2, "rows": ROWS}
    Screen("jsonl").rows("lora.x/1", COLUMNS, ROWS)
    out = capsys.readouterr().out
    assert [json.loads(line) for line in out.splitlines()] == ROWS
    assert out.isascii()
    Screen("csv").rows("lora.x/1", COLUMNS, ROWS)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[1]["id"] == "bob/\\x1b[31mb"
    Screen("quiet").rows("lora.x/1", COLUMNS, ROWS)
    assert capsys.readouterr().out == "ann/a\nbob/\\x1b[31mb\n"
    Screen().rows("lora.x/1", COLUMNS, ROWS)
    assert capsys.readouterr().out == "ann/a\t8\nbob/\\x1b[31mb\t-\n"


def test_a_document_has_the_schema_of_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("json").document("lora.x/1", {"out": "there", "schema": "lora.run/1"})
    document = json.loads(capsys.readouterr().out)
    assert list(document.items()) == [("schema", "lora.x/1"), ("out", "there")]


def test_nothing_found_is_valid_data_too(capsys: pytest.CaptureFixture[str]) -> None:
    Screen("json").rows("lora.x/1", COLUMNS, [])
    assert json.loads(capsys.readouterr().out)["rows"] == []
    Screen("csv").rows("lora.x/1", COLUMNS, [])
    assert capsys.readouterr().out == "id,rank\n"


def test_two_formats_at_once_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="--json and --csv exclude each other"):
        screen_for(json=True, csv=True)


def test_a_table_on_a_terminal_shows_hostile_text_as_text() -> None:
    code = (
        "from lora_cli.screen import Column, Screen\n"
        "hostile = '[link=http://x]a[/link] [/foo] :smile: \\x1b]0;t\\x07'\n"
        "Screen().rows('s', (Column('ADAPTER', 'id'),), [{'id': hostile}])"
    )
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    os.close(master)
    assert b"[link=http://x]a[/link] [/foo] :smile: \\x1b]0;t\\x07" in shown
    assert b"\x1b]" not in shown
    assert b"\x07" not in shown
