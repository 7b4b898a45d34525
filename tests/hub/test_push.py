"""Uploads with the real client against the stand-in Hub: whatever breaks, the branch has the whole commit or none."""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_cli.errors import AccessDenied, LoraError, NetworkError, Refused, UsageError
from lora_cli.hashes import sha256_of, stamp_of
from lora_cli.hub.push import Conflict, Pusher, Remote, Upload
from tests.adapters_on_disk import random_factors, write_adapter
from tests.cli import ok
from tests.clock import impatient
from tests.fake_hub import FakeHub, lora_files
from tests.fake_uploads import HANG_UP, TOKEN, git_sha1
from tests.faults import LONG

WEIGHTS = lora_files()["adapter_model.safetensors"]
CARD = b"---\nlicense: mit\n---\nA card.\n"
STEPS = {
    "look": "/revision/main",
    "make": "/api/repos/create",
    "card": "/api/validate-yaml",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "put": "cdn:",
    "verify": "/objects/verify",
    "commit": "/commit/main",
}


@pytest.fixture
def hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The stand-in Hub, and a login that may write to me and to acme."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake


def small(path: str, data: bytes) -> Upload:
    sha256 = hashlib.sha256(data).hexdigest()
    return Upload(path=path, content=data, sha256=sha256, git_sha1=git_sha1(data), size=len(data))


UPLOADS = (small("README.md", CARD), small("adapter_model.safetensors", WEIGHTS))


def stored(path: Path) -> Upload:
    size = path.stat().st_size
    return Upload(path=path.name, content=path, sha256=sha256_of(path), git_sha1="", size=size, stamp=stamp_of(path))


def push(uploads: tuple[Upload, ...] = UPLOADS, **options: float) -> str:
    """Everything that a push asks of the Hub; returns the commit."""
    pusher = Pusher(**options)  # type: ignore[arg-type]
    head = pusher.look("me/mixed") or pusher.make("me/mixed", private=True)
    if head.holds(uploads):
        return head.commit
    pusher.check_card(head.repo, CARD.decode())
    return pusher.push(head, uploads, [], "a push")


def is_whole(hub: FakeHub) -> bool:
    """Whether the branch has all files, in one commit; else it must be as it was."""
    if (repo := hub.repos.get("me/mixed")) is None:
        return False
    ours = {name: data for name, data in repo.files.items() if name != ".gitattributes"}
    assert ours in ({}, {"README.md": CARD, "adapter_model.safetensors": WEIGHTS})
    assert len(hub.uploads.commits) == bool(ours)
    return bool(ours)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [HANG_UP, "reset", "truncate", "503", "html", "deep-json"])
def test_what_breaks_once_is_tried_again_and_committed_once(hub: FakeHub, step: str, kind: str) -> None:
    known = {"503": "status"}.get(kind, kind)
    hub.fail(STEPS[step], known, status=503)
    if kind == HANG_UP and step == "look":
        pytest.skip("a question without a body")
    made = push()
    assert is_whole(hub)
    assert made == hub.repos["me/mixed"].sha


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", [HANG_UP, "reset", "500", "html"])
def test_what_stays_broken_is_one_error_and_a_rerun_ends_whole(hub: FakeHub, step: str, kind: str) -> None:
    if kind == HANG_UP and step == "look":
        pytest.skip("a question without a body")
    hub.fail(STEPS[step], {"500": "status"}.get(kind, kind), status=500, times=99)
    # What the Hub took, though its answers were lost, is found there.
    taken = step == "verify" or (kind == "reset" and step in ("put", "commit"))
    if taken:
        assert push() == hub.repos["me/mixed"].sha
    else:
        with pytest.raises(NetworkError) as caught:
            push()
        assert len(caught.value.message) < 200
        assert caught.value.hint
    assert is_whole(hub) == taken
    hub.heal()
    assert push() == hub.repos["me/mixed"].sha
    assert is_whole(hub)


@pytest.mark.parametrize("kind", ["reset", "truncate", "cut"])
def test_a_commit_whose_answer_is_lost_is_recognised(hub: FakeHub, kind: str) -> None:
    hub.add("me/mixed", {})
    hub.fail("/commit/main", kind, times=99)
    assert push() == hub.repos["me/mixed"].sha
    assert is_whole(hub)


