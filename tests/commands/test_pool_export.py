"""`lora pool export`: the catalogue as a file, which comes back as it was."""

import csv
import io
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sql import query
from lora_cli.records import Adapter
from tests.cli import ok, refused

ANN = Adapter(
    id="ann/sql", commit="a" * 40, source="hub", repo="ann/sql", author="ann", base="acme/tiny", base_match="exact",
    peft_type="LORA", rank=8, alpha=16.0, scale=2.0, rslora=True, target_modules=("q_proj", "v_proj"), modules=2,
    bytes=2**40, norm=1.5, licence="=HYPERLINK(1)", status="quarantined", reason="z 12", stamp="s:1",
    ranks={"a.q_proj": 8, "a.v_proj": 4}, card="Ünïcode\n\x1b[2J, \u202e and \"quotes\"",
)  # fmt: skip
BOB = Adapter(id="bob/many:one", commit="b" * 40, source="hub", repo="bob/many", subfolder="one")
FOLDER = Adapter(id="=tree/x", commit="c" * 40, source="folder", repo="/none/tree/x")


@pytest.fixture(autouse=True)
def pool(own_home: Path) -> Path:
    """Three adapters, the second without scores."""
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        catalogue.add([ANN, BOB, FOLDER])
    Path("scores.csv").write_text(f"adapter,x,y\n{ANN.id}@{ANN.commit},0.1,2\n'=tree/x,3,\n", encoding="utf-8")
    ok("pool", "import", "scores.csv", "--metric", "likes")
    return own_home


def whole(*ids: str) -> list[Adapter]:
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        return [catalogue.get(id) for id in ids]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_export_comes_back_into_an_empty_catalogue_as_it_was(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for what in ("adapters", "scores"):
        ok("pool", "export", "--what", what, "-o", f"{what}.{ending}")
    monkeypatch.setenv("LORA_DB", "other.db")
    assert "3 new adapters" in ok("pool", "import", f"adapters.{ending}").err
    assert "3 new scores · 2 adapters on 2 tasks" in ok("pool", "import", f"scores.{ending}").err
    assert whole(ANN.id, BOB.id, FOLDER.id) == [ANN, BOB, FOLDER]
    assert query(Path("other.db"), "select rank_total from adapters order by id desc")[1] == [(0,), (12,), (0,)]
    for what in ("adapters", "scores"):
        ok("pool", "export", "--what", what, "-o", f"again-{what}.{ending}")
        assert Path(f"again-{what}.{ending}").read_bytes() == Path(f"{what}.{ending}").read_bytes()


def test_one_file_of_json_lines_holds_all_and_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ok("pool", "export", "-o", "pool.jsonl")
    assert (told.out, told.err) == ("pool.jsonl\n", "3 adapters · 3 scores\n")
    text = Path("pool.jsonl").read_text(encoding="ascii")
    assert ok("pool", "export").out == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row.get("id", row.get("adapter")) for row in rows] == [ANN.id, BOB.id, FOLDER.id, ANN.id, ANN.id, FOLDER.id]
    assert rows[3] == {"adapter": ANN.id, "commit": "a" * 40, "task": "x", "metric": "likes", "value": 0.1, "n": 0}
    here = "pool.jsonl: 3 adapters already here · 3 scores already here · 2 adapters on 2 tasks\n"
    assert ok("pool", "import", "pool.jsonl").err == here
    monkeypatch.setenv("LORA_DB", "other.db")
    assert "3 new adapters · 3 new scores" in ok("pool", "import", "pool.jsonl").err
    assert ok("pool", "import", "pool.jsonl").err == here
    assert ok("pool", "export").out == text


def test_what_a_sync_refused_comes_back_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = Adapter(
        id="../x", commit="e" * 40, source="hub", repo="../x", status="unusable", downloads=-5, norm=float("inf")
    )
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        catalogue.add([odd])
    ok("pool", "export", "--what", "adapters", "-o", "pool.parquet")
    ok("pool", "export", "-o", "pool.jsonl")
    monkeypatch.setenv("LORA_DB", "other.db")
    assert "4 new adapters" in ok("pool", "import", "pool.parquet").err
    assert whole(odd.id) == [odd]
    assert "4 adapters already here · 3 new scores" in ok("pool", "import", "pool.jsonl").err


def test_what_the_catalogue_knows_itself_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ok("pool", "export", "-o", "pool.jsonl")
    newer = replace(ANN, commit="d" * 40, status="ok", reason="")
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        catalogue.add([newer, replace(BOB, licence="mit")])
    told = ok("pool", "import", "pool.jsonl")
    assert "1 adapter that the catalogue has at another commit" in told.err
    assert "2 scores of 1 adapter at another commit there" in told.err
    assert whole(ANN.id, BOB.id) == [newer, replace(BOB, licence="mit")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": "8"}, "Expected `int | null`, got `str` - at `$.rank`"),
        ({"status": "fine"}, "Invalid enum value 'fine'"),
        ({"commit": "abc"}, "commit 'abc' has not 40 hex digits"),
        ({"repo": "eve/other"}, "id 'ann/sql' is not that of repo 'eve/other'"),
        ({"repo": "../../etc", "id": "../../etc"}, "id '../../etc' cannot be on the Hub"),
        ({"source": "folder", "repo": "etc"}, "no absolute path"),
        ({"bytes": 2**63}, "bytes out of range"),
        ({"ranks": {"a": -1}}, "ranks out of range"),
        ({"id": " "}, "' ' is no id"),
    ],
)
def test_facts_that_cannot_be_are_named_by_their_line(change: dict[str, object], reason: str) -> None:
    lines = ok("pool", "export", "--what", "adapters").out.splitlines()
    Path("bad.jsonl").write_text(f"{lines[1]}\n{json.dumps(json.loads(lines[0]) | change)}\n", encoding="utf-8")
    message = refused(1, "pool", "import", "bad.jsonl", "--db", "other.db")
    assert "bad.jsonl, line 2: no facts of an adapter: " in message
    assert reason in message
    assert not Path("other.db").exists()


