"""The catalogue's file under bad conditions: damage, locks, full disks, network file systems."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from lora_cli.catalogue import database
from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.database import open_for_reading, open_for_writing, writing
from lora_cli.catalogue.doctor import check, rescue
from lora_cli.errors import DataError, NothingMatched, OutputError
from lora_cli.records import Adapter
from tests.cli import ok, refused


def row(number: int) -> Adapter:
    card = f"Card of adapter {number}. " + random.Random(number).randbytes(300).hex()
    return Adapter(id=f"owner/{number:04}", commit="a" * 40, source="hub", repo=f"owner/{number:04}", card=card)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    path = tmp_path / "catalogue.db"
    with Catalogue(path) as catalogue:
        catalogue.add([row(number) for number in range(2000)])
        catalogue.selections.remember("best", [(catalogue.get("owner/0001").ref, 1.0)], "rank", {})
        catalogue.remember_aliases("acme/base", ["mirror/base"])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def damage(path: Path, *cards: int) -> None:
    """Overwrite the pages that hold these adapters' cards."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[16:18], "big")
    for page in {data.index(f"Card of adapter {number}. ".encode()) // size for number in cards}:
        data[page * size : (page + 1) * size] = b"\xff" * size
    path.write_bytes(data)


def test_a_whole_database_has_no_problems(full: Path) -> None:
    assert check(full) == []
    with pytest.raises(NothingMatched, match="no catalogue there"):
        check(full.with_name("other.db"))


def test_damage_is_an_error_in_one_line_with_the_remedy(full: Path) -> None:
    damage(full, 1000)
    assert check(full) != []
    with Catalogue(full) as catalogue, pytest.raises(DataError, match="a damaged database") as caught:
        for number in range(2000):
            catalogue.provenance(f"owner/{number:04}")
            catalogue.get(f"owner/{number:04}")
    assert "lora pool doctor" in caught.value.hint


def test_whole_rows_are_rescued_and_lost_ones_named(full: Path) -> None:
    before = full.read_bytes()
    damage(full, 500, 1000, 1001, 1999)
    result = rescue(full)
    lost = result.lost.pop("adapters")
    assert {"owner/0500", "owner/1000", "owner/1999"} <= set(lost)
    assert len(lost) < 40
    assert result.lost == {}
    assert result.kept == {"adapters": 2000 - len(lost), "aliases": 1, "selections": 1, "selected": 1}
    assert check(full) == []
    with Catalogue(full) as catalogue:
        assert catalogue.get("owner/0499") == row(499)
        assert {found.id for found in catalogue.search("adapter")}
        assert len(catalogue.candidates().pinned) == 2000 - len(lost)
    assert len(result.damaged.read_bytes()) == len(before)
    damage(full, 3)
    with pytest.raises(OutputError, match="damaged exists"):
        rescue(full)


def test_the_doctor_of_a_pool_says_what_is_damaged_saved_and_lost(full: Path) -> None:
    assert "is whole" in ok("pool", "doctor", "--db", str(full)).err
    damage(full, 1000)
    assert "is damaged" in refused(1, "pool", "doctor", "--db", str(full))
    told = ok("pool", "doctor", "--rescue", "--db", str(full)).err
    assert "rows of adapters" in told
    assert "owner/1000" in told
    assert "is whole" in ok("pool", "doctor", "--db", str(full)).err


def test_a_disk_that_fails_is_no_damage(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    monkeypatch.setattr("lora_cli.catalogue.doctor._orphans", fails)
    with pytest.raises(OutputError, match="cannot be read or written"):
        check(full)


def test_what_cannot_be_rescued_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.db"
    path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 8000)
    with pytest.raises(DataError, match="nothing can be rescued"):
        rescue(path)
    assert [file.name for file in tmp_path.iterdir()] == ["catalogue.db"]


def test_a_locked_catalogue_is_never_read_as_if_nobody_could_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    path = tmp_path / "catalogue.db"
    with Catalogue(path) as catalogue:
        catalogue.add([row(1)])
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OutputError, match="another lora has been writing"):
            open_for_reading(path)


