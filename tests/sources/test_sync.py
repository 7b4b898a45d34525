"""`sync` from a stand-in Hub: what it asks for, what it stores, and that nothing can leave it half done."""

import json
import os
import random
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import AccessDenied, NetworkError, UsageError
from lora_cli.hub.client import Hub
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool.sync import SyncOptions, SyncReport, sync
from tests.architectures import linear_skeleton
from tests.fake_files import safetensors_bytes
from tests.fake_hub import BASE, FakeHub, lora_files
from tests.paths import ROOT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


def synced(catalogue: Catalogue, budget: int | None = None, **options: Any) -> SyncReport:
    chosen = SyncOptions(**{name: options.pop(name) for name in [*options] if name in SyncOptions.__slots__})
    return sync(catalogue, HubSource(Hub(budget=budget)), chosen, **{"base": BASE, **options})


def counts(report: SyncReport) -> tuple[int, int, int, int]:
    return report.new, report.changed, report.unchanged, report.failed


@pytest.mark.slow
def test_a_thousand_adapters_twice(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(1000)
    begin = time.process_time()
    first = synced(catalogue)
    assert counts(first) == (1000, 0, 0, 0)
    assert len(catalogue.find(status="ok")) == 1000
    # One page; of each adapter its configuration (and a redirect) and 4 kB of its weights (and a redirect).
    assert first.requests == len(fake.asked) == 1 + 4 * 1000
    assert 3_000_000 < first.bytes < 8_000_000

    fake.forget()
    for repo in fake.repos.values():
        repo.downloads += 5
    second = synced(catalogue)
    assert counts(second) == (0, 0, 1000, 0)
    assert [asked.path.partition("?")[0] for asked in fake.asked] == ["/api/models"]
    assert second.requests == 1
    assert second.bytes < 500_000
    assert catalogue.get("author7/lora-0007").downloads == 12
    assert time.process_time() - begin < 20


def test_a_hub_that_does_not_redirect_is_asked_twice_for_an_adapter(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.redirects = False
    fake.add_many(30)
    assert synced(catalogue).requests == len(fake.asked) == 1 + 2 * 30
    assert len(catalogue.find(status="ok")) == 30


def test_a_sync_that_is_interrupted_keeps_all_that_it_has_read(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(30)

    def stop(what: str, done: int, total: int) -> None:
        if what == "reading adapters" and done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synced(catalogue, progress=stop)
    assert len(catalogue.find(status="ok")) == 7
    assert counts(synced(catalogue)) == (23, 0, 7, 0)


def test_only_new_and_changed_commits_are_read(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(20)
    synced(catalogue)
    fake.repos["author3/lora-0003"].commit(**{k.replace(".", "__"): v for k, v in lora_files(rank=32).items()})
    fake.add("zoe/fresh")
    fake.forget()
    assert counts(synced(catalogue)) == (1, 1, 19, 0)
    assert {path.split("/resolve/")[0] for path in fake.paths("/resolve/")} == {"/author3/lora-0003", "/zoe/fresh"}
    assert catalogue.get("author3/lora-0003").rank == 32


def test_what_is_stored_of_an_adapter(fake: FakeHub, catalogue: Catalogue) -> None:
    files = lora_files(rank=4, alpha=16, use_rslora=True, rank_pattern={"v_proj": 4})
    repo = fake.add("alice/sql", files, downloads=9, likes=2, licence="mit", tags=("text-to-sql",))
    synced(catalogue)
    row = catalogue.get("alice/sql")
    assert (row.commit, row.source, row.repo, row.author) == (repo.sha, "hub", "alice/sql", "alice")
    assert (row.base, row.base_match, row.rank, row.alpha, row.scale, row.rslora) == (BASE, "exact", 4, 16, 8, True)
    assert (row.modules, row.layers, row.dtype, row.target_modules) == (4, 2, "F32", ("q_proj", "v_proj"))
    assert (row.bytes, row.parameters) == (len(files[WEIGHTS]), 4 * 2 * 4 * 8)
    assert (row.licence, row.downloads, row.likes, row.created_at[:10]) == ("mit", 9, 2, "2026-01-01")
    assert [found.id for found in catalogue.search("text to sql")] == ["alice/sql"]


def test_what_cannot_be_used_is_listed_with_the_reason_and_not_asked_for_again(
    fake: FakeHub, catalogue: Catalogue
) -> None:
    good = lora_files()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    pickle = {CONFIG: good[CONFIG], "adapter_model.bin": b"\x80\x04cos\nsystem\n(S'touch /tmp/canary'\ntR."}
    fake.add("x/pickle", pickle)
    fake.add("x/merged", {"model.safetensors": good[WEIGHTS], "config.json": b"{}"})
    fake.add("x/nothing", {"README.md": b"soon"})
    fake.add("x/checkpoints", {f"checkpoint-500/{name}": data for name, data in good.items()})
    fake.add("x/gated", gated="manual")
    fake.add("x/config-pointer", {**good, CONFIG: pointer})
    fake.add("x/weights-pointer", {**good, WEIGHTS: pointer})
    fake.add("x/not-json", {**good, CONFIG: b"{"})
    fake.add("x/dora", lora_files(use_dora=True))
    fake.add("x/other-base", lora_files(base="acme/another"))
    fake.add("x/no-base", lora_files(base=None))
    fake.add("x/ia3", {**good, CONFIG: json.dumps({"peft_type": "IA3"}).encode()})
    fake.add("x/cut", {**good, WEIGHTS: good[WEIGHTS][:-40]})
    fake.add("x/bomb", {**good, WEIGHTS: struct.pack("<Q", 2**40) + b"{" * 100})
    fake.add("x/huge-config", {**good, CONFIG: b"[" * 3_000_000})
    report = synced(catalogue)
    assert (report.new, report.failed, report.unusable) == (15, 0, 15)
    reasons = {row.id: f"{row.status}: {row.reason}" for row in catalogue.find()}
    for id, said in {
        "x/pickle": "unusable: pickle only (adapter_model.bin): never opened",
        "x/merged": "full weights, not an adapter",
        "x/nothing": "no adapter_config.json",
        "x/checkpoints": "only training checkpoints",
        "x/gated": "gated: ",
        "x/config-pointer": "LFS pointer",
        "x/weights-pointer": "LFS pointer",
        "x/not-json": "not JSON",
        "x/dora": "DoRA",
        "x/other-base": "wrong base",
        "x/no-base": "no base",
        "x/ia3": "IA3",
        "x/cut": "truncated",
        "x/bomb": "header",
        "x/huge-config": "no config",
    }.items():
        assert said in reasons[id], (id, reasons[id])
    assert not [path for path in fake.paths() if path.endswith("adapter_model.bin")]
    fake.forget()
    assert counts(synced(catalogue)) == (0, 0, 15, 0)
    assert len(fake.asked) == 1


def test_a_gated_adapter_is_asked_for_again_by_another_login(
    fake: FakeHub, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = fake.add("x/gated", gated="manual")
    synced(catalogue)
    monkeypatch.setenv("HF_TOKEN", "hf_somebodyelse")
    repo.gated = False
    assert counts(synced(catalogue)) == (0, 1, 0, 0)
    assert catalogue.get("x/gated").status == "ok"


def test_headers_longer_than_the_first_read_take_one_more_request_until_their_length_is_learnt(
    fake: FakeHub, catalogue: Catalogue
) -> None:
    for n in range(30):
        fake.add(f"x/wide-{n}", lora_files(layers=40), created=datetime(2026, 1, 1, 0, n, tzinfo=UTC))
    report = synced(catalogue)
    assert {row.modules for row in catalogue.find(status="ok")} == {80}
    assert 1 + 4 * 30 < report.requests <= 1 + 4 * 30 + 2 * 8 * 2


def test_what_fails_in_passing_is_told_and_read_by_the_next_sync(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(12)
    fake.fail("/author5/lora-0005/resolve", status=503, times=5)
    report = synced(catalogue)
    assert counts(report) == (11, 0, 0, 1)
    assert not report.complete
    assert "503" in dict(report.failures)["author5/lora-0005"]
    assert catalogue.get("author5/lora-0005").status == "failed"
    fake.forget()
    assert counts(synced(catalogue)) == (1, 0, 11, 0)
    assert len(fake.asked) == 5
    assert catalogue.get("author5/lora-0005").status == "ok"


def test_a_new_version_that_cannot_be_read_leaves_the_old_one_in_use(fake: FakeHub, catalogue: Catalogue) -> None:
    repo = fake.add("alice/sql")
    synced(catalogue)
    before = catalogue.get("alice/sql")
    repo.commit(adapter_config__json=lora_files(alpha=99)[CONFIG])
    fake.fail("/resolve", status=500, times=5)
    assert counts(synced(catalogue)) == (0, 0, 0, 1)
    assert catalogue.get("alice/sql") == before
    assert counts(synced(catalogue)) == (0, 1, 0, 0)
    assert catalogue.get("alice/sql").alpha == 99


def test_a_hub_that_goes_away_ends_the_sync_early(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(200)
    fake.fail("/resolve/", status=502, times=100_000)
    report = synced(catalogue)
    assert report.failed < 60
    assert report.failed + report.left == 200


def test_a_refused_login_is_an_error_where_nothing_can_be_listed(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(5)
    fake.fail("/api/models?", status=401, times=100)
    with pytest.raises(AccessDenied):
        synced(catalogue)


def test_a_hub_that_cannot_list_is_an_error_and_changes_nothing(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(5)
    synced(catalogue)
    fake.fail("/api/models?", status=500, times=100)
    with pytest.raises(NetworkError):
        synced(catalogue)
    assert len(catalogue.find(status="ok")) == 5


def test_a_budget_of_requests_is_kept_and_the_rest_comes_with_the_next_syncs(
    fake: FakeHub, catalogue: Catalogue
) -> None:
    fake.add_many(40)
    left = []
    for _ in range(6):
        report = synced(catalogue, budget=60)
        assert report.requests <= 60
        assert (report.failed, len(catalogue.find(status="failed"))) == (0, 0)
        left.append(report.left)
        if report.complete:
            break
    assert left[0] > 20
    assert left[-1] == 0
    assert len(catalogue.find(status="ok")) == 40


def test_a_dry_run_plans_and_stores_nothing(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(6)
    report = synced(catalogue, dry_run=True)
    assert counts(report) == (6, 0, 0, 0)
    assert dict(report.plan)["author2/lora-0002"] == "new"
    assert len(fake.asked) == 1
    assert not catalogue.path.exists()


def test_limit_and_since_look_at_fewer_and_call_nothing_gone(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(20)
    synced(catalogue)
    assert synced(catalogue, limit=3).seen == 3
    assert synced(catalogue, since="2026-01-01T00:15:00.000Z").seen == 5
    assert {row.status for row in catalogue.find()} == {"ok"}


def test_an_adapter_that_was_deleted_is_marked_gone_and_comes_back(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(5)
    synced(catalogue)
    repo = fake.repos.pop("author1/lora-0001")
    fake.repos["author2/lora-0002"].listed = False
    assert synced(catalogue).gone == 1
    assert catalogue.get("author1/lora-0001").status == "gone"
    assert catalogue.get("author2/lora-0002").status == "ok", "it is still there, only not listed"
    assert synced(catalogue).gone == 0
    fake.repos["author1/lora-0001"] = repo
    assert synced(catalogue).changed == 1
    assert catalogue.get("author1/lora-0001").status == "ok"


def test_a_renamed_repository_stays_one_row_under_its_new_name(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("alice/old-name")
    synced(catalogue)
    fake.rename("alice/old-name", "alice/new-name")
    synced(catalogue)
    assert [row.id for row in catalogue.find()] == ["alice/new-name"]


def test_aliases_are_listed_and_accepted(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("alice/plain")
    twin = "copies/tiny-llama-nf9"
    fake.add("bob/on-a-copy", lora_files(base=twin), base=twin)
    fake.add("carol/by-path", lora_files(base="/home/carol/my-llama"))
    assert synced(catalogue).unusable == 1
    report = synced(catalogue, aliases=(twin, "/home/carol/my-llama"))
    assert (report.seen, report.unusable) == (3, 0)
    assert {row.id: row.base_match for row in catalogue.find(status="ok")} == {
        "alice/plain": "exact",
        "bob/on-a-copy": "alias",
        "carol/by-path": "alias",
    }
    assert set(catalogue.aliases()) == {twin, "/home/carol/my-llama"}


def test_adapters_in_subfolders_of_one_repository(fake: FakeHub, catalogue: Catalogue) -> None:
    files = {f"{name}/{file}": data for name in ("sql", "math") for file, data in lora_files(rank=len(name)).items()}
    traps = {f"../../{CONFIG}": b"{}", f"/etc/{CONFIG}": b"{}", f"a b/{CONFIG}": b"{}"}
    fake.add("alice/two", files | traps)
    synced(catalogue)
    assert {row.id: (row.subfolder, row.rank) for row in catalogue.find()} == {
        "alice/two:math": ("math", 4),
        "alice/two:sql": ("sql", 3),
    }
    assert counts(synced(catalogue)) == (0, 0, 2, 0)


def test_the_shapes_of_the_base_are_compared_with_the_header(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("alice/fits")
    fake.add("alice/too-wide", lora_files(hidden=16))
    shapes = {f"model.layers.{n}.self_attn.{m}": (8, 8) for n in (0, 1) for m in ("q_proj", "v_proj")}
    asked = []
    synced(catalogue, skeleton=lambda: asked.append(1) or linear_skeleton(shapes))
    assert asked == [1], "found once, by whichever thread came first"
    assert catalogue.get("alice/fits").status == "ok"
    assert "shapes differ from base" in catalogue.get("alice/too-wide").reason
    synced(catalogue, skeleton=lambda: asked.append(2) or linear_skeleton(shapes))
    assert asked == [1], "not needed where nothing has changed"


def test_the_base_is_looked_at_before_the_hub_is_asked_for_files(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add_many(8)

    def look() -> None:
        # transformers reads a base with all of the process offline: a request of that moment would fail.
        assert fake.paths("/resolve/") == []

    assert synced(catalogue, skeleton=look).new == 8


def test_a_hub_needs_a_base(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match="no base model"):
        sync(catalogue, HubSource(Hub()))


def test_weights_that_were_judged_once_keep_their_verdict(fake: FakeHub, catalogue: Catalogue) -> None:
    repo = fake.add("alice/nan")
    synced(catalogue)
    catalogue.learn(replace(catalogue.get("alice/nan"), sha256="5" * 64, status="unusable", reason="NaN in q_proj"))
    synced(catalogue, force=True)
    assert catalogue.get("alice/nan").reason == "NaN in q_proj"
    repo.commit(notes=b"new weights")
    synced(catalogue)
    assert catalogue.get("alice/nan").status == "ok"


KILLED = """
import sys
from pathlib import Path
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.hub.client import Hub
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool.sync import SyncOptions, sync
with Catalogue(Path(sys.argv[1])) as catalogue:
    sync(catalogue, HubSource(Hub(sys.argv[2])), base=sys.argv[3])
"""


@pytest.mark.slow
def test_a_sync_killed_at_any_moment_is_finished_by_the_next(fake: FakeHub, tmp_path: Path) -> None:
    fake.add_many(120)
    fake.delay = 0.004
    db = tmp_path / "killed.db"
    chance = random.Random(5)
    command = [sys.executable, "-c", KILLED, str(db), fake.endpoint, BASE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kept = [0]
    for _ in range(5):
        process = subprocess.Popen(command, env=environment)
        deadline = time.monotonic() + 20
        fake.forget()
        while not fake.asked and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if db.exists():
            with sqlite3.connect(db) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            connection.close()
            with Catalogue(db) as catalogue:
                kept.append(len(catalogue.find(status="ok")))
    assert kept == sorted(kept), "what was stored stays stored"
    fake.delay = 0
    with Catalogue(db) as killed, Catalogue(tmp_path / "calm.db") as calm:
        report = sync(killed, HubSource(Hub(fake.endpoint)), base=BASE)
        assert report.complete
        assert report.unchanged >= kept[-1]
        sync(calm, HubSource(Hub(fake.endpoint)), base=BASE)
        assert killed.find() == calm.find()
        assert len(killed.search("author7")) == 12


@pytest.mark.slow
def test_two_syncs_at_once_end_in_one_catalogue(fake: FakeHub, tmp_path: Path) -> None:
    fake.add_many(40)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "shared.db"), fake.endpoint, BASE]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate()[1] for process in running] == [b"", b"", b""]
    with Catalogue(tmp_path / "shared.db") as catalogue:
        assert len(catalogue.find(status="ok")) == 40


def test_zero_tensors_are_no_adapter(fake: FakeHub, catalogue: Catalogue) -> None:
    fake.add("x/empty", {**lora_files(), WEIGHTS: safetensors_bytes({})})
    synced(catalogue)
    assert "no LoRA tensors" in catalogue.get("x/empty").reason
