"""The door to the Hub, with the real client against the stand-in: what comes through it and what is kept out."""

import socket
import time
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

from lora_cli.errors import AccessDenied, LoraError, NetworkError, NothingMatched, Partial
from lora_cli.hub.cache import cache_folder, cached_file
from lora_cli.hub.client import Hub
from lora_cli.hub.problems import Gated, MissingFile, Silent
from tests.fake_hub import BASE, FakeHub, lora_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKEN = "hf_canaryCANARYcanaryCANARY0123456789"


def hub(**options: object) -> Hub:
    return Hub(**options)  # type: ignore[arg-type]


def listed(connection: Hub, **options: object) -> list[str]:
    return [item.id for page in connection.list_adapters(BASE, **options) for item in page.repositories]  # type: ignore[arg-type]


def test_a_listing_in_pages_gives_every_adapter_once_newest_first(fake: FakeHub) -> None:
    fake.page_size = 7
    fake.add_many(30)
    fake.add("bob/of-another-base", base="acme/other")
    fake.add("bob/not-peft", listed=False)
    names = listed(hub())
    assert names == [f"author{n % 10}/lora-{n:04d}" for n in reversed(range(30))]
    assert len(fake.asked) == 5


def test_what_the_listing_says_of_an_adapter(fake: FakeHub) -> None:
    repo = fake.add("alice/sql", downloads=12, likes=3, tags=("text-to-sql", "lora"), licence="mit", gated="auto")
    [([item], _)] = hub().list_adapters(BASE)
    assert (item.commit, item.author, item.base) == (repo.sha, "alice", BASE)
    assert (item.downloads, item.likes, item.licence, item.gated) == (12, 3, "mit", "auto")
    assert set(item.files) == {".gitattributes", CONFIG, WEIGHTS}
    assert "text-to-sql" in item.card


def test_since_stops_asking_for_older_pages(fake: FakeHub) -> None:
    fake.page_size = 5
    fake.add_many(30)
    names = listed(hub(), since="2026-01-01T00:27:00.000Z")
    assert names == ["author9/lora-0029", "author8/lora-0028", "author7/lora-0027"]
    assert len(fake.asked) == 1


def test_limit_stops_the_listing(fake: FakeHub) -> None:
    fake.add_many(30)
    assert len(listed(hub(), limit=4)) == 4
    assert "limit=4" in fake.asked[0].path


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": "no"}', "not a list"),
        (b"<html>log in</html>", "not JSON"),
        (b"[", "not JSON"),
    ],
)
def test_a_page_that_is_no_listing_is_a_network_error(fake: FakeHub, body: bytes, message: str) -> None:
    fake.fail("/api/models?", status=200, body=body, times=9)
    with pytest.raises(NetworkError, match=message):
        listed(hub())


def test_items_of_the_wrong_shape_are_survived(fake: FakeHub) -> None:
    good = '{"_id": "1", "id": "a/b", "sha": "%s", "siblings": [{}, 3, {"rfilename": "x"}], "tags": 5}' % ("a" * 40)
    bad = '3, null, {"id": "c/d"}, {"id": "c/d", "sha": "main"}, {"id": 5, "sha": "%s"}' % ("b" * 40)
    fake.fail("/api/models?", status=200, body=f"[{bad}, {good}, {good}]".encode())
    [([item], _)] = hub().list_adapters(BASE)
    assert (item.id, item.files, item.downloads, item.gated) == ("a/b", ("x",), 0, "")


def test_a_listing_that_links_to_itself_ends_with_an_error(fake: FakeHub) -> None:
    fake.fail("/api/models", status=200, body=b"[]", times=9, headers={"Link": '</api/models?x=1>; rel="next"'})
    with pytest.raises(NetworkError, match="does not end"):
        listed(hub())


def test_a_page_that_is_too_large_for_the_hub_is_asked_for_in_smaller_parts(fake: FakeHub) -> None:
    fake.add_many(300)
    fake.fail("limit=1000", status=504, times=99)
    assert len(listed(hub())) == 300
    assert "limit=200" in fake.asked[-1].path


@pytest.mark.parametrize("kind", ["reset", "truncate", "status"])
def test_what_goes_wrong_once_is_asked_again(fake: FakeHub, kind: str) -> None:
    repo = fake.add("alice/sql")
    for place in ("/resolve/", "/resolve-cache/", "cdn:"):
        fake.fail(place, kind, times=2)
    connection = hub()
    config = connection.read_file("alice/sql", CONFIG, repo.sha, 1000)
    part = connection.read_range("alice/sql", WEIGHTS, repo.sha, 8, 20)
    assert config == repo.files[CONFIG]
    assert part == (repo.files[WEIGHTS][8:20], len(repo.files[WEIGHTS]), sha256(repo.files[WEIGHTS]).hexdigest())


