"""What reaches a terminal or a script, and in which form."""

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cli.columns import Column
from lora_cli.commands.options import screen_for
from lora_cli.errors import UsageError
from lora_cli.escapes import safe
from lora_cli.screen import Screen, _broken

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


def test_rows_are_the_same_in_json_jsonl_and_csv(capsys: pytest.CaptureFixture[str]) -> None:
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
    assert capsys.readouterr().out == 'ann/a\n"bob/\\u001b[31mb"\n'
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
    shown = on_terminal(code, 80, styled=True)
    assert "[link=http://x]a[/link] [/foo] :smile: \\x1b]0;t\\x07" in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def on_terminal(code: str, width: int, *, styled: bool = False) -> str:
    """What a piece of Python shows on a terminal so many columns wide, as it comes or without styles."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(width)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, env=environment)
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
    text = shown.decode().replace("\r\n", "\n")
    return text if styled else re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.mark.parametrize("width", [20, 40, 80, 100, 160])
def test_a_table_cuts_nothing_and_says_what_it_leaves_out(width: int) -> None:
    long = "someone-with-a-long-name/llama-3.1-8b-instruct-lora-for-customer-support-v2"
    code = (
        "from lora_cli.screen import Column, Screen\n"
        "columns = (Column('ADAPTER', 'id', wide=True), Column('RANK', 'rank', 'right'),\n"
        "    Column('INTERVAL', 'interval', 'right'), Column('MINOR', 'minor', minor=True),\n"
        "    Column('REASON', 'reason', wide=True))\n"
        f"rows = [{{'id': {long!r}, 'rank': 12345678, 'interval': '[+0.885, +0.960]', 'minor': 'm' * 9,\n"
        "    'reason': 'declares one base and was asked for another, ' * 2}]\n"
        "Screen().rows('s', columns, rows)"
    )
    shown = on_terminal(code, width)
    lines = shown.split("\n")
    assert all(len(line) <= width for line in lines)
    assert "12345678" in shown
    assert "[+0.885, +0.960]" in re.sub(r"\n\s*", " ", shown)
    words = re.sub(r"\s", "", shown)
    if width <= 40:
        # Too narrow for a table: a line per column.
        assert re.search(r"RANK +12345678", shown)
    for part in ("someone-with-a-long-name", "customer-support-v2"):
        # Broken over lines, the parts of other columns stand between, but no letter is lost.
        assert all(piece in shown for piece in part.split("-"))
    assert ("m" * 9 in words) != ("no room for MINOR" in " ".join(shown.split()))
    assert ("m" * 9 in words) == (width in (20, 40, 160))


def test_a_document_on_a_terminal_is_an_outline_and_says_what_it_leaves_out() -> None:
    code = (
        "from lora_cli.screen import Screen\n"
        "Screen().document('s', {'id': 'x', 'ranks': {f'layer {i}': i for i in range(20)}, 'none': {},\n"
        "    'card': '\\n'.join(f'line {i} \\x1b]0;t' for i in range(17)), 'names': ['a', 'b'],\n"
        "    'scores': [{'system': 'base', 'value': 0.5}, {'system': 'other', 'value': 1.0}]})"
    )
    shown = on_terminal(code, 80)
    assert "ranks\n  layer 0   0\n" in shown
    assert "layer 15" not in shown
    assert "  … 5 more: --json\n" in shown
    assert "card\n  line 0 \\x1b]0;t\n" in shown
    assert "  … 2 more: --json\n" in shown
    assert "names   a, b\n" in shown
    assert "none    -\n" in shown
    assert "scores\n  - system  base\n    value   0.5\n  - system  other\n" in shown


def test_a_number_is_not_broken_at_its_point() -> None:
    assert _broken("norm 1.66 in a.b, usual 1.55 to 3.72", 26) == ["norm 1.66 in a.b, usual", "1.55 to 3.72"]
    assert _broken("model.layers.1.self_attn", 10) == ["model.", "layers.1.", "self_attn"]