def test_an_adapter_that_a_file_has_twice_is_named_with_both_lines() -> None:
    line = ok("pool", "export", "--what", "adapters").out.splitlines()[0]
    Path("twice.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    message = refused(1, "pool", "import", "twice.jsonl", "--db", "other.db")
    assert "twice.jsonl, line 2: adapter ann/sql is already given in line 1" in message


def test_csv_is_for_spreadsheets_and_its_scores_come_back() -> None:
    rows = list(csv.DictReader(io.StringIO(ok("pool", "export", "--what", "adapters", "--fmt", "csv").out)))
    assert [*rows[0]] == [field.name for field in fields(Adapter) if field.name not in ("ranks", "card")]
    assert [row["id"] for row in rows] == [ANN.id, BOB.id, "'=tree/x"]
    assert (rows[0]["licence"], rows[0]["target_modules"]) == ("'=HYPERLINK(1)", '["q_proj", "v_proj"]')
    ok("pool", "export", "--what", "scores", "-o", "out.csv")
    assert "3 scores already here" in ok("pool", "import", "out.csv").err
    assert "line 2, column 6 'n'" in refused(1, "pool", "import", spoilt("out.csv"))


def spoilt(name: str) -> str:
    """A copy of a file with a word in its last column."""
    Path("spoilt.csv").write_text(Path(name).read_text().replace(",0\n", ",many\n"))
    return "spoilt.csv"


def test_conditions_choose_adapters_and_their_scores() -> None:
    rows = [json.loads(line) for line in ok("pool", "export", "--where", "source=folder").out.splitlines()]
    assert [row.get("id", row.get("adapter")) for row in rows] == ["=tree/x", "=tree/x"]
    assert "no score is known" in refused(3, "pool", "export", "--what", "scores", "--db", "empty.db")
    assert "no adapter fits" in refused(3, "pool", "export", "--where", "rank=7", "-o", "none.jsonl")
    assert not Path("none.jsonl").exists()


def test_what_a_format_cannot_hold_is_a_mistake_in_the_command() -> None:
    assert "csv holds one table" in refused(2, "pool", "export", "-o", "pool.csv")
    assert "no known ending" in refused(2, "pool", "export", "-o", "pool.xls")
    assert "-o FILE.parquet" in refused(2, "pool", "export", "--fmt", "parquet", "--what", "scores")


def test_without_pyarrow_one_line_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ok("pool", "export", "--what", "scores", "-o", "scores.parquet")
    for name in ("pyarrow", "pyarrow.lib", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    for words in (("import", "scores.parquet"), ("export", "--what", "scores", "-o", "new.parquet")):
        message = refused(2, "pool", *words)
        assert message == "lora: Parquet needs pyarrow\n  pip install 'lora-cli[parquet]', or use JSONL or CSV\n"
    assert not Path("new.parquet").exists()


def test_a_row_of_parquet_is_named_by_its_number() -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"x": [1.0, float("nan"), None], "id": [ANN.id, BOB.id, FOLDER.id]}), "ok.parquet"
    )
    assert "1 new score" in ok("pool", "import", "ok.parquet").err
    parquet.write_table(pyarrow.table({"id": [ANN.id, BOB.id], "x": ["1", "one"]}), "bad.parquet")
    assert "bad.parquet, row 2, column 2 'x': 'one' is not a number" in refused(1, "pool", "import", "bad.parquet")
    good = Path("ok.parquet").read_bytes()
    Path("ok.parquet").write_bytes(good.replace(ANN.id.encode(), b"\xff" * len(ANN.id)))
    assert "ok.parquet, row 1: malformed Parquet" in refused(1, "pool", "import", "ok.parquet")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_an_export_replaces_an_export_and_no_other_file(ending: str) -> None:
    own = '{"id": "1", "prompt": "a", "completion": "b"}\n'
    Path(f"mine.{ending}").write_text(own)
    for what in ("adapters", "scores"):
        words = ("pool", "export", "--what", what, "-o")
        assert f"mine.{ending} exists and is no export of a pool" in refused(1, *words, f"mine.{ending}")
        ok(*words, f"pool.{ending}")
        first = Path(f"pool.{ending}").read_bytes()
        ok(*words, f"pool.{ending}")
        assert Path(f"pool.{ending}").read_bytes() == first
    assert Path(f"mine.{ending}").read_text() == own