def test_a_lost_answer_and_then_nothing_leaves_it_to_the_rerun(hub: FakeHub) -> None:
    hub.add("me/mixed", {})
    pusher = Pusher()
    head = pusher.look("me/mixed")
    assert head is not None
    hub.fail("/commit/main", "reset", times=99)
    hub.fail("/revision/main", "reset", times=99)
    with pytest.raises((NetworkError, Conflict)):
        pusher.push(head, UPLOADS, [], "a push")
    hub.heal()
    assert push() == hub.repos["me/mixed"].sha
    assert is_whole(hub)


def test_somebody_elses_push_is_not_overwritten(hub: FakeHub) -> None:
    hub.add("me/mixed", {"README.md": b"old"})
    hub.uploads.before_commit = lambda repo: repo.commit(README__md=b"theirs")
    with pytest.raises(Conflict, match="somebody else has pushed to it meanwhile") as caught:
        push()
    assert "run the same command again" in caught.value.hint
    assert hub.repos["me/mixed"].files == {"README.md": b"theirs"}
    hub.uploads.before_commit = None
    assert push() == hub.repos["me/mixed"].sha


@pytest.mark.parametrize("status", [409, 412])
def test_a_refused_commit_on_an_unmoved_branch_is_one_line(hub: FakeHub, status: int) -> None:
    hub.fail("/commit/main", status=status, times=9)
    with pytest.raises(Conflict, match=f"refuses the commit \\({status}\\)"):
        push()
    assert not is_whole(hub)


def test_a_repository_made_by_somebody_else_meanwhile_is_taken_as_it_is(hub: FakeHub) -> None:
    pusher = Pusher()
    assert pusher.look("me/mixed") is None
    hub.add("me/mixed", {"README.md": b"theirs"})
    found = pusher.make("me/mixed", private=True)
    assert (found.private, found.files) == (False, {"README.md": git_sha1(b"theirs")})


def test_a_hub_that_is_busy_making_another_one_is_waited_for_but_not_for_ever(hub: FakeHub) -> None:
    hub.fail("/api/repos/create", status=409, times=2)
    assert Pusher().make("me/mixed", private=True).private
    hub.fail("/api/repos/create", status=409, times=99)
    with pytest.raises(NetworkError, match="it exists unseen by this login, or another one is being made"):
        Pusher().make("me/another", private=True)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("step", ["look", "make", "card", "preupload", "batch", "verify", "commit"])
def test_a_refused_login_is_told_with_its_remedy(hub: FakeHub, step: str, status: int) -> None:
    hub.fail(STEPS[step], status=status, times=9)
    with pytest.raises(AccessDenied, match=str(status)) as caught:
        push()
    assert "hf auth login" in caught.value.hint
    assert not is_whole(hub)


def test_no_login_no_request(fake: FakeHub) -> None:
    with pytest.raises(AccessDenied, match="no login"):
        Pusher()
    assert fake.asked == []


def test_the_token_goes_to_the_hub_alone(hub: FakeHub) -> None:
    hub.uploads.part_size = 500
    push()
    assert {("authorization" in one.headers) for one in hub.asked if one.server == "cdn"} == {False}
    assert {("authorization" in one.headers) for one in hub.asked if one.server == "hub"} == {True}


def test_a_renamed_repository_is_named(hub: FakeHub) -> None:
    hub.add("me/mixed", {})
    hub.rename("me/mixed", "me/other")
    with pytest.raises(UsageError, match="me/mixed is called me/other now"):
        push()
    assert hub.uploads.commits == []


def test_what_the_repository_ignores_is_no_half_a_push(hub: FakeHub) -> None:
    hub.uploads.ignored = {"adapter_model.safetensors"}
    with pytest.raises(Refused, match=r"its .gitignore leaves out adapter_model.safetensors"):
        push()
    assert not is_whole(hub)


