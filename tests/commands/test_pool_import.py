"""`lora pool import`: scores and adapters that people already have, the whole file or nothing of it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue import database
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sql import query
from lora_cli.records import Adapter
from tests.cli import ok, refused

IDS = ("ann/sql", "bob/math", "cat/chat")
HOSTILE = "=1+1|\x1b[2J\u202e[red]<script>"


def known(*ids: str) -> None:
    """These adapters, in the catalogue."""
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        catalogue.add([Adapter(id=id, commit=f"{n:040x}", source="hub", repo=id) for n, id in enumerate(ids, start=1)])


@pytest.fixture(autouse=True)
def pool(own_home: Path) -> Path:
    known(*IDS)
    return own_home


def written(text: str, name: str = "scores.csv") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def scores() -> dict[tuple[str, str, str], float]:
    """Every newest score: (adapter, task, metric) → value."""
    rows = query(Path(os.environ["LORA_DB"]), "select id, task, metric, value from adapter_scores")[1]
    return {(id, task, metric): value for id, task, metric, value in rows}


def imported(*words: str) -> Mapping[str, Any]:
    return json.loads(ok("pool", "import", *words, "--json").out)  # type: ignore[no-any-return]


def test_a_wide_table_is_one_score_per_adapter_and_task() -> None:
    file = written("adapter,gsm8k,arc\nann/sql,0.5,\nbob/math,NaN,1e-3\n")
    told = ok("pool", "import", file, "--metric", "exact")
    assert scores() == {("ann/sql", "gsm8k", "exact"): 0.5, ("bob/math", "arc", "exact"): 0.001}
    assert told.out == ""
    lines = told.err.splitlines()
    assert lines[:2] == ["scores.csv: 2 new scores · 2 adapters on 2 tasks", "left out: 2 empty cells"]
    assert lines[2].startswith("lora runs rm ")


def test_a_long_table_is_one_score_per_row_with_its_own_metric_and_count() -> None:
    file = written("n;value;task;id;metric;by\n10;0.5;gsm8k;ann/sql;exact;me\n;-3;arc;bob/math;;me\n")
    found = imported(file)
    assert (found["schema"], found["scores_new"], found["left"]) == ("lora.pool.import/1", 2, ["by"])
    assert scores() == {("ann/sql", "gsm8k", "exact"): 0.5, ("bob/math", "arc", "score"): -3}
    assert query(Path(os.environ["LORA_DB"]), "select n from scores order by n")[1] == [(0,), (10,)]


def test_json_lines_hold_either_shape() -> None:
    file = written(
        '{"adapter": "ann/sql", "task": "arc", "value": 0.25, "metric": "exact", "n": 4}\n\n'
        '{"adapter": "bob/math", "arc": 1, "gsm8k": null}\n',
        "scores.jsonl",
    )
    assert imported(file)["empty"] == 1
    assert scores() == {("ann/sql", "arc", "exact"): 0.25, ("bob/math", "arc", "score"): 1}


def test_a_column_whose_name_comes_again_is_numbered_as_in_pandas_and_named() -> None:
    told = ok("pool", "import", written("id,x,x,x.1,x\nann/sql,1,2,3,4\n"))
    assert scores() == {("ann/sql", task, "score"): n for n, task in enumerate(("x", "x.2", "x.1", "x.3"), start=1)}
    assert "column 3: 'x' comes again and is the task 'x.2'" in told.err
    assert "column 5: 'x' comes again and is the task 'x.3'" in told.err


def test_the_ids_stand_in_the_first_column_or_in_the_one_that_is_named() -> None:
    ok("pool", "import", written(",arc\nann/sql,1\n"))
    told = ok("pool", "import", written("mmlu,model\n2,bob/math\n"), "--id-column", "MODEL")
    pandas = ok("pool", "import", written(",arc,adapter\n0,3,cat/chat\n"))
    assert "1 new score" in told.err
    assert "unused: the numbers of the rows" in pandas.err
    assert scores() == {
        ("ann/sql", "arc", "score"): 1,
        ("bob/math", "mmlu", "score"): 2,
        ("cat/chat", "arc", "score"): 3,
    }
    message = refused(2, "pool", "import", "scores.csv", "--id-column", "adaptr")
    assert "no such column in scores.csv" in message
    assert "'adapter'" in message


def test_the_same_file_again_changes_nothing_and_a_new_value_replaces_the_old() -> None:
    file = written("adapter,gsm8k,arc\nann/sql,0.5,0.25\n")
    ok("pool", "import", file)
    again = ok("pool", "import", file)
    assert again.err == "scores.csv: 2 scores already here · 1 adapter on 2 tasks\n"
    assert len(ok("runs", "list", "-q").out.splitlines()) == 1
    found = imported(written("adapter,gsm8k,arc\nann/sql,0.5,0.75\n"))
    assert (found["scores_changed"], found["scores_same"], found["scores_new"]) == (1, 1, 0)
    assert scores()["ann/sql", "arc", "score"] == 0.75
    assert query(Path(os.environ["LORA_DB"]), "select count(*) from scores")[1] == [(2,)]


def test_unknown_adapters_and_other_versions_are_left_out_counted_and_named() -> None:
    rows = [f"none/{letter},1,2" for letter in "edcba"]
    file = written("\n".join(["adapter,x,y", f"ann/sql@{1:040x},1,2", f"bob/math@{9:040x},1,2", *rows]))
    told = ok("pool", "import", file)
    assert "10 scores of 5 adapters not in the catalogue (none/a, none/b, none/c, …)" in told.err
    assert f"2 scores of 1 adapter at another commit there (bob/math@{9:040x})" in told.err
    assert query(Path(os.environ["LORA_DB"]), 'select distinct "commit" from scores')[1] == [(f"{1:040x}",)]
    message = refused(3, "pool", "import", written("adapter,x\nnone/a,1\n"))
    assert "1 adapter, none in the catalogue (none/a)" in message
    assert "lora pool sync" in message


def test_a_dry_run_counts_and_changes_nothing() -> None:
    told = ok("pool", "import", written("adapter,x\nann/sql,1\n"), "--dry-run")
    assert "scores_new\t1" in told.out
    assert scores() == {}
    assert ok("runs", "list", "-q").out == ""


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("", "scores.csv", "the file is empty"),
        ("\n \n", "scores.csv", "the file is empty"),
        ("adapter,x\n", "scores.csv", "no score in it"),
        ("just words\nand more\n", "scores.csv", "ids and no scores"),
        ("gsm8k,arc\n0.5,0.25\n", "line 2, column 1 'gsm8k'", "'0.5' is no id of an adapter; name the column"),
        ("adapter,x\nann/sql,1\n,2\n", "line 3, column 1 'adapter'", "an empty cell is no id"),
        ("adapter,x,\nann/sql,1,2\n", "line 1, column 3 ''", "an empty cell is not the name of a task"),
        ("adapter,x\nann/sql,abc\n", "line 2, column 2 'x'", "'abc' is not a number"),
        ("adapter,x\nann/sql,1_0\n", "line 2, column 2 'x'", "'1_0' is not a number"),
        ("adapter,x\nann/sql,1e999\n", "line 2, column 2 'x'", "'1e999' is not a finite number"),
        ("adapter,x\nann/sql,1,2\n", "line 2", "3 cells, but the table has 2 columns"),
        ('adapter,x\nann/sql,"1\n', "line 2", "malformed CSV: unexpected end of data (is a quote not closed?)"),
        ("adapter,x\nann/sql,1\nann/sql,2\n", "line 3", "task 'x' (score) of ann/sql is already given in line 2"),
        (f"adapter,x\nann/sql,1\nann/sql@{1:040x},2\n", "line 3", "of ann/sql is already given in line 2"),
        ("adapter,task,value,metric\nann/sql,x,50,exact\n", "line 2, column 3 'value'", "50 is out of range: exact is"),
        ("adapter,task,value,metric\nann/sql,x,-1,nll\n", "line 2, column 3 'value'", "-1 is out of range: nll is 0"),
        ("adapter,task,value,n\nann/sql,x,1,2.5\n", "line 2, column 4 'n'", "'2.5' is no number of examples"),
        ("adapter,task,value\nann/sql,,1\n", "line 2, column 2 'task'", "an empty cell is not the name of a task"),
        ("adapter,task,value,commit\nann/sql,x,1,main\n", "line 2, column 4 'commit'", "'main' is no commit"),
        ("id,commit,source,repo\na/b,c,hub,a/b\n", "scores.csv", "the facts of adapters in CSV"),
        ('{"adapter": "ann/sql", "x": true}', "line 1, key 'x'", "'True' is not a number"),
        ('{"adapter": "ann/sql", "x": Infinity}', "line 1, key 'x'", "is not a finite number"),
        ('{"adapter": "ann/sql", "x": 1' + "0" * 5000 + "}", "line 1", "a number too long"),
        ('{"adapter": "ann/sql", "x": 1, "x": 2}', "line 1", "key 'x', the 3. of the object, is given twice"),
        ('{"adapter": 7, "x": 1}', "line 1, key 'adapter'", "'7' is no id of an adapter"),
        ('{"adapter": "ann/sql"', "line 1", "malformed JSON"),
        ('[{"adapter": "ann/sql", "x": 1}]', "line 1", "one object per line"),
        ('{"id": "a/b", "commit": "x", "source": "hub", "repo": "a/b"}', "line 1", "commit 'x' has not 40 hex digits"),
        ("adapter,x\nann/sql,1\0\n", "line 2", "binary data, not text"),
    ],
)
def test_bad_input_is_named_by_its_place_and_nothing_is_imported(text: str, place: str, reason: str) -> None:
    good = "adapter,z\nbob/math,1\n"
    message = refused(1, "pool", "import", written(text))
    assert message.startswith(f"lora: scores.csv{', ' * place.startswith('line')}{place.removeprefix('scores.csv')}")
    assert reason in " ".join(message.replace("\n", ";").split())
    assert scores() == {}
    ok("pool", "import", written(good))


def test_files_that_are_no_text_or_not_there() -> None:
    Path("latin.csv").write_bytes(b"adapter,x\nann/sql,1\n\xff,2\n")
    assert "latin.csv, line 3: not UTF-8 text" in refused(1, "pool", "import", "latin.csv")
    assert "no such file: none.csv" in refused(1, "pool", "import", "none.csv")
    Path("folder").mkdir()
    assert "cannot read folder" in refused(1, "pool", "import", "folder")
    Path("wrong.parquet").write_bytes(b"PAR1 and more")
    assert "wrong.parquet: malformed Parquet" in refused(1, "pool", "import", "wrong.parquet")


def test_an_endless_line_is_refused_before_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.formats.tables.LONGEST_LINE", 100)
    file = written("adapter,x\nann/sql," + "1" * 200)
    assert "line 2: a line of more than 100 bytes" in refused(1, "pool", "import", file)


def test_an_import_that_ends_in_the_middle_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.catalogue.imports._AT_ONCE", 1)
    file = written("adapter,x,y\nann/sql,1,2\nbob/math,3,4\n")
    stored = []
    store = database._Connection.executemany

    def dies(self: Any, *statement: Any) -> Any:
        if "INSERT OR REPLACE INTO scores" in statement[0]:
            stored.append(statement)
            if len(stored) == 3:
                raise KeyboardInterrupt
        return store(self, *statement)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(database._Connection, "executemany", dies)
        from lora_cli.steps.pool.importing import import_table

        import_table(Path(os.environ["LORA_DB"]), Path(file))
    assert scores() == {}
    assert ok("runs", "list", "-q").out == ""
    ok("pool", "import", file)
    assert len(scores()) == 4


def test_an_import_works_where_readers_keep_writers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_on_network", lambda _: True)
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    monkeypatch.setenv("LORA_DB", "shared.db")
    known(*IDS)
    ok("pool", "import", written("adapter,x\nann/sql,1\n"))
    assert len(scores()) == 1


def test_a_run_takes_its_scores_with_it_and_so_does_an_adapter() -> None:
    ok("pool", "import", written("adapter,x\nann/sql,1\nbob/math,2\n"))
    assert "forgot 1 adapter" in ok("pool", "rm", "ann/sql").err
    assert scores() == {("bob/math", "x", "score"): 2}
    [run] = ok("runs", "list", "-q").out.splitlines()
    record = json.loads(ok("runs", "show", run, "--json").out)
    assert (record["record"]["results"], record["scores"]) == ({"scores_new": 2, "scored": 2, "tasks": 1}, [])
    ok("runs", "rm", run)
    assert scores() == {}
    assert query(Path(os.environ["LORA_DB"]), "select count(*) from scores")[1] == [(0,)]


def test_scores_are_shown_and_a_forgotten_table_is_named() -> None:
    ok("pool", "import", written("adapter,x,y\nann/sql,1,0.5\n"))
    assert json.loads(ok("pool", "show", "ann/sql", "--json").out)["scores"] == {"score": {"x": 1.0, "y": 0.5}}
    assert json.loads(ok("pool", "show", "bob/math", "--json").out)["scores"] == {}
    assert "adapter_scores" in refused(2, "pool", "sql", "select * from score")


def test_strangers_texts_in_a_file_reach_a_terminal_escaped() -> None:
    quoted = '"' + HOSTILE.replace('"', '""') + '"'
    told = ok("pool", "import", written(f"adapter,{quoted},{quoted}\nann/sql,1,2\n{quoted},3,4\n"))
    shown = ok("pool", "show", "ann/sql")
    bad = refused(1, "pool", "import", written(f"adapter,{quoted}\nann/sql,{quoted}\n"))
    for text in (told.err, shown.out, bad):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert ("ann/sql", HOSTILE, "score") in scores()


def test_a_token_in_a_file_is_in_no_output(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "cAnArY7" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    told = ok("pool", "import", written(f"adapter,{token},{token}\nann/sql,1,2\nx/{token},1,2\n"))
    bad = refused(1, "pool", "import", written(f"adapter,{token}\nann/sql,{token}\n"))
    ok("pool", "export", "--what", "scores", "-o", "out.csv")
    ok("pool", "export", "--what", "scores", "-o", "out.parquet")
    ok("pool", "export", "-o", "out.jsonl")
    files = b"".join(Path(f"out.{ending}").read_bytes() for ending in ("csv", "parquet", "jsonl"))
    assert token not in told.out + told.err + bad + files.decode("latin-1")
