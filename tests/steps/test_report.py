"""The report of a pool: its numbers are the catalogue's, and its page shows them with hostile adapters as text."""

import json
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NothingMatched
from lora_cli.escapes import safe
from lora_cli.records import Adapter
from lora_cli.reports.pool import pool_page
from lora_cli.steps.pool.report import kind_of_reason, pool_report
from tests.cli import ok, refused
from tests.reports.reading import Read
from tests.reports.test_page import HOSTILE

SYNCED = "2026-11-27T10:00:00+00:00"


def row(number: int, **facts: object) -> Adapter:
    known = {"id": f"ann/lora{number}", "author": "ann", "base": "acme/tiny", "rank": 4, "dtype": "F16"} | facts
    return Adapter(commit=f"{number:040x}", source="hub", repo=str(known["id"]), **known)  # type: ignore[arg-type]


@pytest.fixture
def catalogue(own_home: Path) -> Catalogue:
    """Sixty plain adapters, three unusable ones, one in quarantine, and one per hostile text."""
    plain = [
        row(i, rank=8, bytes=2_000_000, downloads=i, licence="mit", created_at=f"{2020 + i // 12}-{1 + i % 12:02d}-09T")
        for i in range(60)
    ]
    faults = ["base is 'one'", "base is 'two'", "NaN in layers.7.q"]
    broken = [row(100 + i, status="unusable", reason=fault, rank=None) for i, fault in enumerate(faults)]
    held = row(200, status="quarantined", reason="unusual", created_at="2024-13-01T")
    hostile = [
        row(
            300 + i, id=f"x/{i}{text}", author=text, licence=text, base=text, dtype=text, status="unusable", reason=text
        )
        for i, text in enumerate(HOSTILE)
    ]
    found = Catalogue(own_home / "report.db")
    found.add([*plain, *broken, held, *hostile])
    return found


def test_the_numbers_are_those_of_the_catalogue(catalogue: Catalogue) -> None:
    known, report = catalogue.stats(), pool_report(catalogue)
    assert (report.total.adapters, report.total.usable) == (known["adapters"], known["usable"]) == (80, 60)
    assert (report.bytes, report.authors) == (known["bytes"], known["authors"])
    assert {share.label: share.adapters for share in report.counts["Status"]} == known["by_status"]
    for title, shares in report.counts.items():
        assert sum(share.adapters for share in shares) == (20 if title == "Reason" else 80), title
        assert sum(share.usable for share in shares) == (0 if title == "Reason" else 60), title


def test_numbers_in_a_reason_are_the_adapters_own() -> None:
    assert kind_of_reason("truncated: header says 38,304 bytes, file has 22") == (
        "truncated: header says … bytes, file has …"
    )


def test_adapters_are_counted_by_kind_of_reason_month_size_and_rank(catalogue: Catalogue) -> None:
    counts = pool_report(catalogue, ["id~ann/"]).counts
    assert [(one.label, one.adapters) for one in counts["Reason"]] == [
        ("base is …", 2),
        ("NaN in …", 1),
        ("unusual", 1),
    ]
    months = counts["Created"]
    assert [one.label for one in months[:24]] == [
        f"{year}-{month:02d}" for year in (2023, 2024) for month in range(1, 13)
    ]
    assert [(*one,) for one in months[24:]] == [("before", 36, 36, True), ("not known", 4, 0, False)]
    assert [(one.label, one.adapters) for one in counts["Size"]] == [("1 to 3 MB", 60), ("not known", 4)]
    assert [(one.label, one.adapters) for one in counts["Rank"]] == [("4", 1), ("8", 60), ("not known", 3)]


def test_the_page_shows_the_numbers_and_every_adapter(catalogue: Catalogue) -> None:
    report = pool_report(catalogue)
    read = Read(pool_page(report))
    for title, shares in report.counts.items():
        shown = {safe(share.label): (f"{share.adapters:,}", f"{share.usable:,}") for share in shares}
        assert read.count(title) == shown
    assert [line[0] for line in read.rows] == [f"ann/lora{i}" for i in range(59, 9, -1)]
    assert read.rows[0] == [
        "ann/lora59", "ann", "acme/tiny", "8", "0", "2.0 MB", "mit", "59", "2024-12-09", "ok", "–",
    ]  # fmt: skip
    columns = {one["title"]: one for one in read.data["columns"]}
    ids = [columns["Adapter"]["words"][place] for place in columns["Adapter"]["values"]]
    assert sorted(ids) == sorted(safe(one.id) for one in catalogue.find())
    assert columns["Downloads"]["values"][:3] == [59, 58, 57]


def test_hostile_adapters_change_nothing_but_texts(catalogue: Catalogue) -> None:
    hostile = Read(pool_page(pool_report(catalogue, ["status=unusable", "author!=ann"])))
    assert {line[1] for line in hostile.rows} == {safe(text) if text.strip() else text for text in HOSTILE}
    assert [tag for tag, _ in hostile.elements if tag in ("script", "img", "style", "b", "iframe")] == [
        "style",
        *["script"] * 2,
    ]
    assert hostile.others == []
    assert [n for _, given in hostile.elements for n in given if n == "style" or n.startswith("on")] == []


def test_the_command_writes_the_same_bytes_again_and_names_the_last_sync(catalogue: Catalogue) -> None:
    catalogue.remember_sync(SYNCED, "hub", "acme/tiny", {})
    db = str(catalogue.path)
    assert ok("pool", "report", "-o", "pool.html", "--db", db).out == "pool.html\n"
    first = Path("pool.html").read_bytes()
    told = json.loads(ok("pool", "report", "-o", "pool.html", "--db", db, "--json").out)
    assert Path("pool.html").read_bytes() == first
    assert (told["adapters"], told["usable"], told["bytes"]) == (80, 60, len(first))
    assert f"Last sync {catalogue.last_sync()[:16].replace('T', ' ')} UTC." in Read(first).texts
    ok("pool", "report", "--where", "id~ann/", "-o", "some.html", "--db", db)
    assert "Only adapters with id~ann/." in Read(Path("some.html").read_bytes()).texts


def test_nothing_to_report_and_no_place_for_it(catalogue: Catalogue) -> None:
    with pytest.raises(NothingMatched, match="no adapter fits"):
        pool_report(catalogue, ["rank>1000"])
    assert "no adapter is known" in refused(3, "pool", "report", "-o", "x.html")
    Path("link.html").symlink_to("there.html")
    assert "a link" in refused(1, "pool", "report", "-o", "link.html", "--db", str(catalogue.path))
    assert not Path("x.html").exists()
    assert not Path("there.html").exists()


def test_a_users_own_file_is_not_replaced_by_the_page(catalogue: Catalogue) -> None:
    own = '{"prompt": "a", "completion": "b"}\n'
    Path("task.jsonl").write_text(own)
    error = refused(1, "pool", "report", "-o", "task.jsonl", "--db", str(catalogue.path))
    assert "task.jsonl exists and is no page" in error
    assert Path("task.jsonl").read_text() == own
    Path("empty.html").touch()
    ok("pool", "report", "-o", "empty.html", "--db", str(catalogue.path))
    Path("folder").mkdir()
    assert "folder: cannot be written" in refused(1, "pool", "report", "-o", "folder", "--db", str(catalogue.path))