def test_what_goes_wrong_for_good_is_a_network_error(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("/resolve/", status=502, times=99)
    with pytest.raises(NetworkError, match="502"):
        hub().read_file("alice/sql", CONFIG, repo.sha, 1000)
    assert len(fake.asked) == 5


@pytest.mark.slow
def test_a_rate_limit_is_waited_for_as_long_as_the_hub_says_and_the_user_is_told(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("/resolve/", status=429, headers={"RateLimit": '"resolvers";r=0;t=1'})
    told: list[tuple[str, int, int]] = []
    begin = time.monotonic()
    Hub(progress=lambda *step: told.append(step)).read_file("alice/sql", CONFIG, repo.sha, 1000)
    assert 1.9 < time.monotonic() - begin < 5
    assert told
    assert told[0][0].startswith("waiting for the Hub")


def test_a_wait_longer_than_a_rate_window_is_refused_at_once(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("/resolve/", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(NetworkError, match="limits the rate") as caught:
        hub().read_file("alice/sql", CONFIG, repo.sha, 1000)
    assert "4001 s" in caught.value.hint


def test_an_answer_that_spends_the_window_makes_the_next_request_wait(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.answer_headers = {"RateLimit": '"resolvers";r=0;t=0'}
    connection = hub()
    begin = time.monotonic()
    for _ in range(2):
        connection.read_file("alice/sql", CONFIG, repo.sha, 1000)
    assert time.monotonic() - begin > 0.9


@pytest.mark.slow
def test_a_hub_that_stays_silent_is_given_up(fake: FakeHub) -> None:
    fake.add_many(3)
    fake.fail("/api/models?", "silent", seconds=1)
    assert len(listed(hub(silence=0.2))) == 3
    fake.fail("/api/models?", "silent", seconds=1, times=99)
    with pytest.raises(Silent, match="does not answer"):
        listed(hub(silence=0.2))


def test_a_network_that_is_down_is_said_in_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(NetworkError, match="cannot be reached"):
        listed(Hub(nobody))


def test_what_the_hub_refuses_has_a_kind_of_its_own(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    locked = fake.add("alice/locked", gated="manual")
    with pytest.raises(Gated, match="alice/locked is gated"):
        hub().read_file("alice/locked", CONFIG, locked.sha, 1000)
    with pytest.raises(MissingFile):
        hub().read_file("alice/sql", "adapter_model.bin", repo.sha, 1000)
    with pytest.raises(NothingMatched, match="no such repository"):
        hub().read_file("alice/nothing", CONFIG, repo.sha, 1000)
    with pytest.raises(NothingMatched, match="no such commit"):
        hub().read_file("alice/sql", CONFIG, "0" * 40, 1000)
    fake.fail("/api/models?", status=401)
    with pytest.raises(AccessDenied, match="refuses the login"):
        listed(hub())
    with pytest.raises(ValueError, match="not pinned"):
        hub().read_file("alice/sql", CONFIG, "main", 1000)
    assert hub().exists("alice/sql")
    assert not hub().exists("alice/nothing")


def test_a_server_that_ignores_the_range_is_not_read_to_the_end(fake: FakeHub) -> None:
    repo = fake.add("alice/large", {CONFIG: b"{}", WEIGHTS: bytes(30_000_000)})
    fake.fail("cdn:", "no-range")
    connection = hub()
    part = connection.read_range("alice/large", WEIGHTS, repo.sha, 4, 4096)
    assert (len(part.data), part.size) == (4092, 30_000_000)
    assert connection.traffic.bytes < 3_000_000


def test_a_range_other_than_the_one_asked_for_is_refused(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("cdn:", "wrong-range", times=9)
    with pytest.raises(NetworkError, match="another range"):
        hub().read_range("alice/sql", WEIGHTS, repo.sha, 0, 64)


def test_a_range_ends_with_its_file_and_a_file_one_byte_past_its_limit(fake: FakeHub) -> None:
    repo = fake.add("alice/short", {CONFIG: b"{}" * 100, WEIGHTS: b"12345", "empty.safetensors": b""})
    assert hub().read_range("alice/short", WEIGHTS, repo.sha, 0, 4096) == (b"12345", 5, sha256(b"12345").hexdigest())
    assert hub().read_range("alice/short", "empty.safetensors", repo.sha, 0, 4096) == (b"", 0, sha256(b"").hexdigest())
    assert len(hub().read_file("alice/short", CONFIG, repo.sha, 50)) == 51


def test_the_token_goes_to_the_hub_and_nowhere_else(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo = fake.add("alice/sql")
    with FakeHub() as stranger:
        stranger.add_many(2)
        next_page = f'<{stranger.endpoint}/api/models?limit=5>; rel="next"'
        fake.fail("/api/models?", status=200, body=b"[]", headers={"Link": next_page})
        connection = hub()
        listed(connection)
        connection.read_range("alice/sql", WEIGHTS, repo.sha, 0, 64)
        connection.download("alice/sql", WEIGHTS, repo.sha)
        assert stranger.asked
        elsewhere = [*stranger.asked, *(a for a in fake.asked if a.server == "cdn")]
    at_home = [a for a in fake.asked if a.server == "hub"]
    assert all(TOKEN in a.headers["authorization"] for a in at_home)
    assert len(elsewhere) >= 3
    assert not any(name == "authorization" or TOKEN in value for a in elsewhere for name, value in a.headers.items())


def test_no_error_quotes_the_token(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    repo = fake.add("alice/sql")
    for status in (400, 401, 403, 404, 429, 500):
        fake.fail("/resolve/", status=status, times=5, body=f'{{"error": "{TOKEN}"}}'.encode())
        with pytest.raises(LoraError) as caught:
            hub().read_file("alice/sql", CONFIG, repo.sha, 1000)
        assert TOKEN not in caught.value.message + caught.value.hint
    assert TOKEN not in "".join(capfd.readouterr())


def test_requests_and_bytes_are_those_that_the_server_saw(fake: FakeHub) -> None:
    fake.add_many(20)
    connection = hub()
    for page in connection.list_adapters(BASE):
        for item in page.repositories:
            connection.read_file(item.id, CONFIG, item.commit, 10_000)
    assert connection.traffic.requests == len(fake.asked) == 41
    assert abs(connection.traffic.bytes - fake.bytes_sent) <= 41 * 4


def test_a_budget_of_requests_is_kept(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    connection = hub(budget=3)
    connection.read_file("alice/sql", CONFIG, repo.sha, 1000)
    # The second hop of the second question would be the fourth request.
    for _ in range(2):
        with pytest.raises(Partial, match="budget of 3 requests"):
            connection.read_file("alice/sql", CONFIG, repo.sha, 1000)
    assert len(fake.asked) == connection.traffic.requests == 3


def test_a_download_lands_in_the_clients_cache_and_is_not_repeated(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    assert cached_file("alice/sql", WEIGHTS, repo.sha) is None
    path = hub().download("alice/sql", WEIGHTS, repo.sha)
    assert path.read_bytes() == repo.files[WEIGHTS]
    assert cached_file("alice/sql", WEIGHTS, repo.sha) == path
    fake.forget()
    assert hub().download("alice/sql", WEIGHTS, repo.sha) == path
    assert hub().download("alice/sql", CONFIG, repo.sha).read_bytes() == repo.files[CONFIG]
    assert not fake.paths(WEIGHTS)


@pytest.mark.parametrize("revision", ["main", "", "v9", "..", "../../../other", "/"])
@pytest.mark.parametrize("repo", ["alice/sql", "alice/none", "gpt2"])
def test_the_cache_holds_what_the_clients_library_finds_there(fake: FakeHub, repo: str, revision: str) -> None:
    commit = fake.add("alice/sql").sha
    path = hub().download("alice/sql", CONFIG, commit)
    (path.parents[2] / "refs").mkdir(exist_ok=True)
    (path.parents[2] / "refs" / "main").write_text(commit)
    found = try_to_load_from_cache(repo, CONFIG, cache_dir=cache_folder(), revision=revision or commit)
    assert cached_file(repo, CONFIG, revision or commit) == (Path(found) if isinstance(found, str) else None)
    with pytest.raises(LoraError):
        cached_file("alice/../sql", CONFIG, commit)


def test_bytes_of_the_right_length_but_the_wrong_hash_are_fetched_again(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("cdn:", "corrupt")
    assert hub().download("alice/sql", WEIGHTS, repo.sha).read_bytes() == repo.files[WEIGHTS]


def test_bytes_that_stay_wrong_do_not_stay_in_the_cache(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("cdn:", "corrupt", times=9)
    with pytest.raises(NetworkError, match="hash"):
        hub().download("alice/sql", WEIGHTS, repo.sha)
    assert cached_file("alice/sql", WEIGHTS, repo.sha) is None
    plain = fake.add("alice/plain", {**lora_files(), "notes.txt": b"plain text"})
    fake.fail("/resolve-cache/", "corrupt", times=9)
    with pytest.raises(NetworkError, match="hash"):
        hub().download("alice/plain", "notes.txt", plain.sha)


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_a_broken_download_is_taken_up_again(fake: FakeHub, kind: str) -> None:
    repo = fake.add("alice/sql", {CONFIG: b"{}", WEIGHTS: bytes(range(256)) * 4000})
    fake.fail("cdn:", kind)
    assert hub().download("alice/sql", WEIGHTS, repo.sha).read_bytes() == repo.files[WEIGHTS]


def test_offline_mode_sends_nothing(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = fake.add("alice/sql")
    path = hub().download("alice/sql", WEIGHTS, repo.sha)
    fake.forget()
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(NetworkError, match="offline"):
        listed(hub())
    assert cached_file("alice/sql", WEIGHTS, repo.sha) == path
    assert not fake.asked


def test_stopping_ends_a_long_wait(fake: FakeHub) -> None:
    repo = fake.add("alice/sql")
    fake.fail("/resolve/", status=429, headers={"RateLimit": '"resolvers";r=0;t=200'})
    connection = Hub(progress=lambda *step: connection.stop())
    with pytest.raises(NetworkError, match="stopped"):
        connection.read_file("alice/sql", CONFIG, repo.sha, 1000)
