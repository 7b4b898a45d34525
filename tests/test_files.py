"""What is no regular file is never waited for, wherever its name is met."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import ExitCode
from lora_cli.files import open_given, open_regular
from lora_cli.sources.folder import FolderSource
from lora_cli.steps.pool.sync import sync
from tests.cli import refused
from tests.fake_hub import lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # The name of a socket must be short.
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(here)


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


MADE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (_pipe, "a pipe"),
    "link to a pipe": (_link_to_pipe, "a pipe"),
    "socket": (_socket, "a socket"),
    "device": (_device, "a device"),
}


@pytest.mark.parametrize("made", MADE)
def test_a_special_file_in_a_pool_is_a_row_with_its_reason(tmp_path: Path, made: str) -> None:
    make, kind = MADE[made]
    for name in (CONFIG, WEIGHTS, "README.md", "other.safetensors"):
        folder = tmp_path / "pool" / name.partition(".")[0]
        folder.mkdir(parents=True)
        for file, data in lora_files().items():
            if file != name:
                (folder / file).write_bytes(data)
        make(folder / name)
    (tmp_path / "pool" / "alone").mkdir()
    make(tmp_path / "pool" / "alone" / "lora.safetensors")
    with Catalogue(tmp_path / "catalogue.db") as catalogue:
        report = sync(catalogue, FolderSource(tmp_path / "pool"))
        rows = {row.id.removeprefix("pool/"): (row.status, row.reason, row.notes) for row in catalogue.find()}
    assert (report.seen, report.failed) == (4, 0)
    assert rows == {
        "adapter_config": ("unusable", f"{CONFIG} is {kind}, not a file", ""),
        "adapter_model": ("unusable", f"{WEIGHTS} is {kind}, not a file", ""),
        "README": ("ok", "", f"README.md is {kind}: no card"),
        "other": ("ok", "", ""),
    }


@pytest.mark.parametrize("made", MADE)
def test_a_special_file_that_a_command_names_is_one_line(own_home: Path, made: str) -> None:
    make, kind = MADE[made]
    (own_home / "good").mkdir()
    for file, data in lora_files().items():
        (own_home / "good" / file).write_bytes(data)
    for name in ("task", "run.json", "coefficients.json", "names.toml", "catalogue"):
        (own_home / "in" / name).mkdir(parents=True)
        make(own_home / "in" / name / "x")
    said = [
        refused(1, "task", "show", "in/task/x"),
        refused(1, "merge", "--locked", "in/run.json/x", "-o", "out"),
        refused(1, "merge", "good", "--coef", "in/coefficients.json/x", "-o", "out"),
        refused(1, "pool", "list", "--db", "in/catalogue/x"),
    ]
    make(own_home / "lora.toml")
    said.append(refused(ExitCode.USAGE, "pool", "list"))
    for line in said:
        assert f"{kind}, not a file" in line
        assert len(line.splitlines()) <= 2


def test_a_pipe_that_the_shell_opened_is_read(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(b"text")
    with open_given(Path(f"/dev/fd/{reading}")) as opened:
        assert opened.read() == b"text"
    os.close(reading)


def test_a_file_replaced_by_a_pipe_while_it_is_opened_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    found = os.open

    def swapped(path: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return found(path, flags)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match="a pipe, not a file"):
        open_regular(file)