def test_a_full_disk_is_told_at_once(tmp_path: Path) -> None:
    with closing(open_for_writing(tmp_path / "catalogue.db")) as db:
        [pages] = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}")
        began = time.monotonic()
        with pytest.raises(OutputError, match="no space left"), writing(db):
            db.execute(
                "INSERT INTO runs (id, command, status, started, record) VALUES ('a', 'b', 'c', 'd', zeroblob(100000))"
            )
        assert time.monotonic() - began < 1
        with writing(db):
            db.execute("INSERT INTO aliases (alias, base) VALUES ('a', 'b')")


def test_a_file_that_cannot_grow_is_told_at_once(tmp_path: Path) -> None:
    code = (
        "import resource, sys, pathlib, signal\nfrom lora_cli.catalogue.adapters import Catalogue\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "from lora_cli.errors import OutputError\n"
        "try:\n    Catalogue(pathlib.Path(sys.argv[1])).remember_aliases('acme/base', ['x/y'])\n"
        "except OutputError as error:\n    print(error.message)\n"
    )
    began = time.monotonic()
    path = tmp_path / "catalogue.db"
    command = [sys.executable, "-c", code, str(path), "20000"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert told.stdout.startswith(f"{path}: cannot be read or written") or "no space" in told.stdout
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("kind", "journal"), [("nfs4", "delete"), ("cifs", "delete"), ("ext4", "wal"), ("fuse.sshfs", "delete")]
)
def test_a_network_file_system_gets_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, journal: str
) -> None:
    mounts = tmp_path / "mounts"
    home = str(tmp_path / "a home").replace(" ", "\\040")
    mounts.write_text(f"/dev/sda / ext4 rw 0 0\nserver:/export {home} {kind} rw 0 0\n")
    monkeypatch.setattr(database, "_MOUNTS", mounts)
    with Catalogue(tmp_path / "a home" / "catalogue.db") as catalogue:
        catalogue.add([row(1)])
        assert catalogue.get("owner/0001") == row(1)
    with closing(sqlite3.connect(tmp_path / "a home" / "catalogue.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == (journal,)


_MIGRATING = """
import os, resource, sys
from pathlib import Path
from lora_cli.catalogue import migrations
from lora_cli.catalogue.database import open_for_writing
from lora_cli.errors import LoraError

def m999_colours(db):
    db.execute("ALTER TABLE adapters ADD COLUMN colour TEXT")
    db.execute("UPDATE adapters SET colour = card || card || card")
    if sys.argv[2] == "killed":
        os._exit(9)

migrations.STEPS = (*migrations.STEPS, m999_colours)
if sys.argv[3] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    open_for_writing(Path(sys.argv[1]))
except LoraError as error:
    sys.exit(error.message)
"""


@pytest.mark.parametrize("fault", ["killed", "full at the backup", "full at the change"])
def test_a_migration_that_fails_half_way_leaves_the_old_catalogue_and_its_backup(full: Path, fault: str) -> None:
    size = full.stat().st_size
    room = {"killed": 0, "full at the backup": size // 2, "full at the change": size + 4096}[fault]
    told = subprocess.run(
        [sys.executable, "-c", _MIGRATING, str(full), fault, str(room)], capture_output=True, text=True, check=False
    )
    assert told.returncode == (9 if fault == "killed" else 1)
    assert len(told.stderr.splitlines()) == (0 if fault == "killed" else 1), told.stderr
    backups = list(full.parent.glob("*.backup"))
    assert len(backups) == (0 if fault == "full at the backup" else 1)
    assert not list(full.parent.glob(".*.partial"))
    for path in (full, *backups):
        assert check(path) == []
        with Catalogue(path) as catalogue:
            assert catalogue.stats()["adapters"] == 2000
            assert catalogue.get("owner/1999") == row(1999)
            assert catalogue.selections.last("best") is not None
    with closing(sqlite3.connect(full)) as connection:
        assert "colour" not in [found[1] for found in connection.execute("PRAGMA table_info(adapters)")]
