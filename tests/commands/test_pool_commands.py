"""`lora pool …` as a user types it: what comes out on stdout, on stderr, and as the exit code."""

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.records import Adapter
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def fake(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("LORA_BASE", BASE)
    return fake


@pytest.fixture
def pool(own_home: Path) -> Path:
    """A folder tree of four adapters in the working folder, one of them with NaN."""
    for name, facts in {
        "alice/sql": {"rank": 4},
        "alice/math": {"rank": 8},
        "bob/chat": {"rank": 16, "alpha": 16},
        "bob/nan": {"value": float("nan")},
    }.items():
        folder = own_home / "pool" / name
        folder.mkdir(parents=True)
        for file, data in lora_files(**facts).items():  # type: ignore[arg-type]
            (folder / file).write_bytes(data)
    return own_home / "pool"


def test_sync_from_the_hub_tells_what_it_did_in_one_line(fake: FakeHub) -> None:
    fake.add_many(12)
    fake.add("x/dora", lora_files(use_dora=True))
    told = lora("pool", "sync", "--no-copies")
    assert (told.code, told.out) == (0, "")
    assumed, outcome = told.err.splitlines()
    assert assumed == f"base {BASE} (LORA_BASE) · from the Hub"
    assert outcome.startswith("13 seen · 13 new · 0 changed · 0 unchanged · 1 not usable · 51 requests · ")
    again = lora("pool", "sync", "--no-copies").err.splitlines()[-1]
    assert again.startswith("13 seen · 0 new · 0 changed · 13 unchanged · 1 not usable · 1 request · ")


def test_sync_without_a_base_says_how_to_set_it() -> None:
    message = refused(2, "pool", "sync")
    assert "no base model" in message
    assert "lora.toml" in message
    assert "LORA_BASE" in message


def test_the_setting_pool_makes_sync_read_that_folder(pool: Path) -> None:
    Path("lora.toml").write_text(f'pool = "pool"\nbase = "{BASE}"\n')
    told = lora("pool", "sync")
    assert told.code == 0
    assert told.err.splitlines()[0] == f"base {BASE} (lora.toml) · from {pool} (lora.toml)"
    assert told.err.splitlines()[1].startswith("4 seen · 4 new · 0 changed · 0 unchanged · 1 not usable · ")
    assert "4 unchanged" in lora("pool", "sync").err


def test_a_dry_run_of_sync_prints_the_plan_and_changes_nothing(pool: Path) -> None:
    plan = json.loads(ok("pool", "sync", "--from", "pool", "--dry-run", "--json").out)
    assert plan["schema"] == "lora.pool.sync/1"
    assert {row["id"]: row["action"] for row in plan["rows"]}["pool/alice/sql"] == "new"
    assert plan["new"] == 4
    assert lora("pool", "list").code == 3
    assert ok("pool", "sync", "--from", "pool", "-q").out.split() == [
        "pool/alice/math", "pool/alice/sql", "pool/bob/chat", "pool/bob/nan",
    ]  # fmt: skip


def test_what_failed_in_passing_makes_a_partial_sync(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add_many(3)
    fake.fail("author1", status=404, times=1, headers={"X-Error-Code": "RepoNotFound"})
    assert lora("pool", "sync").code == 0
    for repo in fake.repos.values():
        repo.commit(notes=b"again")
    message = refused(6, "pool", "sync", "--budget-requests", "3")
    assert "left (rerun to go on)" in message
    assert "rerun" in message
    assert lora("pool", "sync").code == 0


@pytest.mark.slow
def test_a_network_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BASE", BASE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(7, "pool", "sync")


def test_listing_has_a_line_per_adapter_with_the_reason(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    lines = [line.split("\t") for line in ok("pool", "list").out.splitlines()]
    assert [line[0] for line in lines] == ["pool/alice/math", "pool/alice/sql", "pool/bob/chat", "pool/bob/nan"]
    _, rev, rank, scale, modules, size, licence, base, status = lines[2]
    assert (rank, scale, modules, licence, base, status) == ("16", "1", "q,v", "-", BASE.rpartition("/")[2], "ok")
    assert len(rev) == 7
    assert int(size) > 1000
    assert lines[3][-1].startswith("unusable: NaN or Inf in model.layers.0")


def test_a_list_is_the_same_in_every_format(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    document = json.loads(
        ok("pool", "list", "--where", "rank<=8", "--where", "status=ok", "--sort", "-rank", "--json").out
    )
    assert document["schema"] == "lora.pool.list/1"
    assert [row["rank"] for row in document["rows"]] == [8, 4]
    assert [json.loads(line)["id"] for line in ok("pool", "list", "-n", "1", "--jsonl").out.splitlines()] == [
        "pool/alice/math"
    ]
    [row] = csv.DictReader(io.StringIO(ok("pool", "list", "--where", "rank=16", "--csv").out))
    assert (row["id"], row["alpha"]) == ("pool/bob/chat", "16.0")
    assert ok("pool", "list", "--sort", "rank", "-q").out.split()[0] == "pool/alice/sql"
    assert "exclude each other" in refused(2, "pool", "list", "--json", "--csv")


def test_conditions_that_are_wrong_or_match_nothing(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    assert "did you mean 'rank'" in refused(2, "pool", "list", "--where", "rnk<4")
    assert "no adapter fits" in refused(3, "pool", "list", "--where", "rank>999")
    assert "no column" in refused(2, "pool", "list", "--sort", "beauty")


def test_show_gives_all_that_is_known(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    facts = json.loads(ok("pool", "show", "pool/alice/sql", "--json").out)
    assert facts["rank"] == 4
    assert facts["ranks"]["model.layers.1.self_attn.v_proj"] == 4
    assert facts["weights"] == str(pool / "alice/sql" / WEIGHTS)
    assert facts["stored_at"]
    by_path = ok("pool", "show", "./pool/bob/nan").out
    assert "status\tunusable" in by_path
    assert "reason\tNaN or Inf" in by_path
    assert json.loads(ok("pool", "show", f"pool/alice/sql@{facts['commit'][:8]}", "--json").out) == facts
    assert "commit 12345678 is not available here" in refused(3, "pool", "show", "pool/alice/sql@12345678")
    assert "did you mean pool/alice/sql" in refused(3, "pool", "show", "pool/alice/sqk")


def test_search_stats_sql_and_path(pool: Path, tmp_path: Path) -> None:
    (pool / "bob/chat/README.md").write_text("Speaks like a pirate.")
    ok("pool", "sync", "--from", "pool")
    assert ok("pool", "search", "pirat", "-q").out.split() == ["pool/bob/chat"]
    assert ok("pool", "search", "pirat", "speaks", "-q").out.split() == ["pool/bob/chat"]
    assert "no adapter matches 'pirat zebra'" in refused(3, "pool", "search", "pirat", "zebra")
    stats = json.loads(ok("pool", "stats", "--json").out)
    assert (stats["adapters"], stats["usable"]) == (4, 3)
    assert {"column": "status", "value": "unusable", "adapters": 1} in stats["rows"]
    assert (
        ok("pool", "sql", "select author, count(*) n from adapters group by 1 order by 1").out == "alice\t2\nbob\t2\n"
    )
    assert json.loads(ok("pool", "sql", "select x'00ff' as b, 1, 1", "--json").out)["rows"] == [
        {"b": "00ff", "1": 1, "1_3": 1}
    ]
    assert "only reading" in refused(2, "pool", "sql", "delete from adapters")
    assert "no such column" in refused(2, "pool", "sql", "select colour from adapters")
    assert ok("pool", "path").out.strip() == os.environ["LORA_DB"]


def test_fetch_brings_the_weights_and_learns_from_them(fake: FakeHub, tmp_path: Path) -> None:
    fake.add("alice/sql")
    fake.add("bob/nan", lora_files(value=float("nan")))
    ok("pool", "sync")
    plan = json.loads(ok("pool", "fetch", "alice/sql", "--dry-run", "--json").out)
    assert [(row["id"], row["action"]) for row in plan["rows"]] == [("alice/sql", "fetch")]
    told = lora("pool", "fetch", "alice/sql", "--json")
    [row] = json.loads(told.out)["rows"]
    assert (row["action"], len(row["sha256"])) == ("fetched", 64)
    assert "fetching 1 adapter" in told.err
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        assert catalogue.get("alice/sql").norm == pytest.approx((4 * 64) ** 0.5 * 4 * 0.25 * 2)
    fake.forget()
    assert "1 up to date" in lora("pool", "fetch", "-", stdin='{"id": "alice/sql"}\n').err
    assert not fake.asked
    assert "NaN or Inf" in refused(5, "pool", "fetch", "bob/nan")
    assert "unusable" in ok("pool", "list", "--where", "id=bob/nan").out


def test_fetch_of_what_is_gated_unknown_or_broken(fake: FakeHub) -> None:
    fake.add("alice/locked", gated="manual")
    fake.add("alice/sql")
    ok("pool", "sync")
    assert "gated" in refused(4, "pool", "fetch", "alice/locked")
    assert "did you mean alice/sql" in refused(3, "pool", "fetch", "alice/sqll")
    assert "nothing was selected" in refused(2, "pool", "fetch")
    fake.fail("cdn:", "corrupt", times=9)
    assert "do not match the Hub's hash" in refused(6, "pool", "fetch", "alice/sql")


def test_verify_says_how_much_of_an_adapter_the_base_has(fake: FakeHub, pool: Path) -> None:
    fake.add("alice/sql")
    ok("pool", "sync")
    [row] = json.loads(ok("pool", "verify", "alice/sql", "--json").out)["rows"]
    assert (row["status"], row["base_match"], row["coverage"]) == ("ok", "exact", None)
    assert not [path for path in fake.paths("", "cdn") if not path]
    told = lora("pool", "verify", "./pool/alice/sql", "./pool/bob/nan", "--deep", "--json")
    assert told.code == 5
    rows = json.loads(told.out)["rows"]
    assert [row["status"] for row in rows] == ["ok", "unusable"]
    assert "1 of 2 refused: ./pool/bob/nan: NaN or Inf" in told.err
    told = lora("pool", "verify", "./pool/alice/sql", "--base", "acme/another", "--json")
    assert told.code == 5
    assert "wrong base" in told.err
    assert "no such folder" in refused(3, "pool", "verify", "./pool/nobody")


def test_verify_notices_weights_that_were_swapped(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    ok("pool", "verify", "pool/alice/sql", "--deep")
    (pool / "alice/sql" / WEIGHTS).write_bytes(lora_files(rank=4, value=0.25)[WEIGHTS])
    told = lora("pool", "verify", "pool/alice/sql", "--deep")
    assert told.code == 5
    assert "differ from those in the catalogue (sha256)" in told.err


def test_verify_reads_the_weights_of_what_is_known_to_be_bad(pool: Path) -> None:
    ok("pool", "sync", "--from", "pool")
    for name in ("pool/bob/nan", "./pool/bob/nan"):
        told = lora("pool", "verify", "pool/alice/sql", name, "--json")
        assert told.code == 5
        assert [row["status"] for row in json.loads(told.out)["rows"]] == ["ok", "unusable"]
        assert "pool/bob/nan: NaN or Inf in model.layers.0" in told.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    ["~nosuchuser/x", "x" * 300, "./" + "x" * 300, "a/b:" + "/".join(["x" * 90] * 60)],
    ids=["user", "name", "path", "id"],
)
def test_a_text_that_can_be_no_path_is_a_mistake_like_any_other(pool: Path, text: str) -> None:
    ok("pool", "sync", "--from", "pool")
    for words in (
        ["pool", "show", text], ["pool", "verify", text], ["pool", "fetch", text], ["pool", "sync", "--from", text],
        ["pool", "sync", text], ["select", "--by", "cosine", "--target", text],
    ):  # fmt: skip
        told = lora(*words)
        assert told.code in (2, 3, 7), (words, told)
        assert told.err
    assert "file name too long" in refused(1, "pool", "list", "--db", "x" * 300).lower()


def test_a_file_that_may_not_be_read_is_named(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("pool", "sync", "--from", "pool", "-q")
    (pool / "alice/locked").mkdir()
    for file, data in lora_files().items():
        (pool / "alice/locked" / file).write_bytes(data)
    Path("no.db").touch()
    opened = os.open

    def locked(path: str | Path, *how: Any) -> int:
        file = Path(path)
        if ("locked" in file.parts and file.name == WEIGHTS) or file.name == "no.db":  # root may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(path, *how)

    monkeypatch.setattr(os, "open", locked)
    assert "cannot be read (Permission denied)" in refused(6, "pool", "sync", "--from", "pool")
    assert "failed: " in ok("pool", "list", "--where", "id~locked").out
    for words in (
        ["verify", "./pool/alice/locked"],
        ["list", "--db", "no.db"],
        ["sync", "--from", ".", "--db", "no.db"],
    ):
        assert "cannot be read (Permission denied)" in refused(1, "pool", *words)
    assert "Permission denied" in refused(1, "merge", "./pool/alice/locked", "-o", "out")


def test_a_file_that_is_no_catalogue(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes, not a database")
    assert "not a database" in refused(1, "pool", "list", "--db", str(tmp_path / "notes"))


HOSTILE = "evil/\x1b]8;;http://x\x07[red]click[/red]\u202e\u200b\x1b[2J"


def test_nothing_a_stranger_wrote_reaches_the_terminal_raw(tmp_path: Path) -> None:
    with Catalogue(Path(os.environ["LORA_DB"])) as catalogue:
        row = Adapter(
            id=HOSTILE, commit="a" * 40, source="hub", repo=HOSTILE, author=HOSTILE, base=HOSTILE, licence=HOSTILE,
            card=HOSTILE, reason=HOSTILE, status="unusable", target_modules=(HOSTILE,), ranks={HOSTILE: 1}, rank=1,
        )  # fmt: skip
        catalogue.add([row])
    for words in (
        ["list"], ["list", "--json"], ["list", "--csv"], ["list", "-q"], ["list", "--jsonl"], ["search", "click"],
        ["show", HOSTILE], ["show", HOSTILE, "--json"], ["stats"], ["stats", "--json"], ["stats", "--csv"],
        ["sql", "select * from adapters"], ["sql", "select * from adapters", "--json"], ["fetch", HOSTILE],
        ["fetch", HOSTILE, "--dry-run"], ["show", HOSTILE + "x"], ["sql", f"select '{HOSTILE}' as \"{HOSTILE}\""],
        ["list", "--where", HOSTILE], ["list", "--where", f"id={HOSTILE}"],
    ):  # fmt: skip
        told = lora("pool", *words)
        shown = told.out + told.err
        assert not [char for char in shown if char not in "\n\t" and not char.isprintable()], words


def test_every_command_of_the_pool_has_help_with_examples() -> None:
    for name in ("sync", "list", "search", "show", "stats", "sql", "path", "fetch", "verify"):
        text = ok("pool", name, "--help").out
        assert text.partition("Examples:")[2].count("lora pool") >= 2 or name == "path", name
