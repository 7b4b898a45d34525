"""Output folders are whole or absent, whatever ends the work."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_cli.errors import OutputError
from lora_cli.outputs import whole_file, whole_folder
from lora_cli.steps.evaluate.evaluate import _Rows
from tests.cli import ok, refused


def test_a_folder_appears_only_when_the_work_is_done(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as partial:
        (partial / "file").write_text("done")
        assert not target.exists()
    assert (target / "file").read_text() == "done"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


_TOO_LARGE = """
import resource, sys
from pathlib import Path
from lora_cli.errors import OutputError
from lora_cli.outputs import whole_file, whole_folder
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
place = Path(sys.argv[1])
for made in (whole_folder, whole_file):
    try:
        with made(place / "out") as one:
            if made is whole_folder:
                (one / "file").write_bytes(bytes(2000))
            else:
                one.write(bytes(2000))
    except OutputError as error:
        print(error.message)
"""


def test_a_file_above_the_limit_of_its_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Disks with a limit of their own, such as FAT's 4 GB, give the same error as `ulimit -f`."""
    place = tmp_path / "place"
    told = subprocess.run([sys.executable, "-c", _TOO_LARGE, place], capture_output=True, text=True, check=True)
    assert (
        told.stdout.splitlines() == [f"{place / 'out'}: larger than this disk, or ulimit -f, allows a file to be"] * 2
    )
    assert list(place.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to see what is synced")
def test_a_folder_survives_a_crash_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str]] = []
    sync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        steps.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        steps.append(("rename", Path(target).name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    (tmp_path / "parent").mkdir()
    with whole_folder(tmp_path / "parent" / "out") as partial:
        (partial / "file").write_text("done")
    assert steps == [("sync", "file"), ("sync", partial.name), ("rename", "out"), ("sync", "parent")]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        (partial / "missing").unlink()
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(OutputError, match="exists"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", replace=True):
        raise RuntimeError
    assert (tmp_path / "out" / "old").exists()
    with whole_folder(tmp_path / "out", replace=True) as partial:
        (partial / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"), whole_folder(tmp_path / "file" / "out"):
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="link"), whole_folder(tmp_path / "link"):
        pass


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys, pathlib\nfrom lora_cli.outputs import whole_file, whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half').write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / "out").exists()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("done")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_was_cut_off_is_undone(tmp_path: Path) -> None:
    old = tmp_path / ".out.0123abcd.old"
    old.mkdir()
    (old / "precious").write_text("mine")
    with pytest.raises(OutputError, match="exists"), whole_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_the_work_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom lora_cli.outputs import whole_file, whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])):\n    print(flush=True)\n    input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    with whole_folder(tmp_path / "out") as partial:
        (partial / "ours").write_text("ours")
        assert len(list(tmp_path.glob(".out.*.partial"))) == 2
    _, _ = other.communicate("\n")
    assert other.returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_signal_at_any_moment_leaves_nothing_behind(tmp_path: Path) -> None:
    code = (
        "import signal, sys, pathlib\nfrom lora_cli.outputs import whole_file, whole_folder\n"
        "signal.signal(signal.SIGALRM, lambda *_: sys.exit(9))\n"
        "signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))\n"
        "while True:\n"
        "    with whole_folder(pathlib.Path(sys.argv[1]), replace=True) as partial:\n"
        "        (partial / 'file').write_text('whole')\n"
    )
    for place in range(40):
        again = [sys.executable, "-c", code, str(tmp_path / "out"), str(0.05 + 0.0011 * place)]
        assert subprocess.run(again, check=False).returncode == 9
        left = {path.name for path in tmp_path.iterdir()} - {"out"}
        assert all(name.endswith(".old") for name in left), left


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with whole_file(target) as file:
        file.write(b"first")
        assert not target.exists()
    with pytest.raises(RuntimeError), whole_file(target) as file:
        file.write(b"second")
        raise RuntimeError
    assert target.read_bytes() == b"first"
    with whole_file(target) as file:
        file.write(b"third")
    assert target.read_bytes() == b"third"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="link"), whole_file(tmp_path / "link"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("output", [whole_file, partial(whole_folder, replace=True)])
def test_a_pipe_is_not_replaced(output: Callable[[Path], AbstractContextManager[Any]], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="a pipe, which no output replaces"), output(tmp_path / "pipe"):
        raise AssertionError
    assert (tmp_path / "pipe").is_fifo()
    assert [one.name for one in tmp_path.iterdir()] == ["pipe"]


def test_a_link_put_there_during_the_work_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("mine")
    for replace in (False, True):
        target = tmp_path / f"out-{replace}"
        if replace:
            target.mkdir()
        with pytest.raises(OutputError, match="a link"), whole_folder(target, replace=replace) as partial:
            (partial / "new").write_text("x")
            if replace:
                target.rmdir()
            target.symlink_to(tmp_path / "home")
    file = tmp_path / "file"
    with pytest.raises(OutputError, match="a link"), whole_file(file) as new:
        new.write(b"x")
        file.symlink_to(tmp_path / "home" / "mine")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["mine"]
    assert (tmp_path / "home" / "mine").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_rows_of_an_evaluation_are_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    rows = tmp_path / "rows.jsonl"
    replaced = Path.replace

    def swapped(self: Path, to: Path) -> Path:
        done = replaced(self, to)
        to.unlink()
        to.symlink_to(mine)
        return done

    monkeypatch.setattr(Path, "replace", swapped)
    with pytest.raises(OutputError, match="cannot be written"), _Rows(rows, {}):
        pass
    assert mine.read_text() == "mine"


def test_remains_that_are_links_are_neither_followed_nor_taken(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("mine")
    link = tmp_path / ".out.0badcafe.partial"
    link.symlink_to(tmp_path / "home")
    (tmp_path / ".out.0badcafe.old").symlink_to(tmp_path / "home")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "new").write_text("x")
    assert link.is_symlink()
    assert (tmp_path / "home" / "mine").read_text() == "mine"


def test_completion_is_added_to_the_users_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = tmp_path / "dotfiles"
    kept.write_bytes(b"export MINE=\xff")
    kept.chmod(0o600)
    (tmp_path / ".bashrc").symlink_to(kept)
    for _ in range(2):
        ok("completion", "bash", "--install")
    source = f"source '{tmp_path}/.bash_completions/lora.sh'\n".encode()
    assert kept.read_bytes() == b"export MINE=\xff\n" + source
    assert kept.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / ".bashrc").is_symlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kept.write_bytes(b"mine")
    monkeypatch.setattr(os, "fsync", full)
    assert "no space left on the disk" in refused(1, "completion", "bash", "--install")
    assert kept.read_bytes() == b"mine"
