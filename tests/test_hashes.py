"""Every file is read once for its hash."""

import hashlib
from pathlib import Path

import pytest

from lora_cli import hashes
from lora_cli.errors import DataError


def test_files_hashed_ahead_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / str(place) for place in range(5)]
    for place, file in enumerate(files[:4]):
        file.write_bytes(bytes([place]) * 1000)
    heard: list[tuple[str, int, int]] = []
    hashes.hash_ahead(files, lambda *said: heard.append(said))
    assert heard[-1] == ("hashing adapters", 5, 5)
    monkeypatch.setattr(hashes, "_hashed", None)
    found = [hashes.sha256_of(file) for file in files[:4]]
    assert found == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files[:4]]
    with pytest.raises(DataError):
        hashes.sha256_of(files[4])


def test_a_file_is_hashed_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, blocks = tmp_path / "one", [b"", bytes(100_000), b"end"]
    with hashes.hashed_as_written(file) as written:
        for block in blocks:
            written.write(memoryview(block))
    assert file.read_bytes() == b"".join(blocks)
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "_hashed", None)
        assert hashes.sha256_of(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(b"another")
    assert hashes.sha256_of(file) == hashlib.sha256(b"another").hexdigest()


def test_a_file_that_was_not_finished_has_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "one"
    with pytest.raises(ValueError, match="stopped"), hashes.hashed_as_written(file) as written:
        written.write(memoryview(b"half"))
        raise ValueError("stopped")
    file.write_bytes(b"full")
    assert hashes.sha256_of(file) == hashlib.sha256(b"full").hexdigest()
