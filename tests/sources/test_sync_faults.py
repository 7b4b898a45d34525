"""`sync` and `fetch` where servers err: a bad repository costs nothing but itself, a passing fault is no verdict."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.hub import patience
from lora_cli.hub.client import Hub
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool import fetch as fetching
from lora_cli.steps.pool.sync import SyncReport, sync
from tests.cli import lora, ok, refused
from tests.fake_hub import BASE, FakeHub, lora_files
from tests.faults import KINDS, ODD_ITEMS, ODD_NAMES
from tests.sources.endure import endure

QUICK = ("status", "html", "odd-port", "cut", "wrong-size")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests may take a second."""
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr("lora_cli.hub.connection.REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(patience, "_STEP", 0.05)


def synced(catalogue: Catalogue, silence: float | None = None) -> SyncReport:
    return sync(catalogue, HubSource(Hub(silence=silence)), base=BASE)


def states(catalogue: Catalogue) -> dict[str, tuple[str, str]]:
    return {row.id: (row.status, row.reason) for row in catalogue.find()}


def test_odd_repositories_are_rows_with_their_reason_and_the_rest_is_stored(fake: FakeHub) -> None:
    fake.add_many(3)
    for name in ODD_NAMES:
        fake.add(name)
    for name, raw in ODD_ITEMS.items():
        fake.add(name, raw=dict(raw))
    ok("pool", "sync", BASE)
    fake.forget()
    told = ok("pool", "sync", BASE)
    assert f"{3 + len(ODD_NAMES) + len(ODD_ITEMS)} unchanged" in told.err
    assert len(fake.asked) == 1, "what is odd for good is not asked for again"
    with Catalogue(Path(ok("pool", "path").out.strip())) as catalogue:
        found = states(catalogue)
    assert {id for id, (status, _) in found.items() if status != "ok"} == {*ODD_NAMES, "x/many-files"}
    assert all("its name" in found[id][1] for id in ODD_NAMES)
    assert "its list of files" in found["x/many-files"][1]


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_repository_that_stays_bad_is_failed_and_asked_again(fake: FakeHub, quick: None, kind: str) -> None:
    fake.add_many(4)
    bad = "author2/lora-0002"
    place = "author2" if kind not in ("wrong-range", "wrong-size", "absurd-size") else "cdn:/author2"
    fake.fail(place, kind, times=999, status=403, seconds=0.1)
    told = lora("pool", "sync", BASE)
    assert told.code == (0 if kind in ("no-range", "slow") else 6), told
    assert "Traceback" not in told.err
    with Catalogue(Path(ok("pool", "path").out.strip())) as catalogue:
        found = states(catalogue)
        assert [status for id, (status, _) in found.items() if id != bad] == ["ok"] * 3
        if kind not in ("no-range", "slow"):
            assert found[bad][0] == "failed"
            assert found[bad][1] in told.err
        fake.heal()
        ok("pool", "sync", BASE)
        assert catalogue.get(bad).status == "ok"


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_bare_refusal_of_one_repository_is_no_verdict(fake: FakeHub, catalogue: Catalogue, status: int) -> None:
    repo = fake.add("alice/sql")
    fake.add("bob/math")
    synced(catalogue)
    before = catalogue.get("alice/sql")
    repo.commit(**{CONFIG.replace(".", "__"): lora_files(rank=2)[CONFIG]})
    fake.fail("/alice/sql/", status=status, times=99)
    report = synced(catalogue)
    assert (report.failed, report.unchanged, report.gone) == (1, 1, 0)
    assert catalogue.get("alice/sql") == before, "the version that is stored can still be used"


def test_a_portal_in_front_of_everything_makes_nothing_unusable(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(40)
    fake.fail("/resolve/", "html", times=9999)
    report = synced(catalogue)
    assert report.failed + report.left == 40
    assert {status for status, _ in states(catalogue).values()} == {"failed"}
    fake.heal()
    assert synced(catalogue).new == 40


def test_bytes_that_are_no_header_are_read_twice_before_they_count(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("alice/sql")
    fake.fail("cdn:", "garbage")
    assert synced(catalogue).complete
    assert catalogue.get("alice/sql").status == "ok"


def test_what_failed_before_comes_last_and_does_not_end_the_next_sync(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(90)
    for n in range(40, 90):
        fake.fail(f"/author{n % 10}/lora-{n:04d}/", status=403, times=9999)
    reports = [synced(catalogue) for _ in range(4)]
    assert reports[0].left, "the first sync gives up"
    assert len(catalogue.find(status="ok")) == 40
    assert (reports[-1].failed, reports[-1].left) == (50, 0)


def test_a_silent_repository_keeps_no_other_from_being_read(fake: FakeHub, catalogue: Catalogue, quick: None) -> None:
    fake.add_many(6)
    fake.page_size = 2
    fake.fail("/author4/lora-0004/", "silent", times=9999)
    assert synced(catalogue, silence=0.3).new == 5
    fake.repos["author0/lora-0000"].commit(README__md=b"new")
    report = synced(catalogue, silence=0.3)
    assert (report.seen, report.changed, report.failed, report.left) == (6, 1, 1, 0)
    assert states(catalogue)["author4/lora-0004"][0] == "failed"


def test_a_hub_that_falls_silent_ends_the_sync_at_once(fake: FakeHub, catalogue: Catalogue, quick: None) -> None:
    fake.add_many(60)
    fake.fail("/resolve/", "silent", times=9999)
    fake.fail("/api/models?limit=1", "silent", times=9999)
    report = synced(catalogue, silence=0.3)
    assert report.seconds < 10
    assert report.failed + report.left == 60
    assert report.failed <= 16
    assert "does not answer" in report.failures[0][1]


@pytest.mark.parametrize("status", [401, 500])
def test_adapters_that_cannot_be_asked_about_are_not_gone(fake: FakeHub, catalogue: Catalogue, status: int) -> None:
    fake.add_many(4)
    synced(catalogue)
    for n in (1, 2):
        fake.repos[f"author{n}/lora-000{n}"].listed = False
    del fake.repos["author3/lora-0003"]
    fake.fail("/api/models/author1/", status=status, times=99)
    report = synced(catalogue)
    assert report.complete
    assert catalogue.get("author1/lora-0001").status == "ok"


def test_a_private_repository_is_not_marked_while_logged_out(
    fake: FakeHub, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = fake.add("alice/private")
    fake.add("bob/math")
    synced(catalogue)
    refs = [row.ref for row in catalogue.find()]
    for answer in ({"X-Error-Code": "RepoNotFound"}, {}):
        fake.fail("/alice/private/", status=401, headers=answer, times=99)
        report = fetching.fetch(catalogue, fetching.plan(catalogue, refs), Hub())
        assert [adapter.id for adapter, _ in report.failed] == ["alice/private"]
        assert catalogue.get("alice/private").status == "ok"
        fake.heal()
    report = fetching.fetch(catalogue, fetching.plan(catalogue, refs), Hub())
    assert [adapter.id for adapter in report.fetched] == ["alice/private"]
    assert catalogue.get("alice/private").sha256
    assert repo.files[WEIGHTS]


def test_a_fetch_from_a_silent_hub_ends_after_the_first_adapters(
    fake: FakeHub, catalogue: Catalogue, quick: None
) -> None:
    fake.add_many(30)
    synced(catalogue)
    fake.fail("hub:", "silent", times=9999)
    todo = fetching.plan(catalogue, [row.ref for row in catalogue.find()])
    report = fetching.fetch(catalogue, todo, Hub(silence=0.3))
    assert len(report.failed) == 30
    assert len(fake.asked) < 200


def test_a_refused_login_is_told_with_its_remedy(fake: FakeHub) -> None:
    fake.add_many(3)
    fake.fail("/resolve/", status=401, times=999)
    assert "refuses the login (401)" in refused(6, "pool", "sync", BASE)


@pytest.mark.slow
def test_faults_at_random_lose_nothing(tmp_path: Path) -> None:
    sent, syncs = endure(tmp_path, size=200, seed=1)
    assert sum(sent.values()) > 50
    assert len(sent) > len(KINDS) // 2
    assert syncs < 20
