"""Whatever a server does, a question to the Hub ends soon, with the right answer or with an error in one line."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cli.errors import LoraError, NetworkError
from lora_cli.hub import patience
from lora_cli.hub.client import Hub
from lora_cli.hub.items import items
from lora_cli.hub.problems import Absent, Silent, Unfit
from tests.clock import impatient
from tests.fake_hub import BASE, FakeHub
from tests.faults import KINDS, LONG, ODD_ITEMS, packed
from tests.paths import ROOT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MARK = [{"id": "a"}, {}, {"b": [1, {"c": ']}\\"'}]}]


QUESTIONS: dict[str, Callable[[Hub, str], object]] = {
    "listing": lambda hub, _: [found.id for page in hub.list_adapters(BASE) for found in page.repositories],
    "repository": lambda hub, commit: hub.repository("alice/sql", commit).files,
    "exists": lambda hub, _: hub.exists("alice/sql"),
    "file": lambda hub, commit: hub.read_file("alice/sql", CONFIG, commit, 10_000),
    "newest": lambda hub, _: hub.read_newest("alice/sql", CONFIG, 10_000, "main"),
    "range": lambda hub, commit: hub.read_range("alice/sql", WEIGHTS, commit, 0, 64),
    "facts": lambda hub, commit: hub.file_facts("alice/sql", WEIGHTS, commit),
}
UNSEEN = ("range", "garbage")  # no hash covers a part of a file
PLACES = {"file": ("/resolve/", "/resolve-cache/"), "range": ("/resolve/", "cdn:"), "listing": ("/api/models?",)}


def answer(fake: FakeHub, name: str, commit: str, kind: str) -> object:
    """The answer to a question, or its error, before the stand-in ends a fault. What takes long meets no patience."""
    silence, seconds = (0.2, 1.0) if kind in LONG else (5.0, 10.0)
    begin = time.monotonic()
    try:
        with impatient(seconds):
            return QUESTIONS[name](Hub(silence=silence), commit)
    except LoraError as error:
        return error
    finally:
        fake.heal()
        assert time.monotonic() - begin < 6


@pytest.mark.parametrize("name", PLACES)
def test_what_stays_wrong_is_a_network_error_in_one_line(fake: FakeHub, name: str) -> None:
    repo = fake.add("alice/sql")
    right = QUESTIONS[name](Hub(), repo.sha)
    for kind in KINDS:
        if kind not in LONG and (name, kind) != UNSEEN:
            fake.fail(PLACES[name][-1], kind, times=99, status=500)
            found = answer(fake, name, repo.sha, kind)
            assert found == right or (isinstance(found, NetworkError) and len(found.message) < 200), (kind, found)
    assert QUESTIONS[name](Hub(), repo.sha) == right


@pytest.mark.slow
@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_ends_whatever_goes_wrong(fake: FakeHub, name: str) -> None:
    repo = fake.add("alice/sql")
    right = QUESTIONS[name](Hub(), repo.sha)
    for kind in (kind for kind in KINDS if (name, kind) != UNSEEN):
        for times in (1,) if kind in LONG else (1, 99):
            fake.fail("", kind, times=times, status=403, seconds=1)
            found = answer(fake, name, repo.sha, kind)
            may_fail = times == 99 or kind in (*LONG, "status", "deep-refusal", "long-wait")
            assert found == right or (may_fail and isinstance(found, LoraError)), (kind, found)


@pytest.mark.parametrize(("place", "kind"), [("hub:", "dripping-head"), ("cdn:", "silent"), ("cdn:", "dripping-body")])
def test_a_download_ends_and_leaves_nothing_wrong_behind(fake: FakeHub, place: str, kind: str) -> None:
    repo = fake.add("alice/sql")
    fake.fail(place, kind, times=99)
    begin = time.monotonic()
    with impatient(), pytest.raises(NetworkError):
        Hub(silence=0.2, tries=1).download("alice/sql", WEIGHTS, repo.sha)
    assert time.monotonic() - begin < 6
    fake.heal()
    assert Hub().download("alice/sql", WEIGHTS, repo.sha).read_bytes() == repo.files[WEIGHTS]


@pytest.mark.parametrize("speed", [150_000, 50_000])
def test_a_download_may_take_long_while_enough_bytes_come_in(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, speed: int
) -> None:
    """By a clock that only bytes set on: two seconds of them are enough, six of as many are too slow."""
    monkeypatch.setattr(patience, "REQUEST_SECONDS", 1.0)
    monkeypatch.setattr(patience, "SLOWEST", 100_000)
    moved, now = patience.Attempt._move, 0.0

    def timed(attempt: patience.Attempt, count: int) -> None:
        nonlocal now
        now += count / speed
        moved(attempt, count)

    monkeypatch.setattr(patience.Attempt, "_move", timed)
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now))
    repo = fake.add("alice/large", {CONFIG: b"{}", WEIGHTS: bytes(300_000)})
    if speed < patience.SLOWEST:
        with pytest.raises(NetworkError):
            Hub(tries=1).download("alice/large", WEIGHTS, repo.sha)
        assert 1.0 < now < 6
    else:
        assert Hub(tries=1).download("alice/large", WEIGHTS, repo.sha).stat().st_size == 300_000
        assert now > 2, "longer than a request without progress"


def test_a_download_that_sends_more_than_it_should_is_cut_off(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("cdn:", "html-of-unknown-length", times=99)
    connection = Hub()
    with pytest.raises(NetworkError, match="more bytes come"):
        connection.download("alice/sql", WEIGHTS, repo.sha)


def test_the_user_is_told_while_the_hub_is_silent_and_no_longer(fake: FakeHub) -> None:
    fake.add("alice/sql")
    fake.fail("/api/models?", "silent", seconds=0.8)
    told: list[tuple[str, int, int]] = []
    with impatient(60.0):
        found = QUESTIONS["listing"](Hub(silence=50.0, progress=lambda *step: told.append(step)), "")
    assert found == ["alice/sql"]
    waits = [step for step in told if step[0] == patience.WAITING]
    assert len(waits) >= 3
    assert waits[-1][1] == waits[-1][2], "the last word ends the wait"


def test_stopping_ends_a_silent_request(fake: FakeHub) -> None:
    fake.add("alice/sql")
    fake.fail("/api/models?", "silent", times=99)
    connection = Hub()
    threading.Timer(0.2, connection.stop).start()
    begin = time.monotonic()
    with pytest.raises(NetworkError, match="stopped"):
        QUESTIONS["listing"](connection, "")
    assert time.monotonic() - begin < 3


def test_silence_of_the_whole_hub_is_told_apart_from_that_of_one_file(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("hub:", "silent", times=99)
    with impatient(), pytest.raises(Silent):
        QUESTIONS["file"](Hub(silence=0.5), repo.sha)
    fake.heal()
    fake.fail("/resolve-cache/", "silent", times=99)
    with impatient(), pytest.raises(NetworkError) as caught:
        QUESTIONS["file"](Hub(silence=0.5), repo.sha)
    assert not isinstance(caught.value, Silent), "the first hop was answered"


def test_limits_of_time_leave_room_for_a_slow_hub_and_end_in_ninety_seconds() -> None:
    tries = -(-patience.REQUEST_SECONDS // patience.SILENCE_SECONDS)
    assert tries * patience.SILENCE_SECONDS + 2**tries < 90


@pytest.mark.parametrize("oid", ["ETag", "X-Repo-Commit"])
def test_an_answer_without_the_hubs_facts_is_asked_again_and_then_refused(fake: FakeHub, oid: str) -> None:
    repo = fake.add("alice/sql")
    fake.fail("/resolve", status=200, body=b"{}", times=99, headers={oid: '"' + "0" * 40 + '"'})
    with pytest.raises(Unfit, match="does not come from a Hub"):
        QUESTIONS["file"](Hub(), repo.sha)
    assert len(fake.asked) == 3


def test_only_the_hubs_own_word_says_that_something_is_absent(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    for headers, kind in (
        ({"X-Error-Code": "RepoNotFound"}, True),
        ({}, False),
        ({"X-Error-Code": "EntryNotFound"}, False),
    ):
        fake.fail("/resolve/", status=404, headers=headers)
        with pytest.raises(LoraError) as caught:
            QUESTIONS["file"](Hub(), repo.sha)
        assert isinstance(caught.value, Absent) is kind, headers
    fake.fail("/api/models/alice/sql", status=404)
    with pytest.raises(LoraError, match="not found"):
        Hub().exists("alice/sql")


@pytest.mark.parametrize("cursor", ["new", "repeated"])
def test_a_listing_whose_pages_do_not_end_is_given_up(fake: FakeHub, cursor: str) -> None:
    item = json.dumps([{"_id": "1", "id": "a/b", "sha": "a" * 40}]).encode()
    for n in range(20):
        link = f'</api/models?cursor={n if cursor == "new" else 0}>; rel="next"'
        fake.fail("/api/models", status=200, body=item, headers={"Link": link})
    with pytest.raises(NetworkError, match="does not end"):
        QUESTIONS["listing"](Hub(), "")
    assert len(fake.asked) == 4


def test_odd_entries_of_a_listing_do_not_hide_the_others(fake: FakeHub) -> None:
    fake.add_many(3)
    for name, raw in ODD_ITEMS.items():
        fake.add(name, raw=dict(raw))
    [(page, _)] = Hub().list_adapters(BASE)
    found = {item.id: item for item in page}
    assert len(found) == 3 + len(ODD_ITEMS)
    assert found["x/deep-card"].files == found["author0/lora-0000"].files
    assert not found["x/many-files"].files_known
    assert (found["x/absurd-numbers"].downloads, found["x/absurd-numbers"].likes) == (0, 0)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_list_comes_out_as_it_went_in_however_it_is_cut_into_blocks(size: int) -> None:
    text = json.dumps([*MARK, 3, "x", None]).encode()
    assert list(items(text[at : at + size] for at in range(0, len(text), size))) == MARK


_TEXTS = st.text('ab[]{}",:\\é\u2028', max_size=8)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(_TEXTS, _VALUES, max_size=4), max_size=5), st.integers(1, 200), st.data())
def test_any_list_comes_out_as_it_went_in_and_a_damaged_one_as_objects_or_not_at_all(
    found: list[dict[str, object]], size: int, data: st.DataObject
) -> None:
    text = json.dumps(found, ensure_ascii=False).encode()
    assert list(items(text[at : at + size] for at in range(0, len(text), size))) == found
    place = data.draw(st.integers(0, len(text) - 1))
    sign = data.draw(st.sampled_from([b"", b"[", b"]", b"{", b"}", b'"', b"\\", b","]))
    with contextlib.suppress(ValueError):
        assert all(isinstance(item, dict) for item in items([text[:place] + sign + text[place + 1 :]]))


@pytest.mark.parametrize(
    "text", [b"", b"[", b'["', b"{}", b"[1]]", b"[] x", b"[{]", b'[{"a": }]', b"<html>", b'[{"a": "']
)
def test_what_is_no_whole_list_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        list(items([text]))


LISTS = r"""
import re, sys
from pathlib import Path
from lora_cli.errors import NetworkError
from lora_cli.hub.client import Hub
from tests.fake_hub import BASE
hub = Hub(sys.argv[1])
try:
    list(hub.list_adapters(BASE))
except NetworkError as error:
    print(error.message)
print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(b'[{"id": [', b"[],", b"[]]}]"), (b"[", b"{},", b"{}]"), (b'[{"id": "', b"a", b'"}]')]
)
def test_a_listing_of_190_megabytes_takes_little_memory(fake: FakeHub, shape: tuple[bytes, bytes, bytes]) -> None:
    body = packed(*shape)
    assert len(body) < 1_000_000
    fake.fail("/api/models?", status=200, body=body, times=9, headers={"Content-Encoding": "gzip"})
    command = [sys.executable, "-c", LISTS, fake.endpoint]
    message, peak = subprocess.check_output(command, text=True, cwd=ROOT).splitlines()
    assert "the Hub's answer" in message or "the answer has more than" in message
    assert int(peak) < 150, "MB, of which the interpreter and the client take about 70"
