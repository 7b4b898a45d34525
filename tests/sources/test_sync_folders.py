"""`sync --from DIR`: a folder tree of adapters, read whole, and only where something has changed."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.checks import weights
from lora_cli.errors import DataError, NothingMatched
from lora_cli.formats.store import folder_ref
from lora_cli.hashes import sha256_of
from lora_cli.sources import folder as sources
from lora_cli.sources.folder import FolderSource
from lora_cli.steps.pool.sync import SyncOptions, SyncReport, sync
from tests.fake_hub import BASE, lora_files
from tests.paths import SHARED

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WILD = SHARED / "wild" / "adapters"


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    for name in ("alice/sql", "alice/math", "bob/deep/er/chat", "solo"):
        put(tmp_path / "pool" / name, rank=len(name))
    return tmp_path / "pool"


def put(folder: Path, files: dict[str, bytes] | None = None, **lora: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (lora_files(**lora) if files is None else files).items():
        (folder / name).write_bytes(data)
    return folder


def counts(report: SyncReport) -> tuple[int, int, int, int]:
    return report.new, report.changed, report.unchanged, report.gone


def test_every_folder_with_an_adapter_is_found_and_read_whole(pool: Path, catalogue: Catalogue) -> None:
    report = sync(catalogue, FolderSource(pool), base=BASE)
    assert counts(report) == (4, 0, 0, 0)
    assert {row.id: row.author for row in catalogue.find()} == {
        "pool/alice/sql": "alice",
        "pool/alice/math": "alice",
        "pool/bob/deep/er/chat": "bob",
        "pool/solo": "",
    }
    row = catalogue.get("pool/alice/sql")
    assert row.sha256 == sha256_of(pool / "alice/sql" / WEIGHTS)
    assert row.commit == folder_ref(pool / "alice/sql").commit
    # Every number is 0.5, so each of 4 modules is 8×8 times 9 · 0.25, scaled by 8/9.
    assert row.norm == pytest.approx((4 * 64) ** 0.5 * 9 * 0.25 * 8 / 9)
    assert (row.source, row.repo, row.status) == ("folder", str(pool / "alice/sql"), "ok")


def test_only_what_has_changed_is_read_again(pool: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(catalogue, FolderSource(pool))
    put(pool / "alice/sql", rank=2)
    put(pool / "carol/new")
    weighed: list[str] = []
    scan = weights.scan_weights
    monkeypatch.setattr(
        weights, "scan_weights", lambda path, *rest: weighed.append(path.parent.name) or scan(path, *rest)
    )
    assert counts(sync(catalogue, FolderSource(pool))) == (1, 1, 3, 0)
    assert sorted(weighed) == ["new", "sql"]
    weighed.clear()
    sync(catalogue, FolderSource(pool), base=BASE)
    assert weighed == [], "another question about the base is no reason to weigh the same bytes again"


def test_an_adapter_that_vanished_is_marked_gone(pool: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    put(tmp_path / "other" / "kept")
    sync(catalogue, FolderSource(pool))
    sync(catalogue, FolderSource(tmp_path / "other"))
    for file in (pool / "solo").iterdir():
        file.unlink()
    assert counts(sync(catalogue, FolderSource(pool))) == (0, 0, 3, 1)
    assert catalogue.get("pool/solo").status == "gone"
    assert catalogue.get("other/kept").status == "ok"
    put(pool / "solo", rank=4)
    assert counts(sync(catalogue, FolderSource(pool))) == (0, 1, 3, 0)


def test_links_that_go_round_and_broken_ones_are_survived(pool: Path, catalogue: Catalogue) -> None:
    (pool / "alice" / "loop").symlink_to(pool, target_is_directory=True)
    (pool / "nowhere").symlink_to(pool / "does-not-exist")
    broken = put(pool / "broken", {CONFIG: lora_files()[CONFIG]})
    (broken / WEIGHTS).symlink_to(pool / "does-not-exist")
    report = sync(catalogue, FolderSource(pool))
    assert report.seen == 5
    assert "no adapter_model.safetensors" in catalogue.get("pool/broken").reason


def test_a_file_that_disappears_while_it_is_read_fails_alone(
    pool: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = sources.read_header

    def vanish(path: Path) -> Any:
        if path.parent.name == "math":
            path.unlink()
        return read(path)

    monkeypatch.setattr(sources, "read_header", vanish)
    report = sync(catalogue, FolderSource(pool))
    assert (report.new, [id for id, _ in report.failures]) == (3, ["pool/alice/math"])


def test_many_files_that_cannot_be_read_stop_nothing(
    pool: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        put(pool / "locked" / str(number))
    read = sources.read_header

    def locked(path: Path) -> Any:
        if "locked" in path.parts:
            raise DataError(f"{path}: cannot be read (Permission denied)")
        return read(path)

    monkeypatch.setattr(sources, "read_header", locked)
    report = sync(catalogue, FolderSource(pool))
    assert (report.new, report.failed, report.left) == (4, 30, 0)
    assert "cannot be read" in catalogue.get("pool/locked/7").reason


def test_two_folders_of_one_name_do_not_share_a_row(pool: Path, catalogue: Catalogue, tmp_path: Path) -> None:
    twin = put(tmp_path / "elsewhere" / "pool" / "solo", rank=3)
    sync(catalogue, FolderSource(pool))
    sync(catalogue, FolderSource(tmp_path / "elsewhere" / "pool"))
    assert catalogue.get("pool/solo").rank == 4
    assert catalogue.get(str(twin)).rank == 3
    assert counts(sync(catalogue, FolderSource(tmp_path / "elsewhere" / "pool"))) == (0, 0, 1, 0)


def test_a_pickle_is_listed_and_never_opened(catalogue: Catalogue, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    folder = put(tmp_path / "pool" / "x", {CONFIG: lora_files()[CONFIG], "adapter_model.bin": code})
    (folder / "adapter_model.bin").chmod(0)
    sync(catalogue, FolderSource(tmp_path / "pool"))
    assert catalogue.get("pool/x").reason == "pickle only (adapter_model.bin): never opened"
    assert not canary.exists()


def test_broken_weights_are_listed_with_the_reason(catalogue: Catalogue, tmp_path: Path) -> None:
    put(tmp_path / "pool" / "nan", value=float("nan"))
    put(tmp_path / "pool" / "zero", value=0.0)
    put(tmp_path / "pool" / "huge", value=1e4)
    put(tmp_path / "pool" / "no-config", {WEIGHTS: lora_files()[WEIGHTS]})
    put(tmp_path / "pool" / "bad-name\x1b[31m\n", value=float("inf"))
    assert sync(catalogue, FolderSource(tmp_path / "pool")).unusable == 5
    reasons = {row.id: row.reason for row in catalogue.find()}
    assert "NaN or Inf in model.layers.0" in reasons["pool/nan"]
    assert "zero" in reasons["pool/zero"]
    assert "norm" in reasons["pool/huge"]
    assert "no adapter_config.json" in reasons["pool/no-config"]


def test_a_name_that_is_not_unicode_is_listed_escaped_with_the_reason(catalogue: Catalogue, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "pool") + b"/caf\xe9"))
    put(folder)
    assert sync(catalogue, FolderSource(tmp_path / "pool")).new == 1
    assert [(row.id, row.reason) for row in catalogue.find()] == [("pool/caf\\udce9", "its path is not valid Unicode")]


def test_the_card_is_searched_and_names_the_licence(catalogue: Catalogue, tmp_path: Path) -> None:
    folder = put(tmp_path / "pool" / "x")
    (folder / "README.md").write_text('---\nlicense: "cc-by-nc-4.0"\ntags: [lora]\n---\nWrites haiku.', "utf-8")
    sync(catalogue, FolderSource(tmp_path / "pool"))
    assert catalogue.get("pool/x").licence == "cc-by-nc-4.0"
    assert [row.id for row in catalogue.search("haiku")] == ["pool/x"]
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.1\n---\n", "utf-8")
    assert counts(sync(catalogue, FolderSource(tmp_path / "pool"))) == (0, 1, 0, 0)
    assert catalogue.get("pool/x").licence == "llama3.1"


def test_a_missing_folder_is_said_and_nothing_is_called_gone(pool: Path, catalogue: Catalogue) -> None:
    sync(catalogue, FolderSource(pool))
    with pytest.raises(NothingMatched, match="no such folder"):
        sync(catalogue, FolderSource(pool / "nothing"))
    assert len(catalogue.find(status="ok")) == 4


def test_a_dry_run_reads_and_stores_nothing(pool: Path, catalogue: Catalogue) -> None:
    report = sync(catalogue, FolderSource(pool), SyncOptions(dry_run=True))
    assert dict(report.plan) == dict.fromkeys((row for row, _ in report.plan), "new")
    assert len(report.plan) == 4
    assert not catalogue.path.exists()


@pytest.mark.skipif(not WILD.is_dir(), reason="../shared/wild is not there")
def test_real_adapters_are_catalogued_each_unusable_one_with_the_true_reason(catalogue: Catalogue) -> None:
    report = sync(catalogue, FolderSource(WILD))
    assert (report.new, report.failed) == (17, 0)
    unusable = {row.id.removeprefix("adapters/"): row.reason for row in catalogue.find(["status!=ok"])}
    assert unusable == {
        "akseljoonas__biotech-news-sentiment__lora_adapter": "every lora_B is zero: changes nothing",
        "anirudh-ak__peft-gpt2__model_lora_model": "tensors of a full head saved (score.weight)",
        "sidmahurkar__Udacity_GenAI_Nanodegree__roberta-base-lora": (
            "tensors of a full head saved (classifier.dense.weight)"
        ),
        "tommyroar__is-the-mountain-out__train_checkpoints": "declares no base model, only the class ConvNeXt",
        "yoonyerin__be-great": "pickle only (adapter_model.bin): never opened",
    }
    norms = {row.id.partition("__")[0].removeprefix("adapters/"): row.norm for row in catalogue.find(["norm>0"])}
    for name, norm in {"0112LY": 0.007318, "BK7195": 690.2, "fanyihan-max": 1.089, "zouhe0": 5.789}.items():
        assert norms[name] == pytest.approx(norm, rel=1e-3)
    assert sync(catalogue, FolderSource(WILD)).unchanged == 17


@pytest.mark.skipif(not WILD.is_dir(), reason="../shared/wild is not there")
def test_real_configurations_are_catalogued_without_a_crash(catalogue: Catalogue, tmp_path: Path) -> None:
    for file in (WILD.parent / "configs").glob("*.json"):
        put(tmp_path / "pool" / file.stem, {CONFIG: file.read_bytes()})
    report = sync(catalogue, FolderSource(tmp_path / "pool"))
    assert (report.failed, report.new) == (0, len(list((tmp_path / "pool").iterdir())))
    pointers = catalogue.find(["reason~LFS pointer"])
    assert len(pointers) == 2
    assert {row.peft_type for row in catalogue.find()} > {"LORA", "IA3", "LOHA"}
    assert json.dumps([row.base_declared for row in catalogue.find()])