def test_a_file_that_changes_under_way_is_not_committed(hub: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(WEIGHTS)
    upload = stored(file)
    file.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(Refused, match="changed while they were used"):
        push((UPLOADS[0], upload))
    assert not is_whole(hub)
    file.unlink()
    with pytest.raises(LoraError, match="cannot be read"):
        push((UPLOADS[0], upload))


def test_a_large_file_shows_its_way_and_is_not_sent_twice(hub: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    file.write_bytes(os.urandom(5_000_000))
    told: list[tuple[str, int, int]] = []
    hub.fail("cdn:", HANG_UP)
    hub.fail("/commit/main", status=500, times=99)
    pusher = Pusher(progress=lambda *step: told.append(step))
    head = pusher.make("me/mixed", private=True)
    with pytest.raises(NetworkError):
        pusher.push(head, [stored(file)], [], "a push")
    steps = [done for what, done, total in told if what == "uploading big.safetensors, MB" and total == 5]
    assert {0, 3, 5} <= set(steps)
    hub.heal()
    hub.forget()
    pusher.push(head, [stored(file)], [], "a push")
    assert hub.paths(server="cdn") == []
    assert hub.repos["me/mixed"].files["big.safetensors"] == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", LONG)
def test_whatever_the_hub_does_a_push_ends(hub: FakeHub, step: str, kind: str) -> None:
    hub.fail(STEPS[step], kind, seconds=1, times=99)
    begin = time.monotonic()
    with impatient(0.5), contextlib.suppress(LoraError):
        push(silence=0.2)
    assert time.monotonic() - begin < 15
    hub.heal()
    if kind != "silent":
        assert push() == hub.repos["me/mixed"].sha
        assert is_whole(hub)


@pytest.fixture
def deaf() -> Iterator[int]:
    """A server that takes connections and reads nothing from them; its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        taken = []
        threading.Thread(target=lambda: taken.extend(server.accept() for _ in range(9)), daemon=True).start()
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_store_that_reads_nothing_ends_within_the_limits(hub: FakeHub, deaf: int, tmp_path: Path) -> None:
    file = tmp_path / "big.safetensors"
    file.write_bytes(os.urandom(20_000_000))
    hub.cdn = f"http://127.0.0.1:{deaf}"
    begin = time.monotonic()
    with impatient(), pytest.raises(NetworkError):
        push((UPLOADS[0], stored(file)))
    assert time.monotonic() - begin < 10


KILLED = """
import sys
from lora_cli.__main__ import main
sys.argv = ["lora", "push", "merged", "me/mixed", "--private"]
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"),
    [
        *((step, signal.SIGKILL) for step in ("make", "card", "put", "verify", "commit")),
        *((step, signal.SIGINT) for step in ("put", "commit")),
        ("put", signal.SIGTERM),
    ],
)
def test_a_killed_push_leaves_nothing_half_and_a_rerun_ends_whole(
    hub: FakeHub, step: str, number: signal.Signals, own_home: Path
) -> None:
    write_adapter(own_home / "one", random_factors({"model.layers.0.mlp.up_proj": (24, 16)}, 4, seed=1))
    ok("merge", "one", "-m", "linear", "-o", "merged")
    command = [sys.executable, "-c", KILLED]
    hub.fail(STEPS[step], "silent", seconds=60)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(2, signal.SIG_DFL)
    )
    while not [one for one in hub.asked if STEPS[step].removeprefix("cdn:") in one.path and _is(one.server, step)]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=20)[1].decode()
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert ("the same command tells which, and finishes it" in said) == (number == signal.SIGINT)
    assert hub.uploads.commits == []
    hub.heal()
    ok("push", "merged", "me/mixed", "--private")
    assert len(hub.uploads.commits) == 1
    files = {name: data for name, data in hub.repos["me/mixed"].files.items() if name != ".gitattributes"}
    assert {*files} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "run.json"}
    assert files["run.json"] == (own_home / "merged" / "run.json").read_bytes()


def _is(server: str, step: str) -> bool:
    return (server == "cdn") == (step == "put")


def test_a_remote_holds_files_by_either_hash() -> None:
    large = Upload(path="w", content=b"", sha256="a" * 64, git_sha1="", size=1)
    for files, holds in (({"w": "a" * 64}, True), ({"w": ""}, False), ({}, False), ({"w": "b" * 64}, False)):
        assert Remote(repo="a/b", commit="", private=True, files=files).holds([large]) is holds
