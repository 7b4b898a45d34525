"""The only door to the Hugging Face Hub: list adapters, read parts of files, download one, find one in the cache.

Every request goes through huggingface_hub's own session (its login, proxy and offline rules); this module adds time
limits, capped waits, a count of requests and bytes, and turns failures into this tool's errors.
"""

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

from lora_cli.errors import AccessDenied, NetworkError, NothingMatched, OutputError, Partial, UsageError
from lora_cli.hashes import file_sha256
from lora_cli.records import Progress, silent

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

# The listing takes any subset of properties; the catalogue needs only these.
_EXPAND = (
    "author",
    "cardData",
    "config",
    "createdAt",
    "disabled",
    "downloads",
    "gated",
    "lastModified",
    "likes",
    "pipeline_tag",
    "private",
    "sha",
    "siblings",
    "tags",
)
_PAGE_SIZES = (1000, 200, 40)  # ask again for smaller pages if the Hub times out
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_TRIES = 5
_LONGEST_WAIT = 330.0  # the Hub's rate windows last 300 s
_SILENCE_SECONDS = 30.0
_WHOLE_READ_SECONDS = 300.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class MissingFile(NothingMatched):
    """The repository exists, but not this file in it."""


class Gated(AccessDenied):
    """The repository shows its files only to users with the owner's permission."""


class Overloaded(NetworkError):
    """The Hub did not answer in time or failed while it answered: asking for less may help."""


class BudgetSpent(Partial):
    """The number of requests allowed for this piece of work is used up."""


class Traffic(NamedTuple):
    """Requests sent (each hop of a redirect counts) and bytes received (heads and bodies, as they are on the wire)."""

    requests: int
    bytes: int


class Part(NamedTuple):
    """Some bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


class FileFacts(NamedTuple):
    """The Hub's facts about a file: `oid` is its SHA-256 (64 hex digits), or outside LFS a git blob's SHA-1 (40)."""

    oid: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One repository as a listing shows it; `files` are names only. `base` is declared by its card or config."""

    hub_id: str
    id: str
    author: str
    commit: str
    files: tuple[str, ...]
    base: str
    licence: str
    card: str
    downloads: int
    likes: int
    gated: str
    disabled: bool
    created_at: str
    modified_at: str


class Hub:
    """A connection to one Hub.

    Args:
        endpoint: default HF_ENDPOINT, else https://huggingface.co.
        progress: called during every wait longer than a second.
        budget: the most requests that this object may send, None for no limit; BudgetSpent is raised beyond.
        first_wait: seconds before the first retry of a failed request; doubled each time.
        silence: seconds without data before a request times out; None for the usual half a minute.
        tries: the most attempts per request.
    """

    def __init__(
        self,
        endpoint: str = "",
        *,
        progress: Progress = silent,
        budget: int | None = None,
        first_wait: float = 1.0,
        silence: float | None = None,
        tries: int = _TRIES,
    ) -> None:
        from huggingface_hub import constants

        _client()
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        _trusted.add(_origin(self.endpoint))
        self._progress = progress
        self._budget = budget
        self._first_wait = first_wait
        self._silence = _SILENCE_SECONDS if silence is None else silence
        self._tries = tries
        self._start = _meter.reading()
        self._stopped = threading.Event()
        self._pause_until = 0.0

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes since this object was made."""
        now = _meter.reading()
        return Traffic(now.requests - self._start.requests, now.bytes - self._start.bytes)

    def stop(self) -> None:
        """End every wait of every thread: the current request becomes the last one."""
        self._stopped.set()

    def list_adapters(self, base: str, *, since: str = "", limit: int | None = None) -> Iterator[list[Listed]]:
        """The repositories tagged as PEFT adapters of `base`, newest first, one page at a time.

        A repeated repository is yielded once; a page that may cut the listing short raises.

        Args:
            base: the base model's Hub id.
            since: skip (and do not request) repositories created before this ISO time.
            limit: the most repositories to list.
        """
        query: list[tuple[str, Any]] = [("filter", f"base_model:adapter:{base}"), ("filter", "peft")]
        query += [("sort", "createdAt"), *(("expand", name) for name in _EXPAND)]
        query.append(("limit", min(limit or _PAGE_SIZES[0], _PAGE_SIZES[0])))
        url = f"{self.endpoint}/api/models?{urlencode(query)}"
        asked: set[str] = set()
        seen: set[str] = set()
        while url:
            if url in asked:
                raise NetworkError(f"the listing of {base} goes round in circles", hint="rerun later")
            asked.add(url)
            items, url = self._page(url, f"the listing of {base}")
            page = []
            for item in map(_listed, items):
                if item is None or item.hub_id in seen:
                    continue
                if since and item.created_at and item.created_at < since:
                    url = ""
                    break
                seen.add(item.hub_id)
                page.append(item)
                if limit is not None and len(seen) >= limit:
                    url = ""
                    break
            yield page

    def repository(self, repo: str, revision: str = "") -> Listed:
        """The listing's entry for one repository at a branch, tag or whole commit, "" for its main branch."""
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        query = urlencode([("expand", name) for name in _EXPAND])
        item, _ = self._get(f"{self.endpoint}/api/models/{repo}{at}?{query}", repo, _json_page)
        listed = _listed(item)
        if listed is None or (_COMMIT.fullmatch(revision) and listed.commit != revision):
            raise NetworkError(
                f"{repo}: the Hub answered with another repository or revision", hint="check HF_ENDPOINT"
            )
        return listed

    def exists(self, repo: str) -> bool:
        """False if the repository does not exist on the Hub (any more)."""
        try:
            self._get(f"{self.endpoint}/api/models/{repo}?expand=sha", repo, _text)
        except Gated:
            return True
        except NothingMatched:
            return False
        return True

    def read_newest(self, repo: str, filename: str, limit: int, revision: str) -> bytes:
        """The whole of a small file on a branch, by one request; of one longer than `limit`, `limit + 1` bytes.

        For display only, never for records: the commit is not known.
        """
        url = f"{self.endpoint}/{quote(repo)}/resolve/{quote(revision, safe='')}/{quote(filename)}"
        return self._get(url, repo, lambda r: _collect(r, limit + 1))

    def read_file(self, repo: str, filename: str, commit: str, limit: int) -> bytes:
        """The whole of a small file. Of one longer than `limit`, `limit + 1` bytes, so that the caller can tell."""
        return self._get(self._url(repo, filename, commit), repo, lambda r: _collect(r, limit + 1))

    def read_range(self, repo: str, filename: str, commit: str, begin: int, end: int) -> Part:
        """Bytes `begin` to `end` (exclusive) of a file, fewer if it ends before, and its size.

        A server that ignores the range is not read past `end`.
        """
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        return self._get(
            self._url(repo, filename, commit), repo, lambda r: _collect_range(r, begin, end), headers, allowed=(416,)
        )

    def file_facts(self, repo: str, filename: str, commit: str) -> FileFacts:
        """Content hash and size of a file, without reading it."""
        from huggingface_hub import get_hf_file_metadata

        def ask(_: "httpx2.Client") -> FileFacts:
            facts = get_hf_file_metadata(self._url(repo, filename, commit), endpoint=self.endpoint)
            return FileFacts(facts.etag or "", facts.size or 0)

        return self._attempts(repo, ask)

    def download(self, repo: str, filename: str, commit: str) -> Path:
        """A file in the Hub client's cache, downloaded if missing, its bytes checked against the Hub's hash.

        Bytes that do not match are removed from the cache and fetched once more. Raises NetworkError if they still
        do not match, OutputError if the disk is full, and the errors of every request.
        """
        from huggingface_hub import hf_hub_download

        for again in (False, True):

            def fetch(_: "httpx2.Client", force: bool = again) -> Path:
                return Path(
                    hf_hub_download(
                        repo,
                        filename,
                        revision=commit,
                        cache_dir=cache_folder(),
                        endpoint=self.endpoint,
                        force_download=force,
                        **_identity(),
                    )
                )

            path = self._attempts(repo, fetch)
            # The cache names a blob by its hash, so no request is needed; without links, ask the Hub for the hash.
            linked = path.readlink().name if path.is_symlink() else ""
            oid = linked if _OID.fullmatch(linked) else self.file_facts(repo, filename, commit).oid
            if not _OID.fullmatch(oid) or content_oid(path, sha1=len(oid) == 40) == oid:
                return path
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise NetworkError(f"{repo}/{filename}: the bytes received do not match the Hub's hash", hint="rerun later")

    def _url(self, repo: str, filename: str, commit: str) -> str:
        from huggingface_hub import hf_hub_url

        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"not pinned to a commit: {commit!r}")
        with _translated(repo):
            return hf_hub_url(repo, filename, revision=commit, endpoint=self.endpoint)

    def _page(self, url: str, what: str) -> tuple[list[Any], str]:
        for size in _PAGE_SIZES:
            try:
                items, following = self._get(_with_limit(url, size), what, _json_page)
                break
            except Overloaded:
                if size == _PAGE_SIZES[-1] or self._stopped.is_set():
                    raise
        if not isinstance(items, list):
            raise NetworkError(f"{what}: the Hub's answer is not a list", hint="check HF_ENDPOINT")
        return items, following

    def _get(
        self,
        url: str,
        what: str,
        read: "Callable[[httpx2.Response], T]",
        headers: Mapping[str, str] | None = None,
        allowed: tuple[int, ...] = (),
    ) -> T:
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils._headers import build_hf_headers
        from huggingface_hub.utils._http import hf_raise_for_status

        def ask(client: "httpx2.Client") -> T:
            sent = {**build_hf_headers(**_identity()), **(headers or {})}
            with client.stream("GET", url, headers=sent, timeout=self._silence) as response:
                self._obey(response)
                if response.status_code not in allowed:
                    try:
                        hf_raise_for_status(response)
                    except (AttributeError, TypeError) as error:  # an error page whose JSON is not an object
                        raise HfHubHTTPError(f"status {response.status_code}", response=response) from error
                return read(response)

        return self._attempts(what, ask)

    def _attempts(self, what: str, ask: "Callable[[httpx2.Client], T]") -> T:
        """Call `ask` until it succeeds, fails for a permanent reason, or the attempts are used up."""
        import httpx2
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        transport = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
        with _translated(what):
            wait = 0.0
            for attempt in range(1, _TRIES + 1):
                self._hold(wait)
                wait = self._first_wait * 2 ** (attempt - 1)
                try:
                    return ask(get_session())
                except (*transport, LocalEntryNotFoundError, HfHubHTTPError) as error:
                    response = error.response if isinstance(error, HfHubHTTPError) else None
                    if response is not None and response.status_code not in _RETRIED:
                        raise
                    # Do not retry an unknown host: it stays unknown.
                    tries = 3 if isinstance(error, httpx2.ConnectError) else _TRIES
                    if attempt >= min(tries, self._tries) or self._stopped.is_set():
                        raise
                    if response is not None and response.status_code == 429:
                        # The limit applies to the account, so every thread waits.
                        pause = self._asked_wait(response, what) or wait
                        self._pause_until = max(self._pause_until, time.monotonic() + pause)
        raise AssertionError("unreachable")

    def _hold(self, wait: float) -> None:
        """Wait as long as the Hub asks, reporting progress; then check the budget for another request."""
        begin = time.monotonic()
        while (left := max(self._pause_until, begin + wait) - time.monotonic()) > 0:
            if self._stopped.wait(min(left, 1.0)):
                break
            elapsed = time.monotonic() - begin
            if elapsed >= 1.0:
                self._progress("waiting for the Hub, seconds", int(elapsed), int(elapsed + left) + 1)
        if self._stopped.is_set():
            raise NetworkError("stopped", hint="rerun to continue")
        if self._budget is not None and self.traffic.requests >= self._budget:
            raise BudgetSpent(f"the budget of {self._budget} requests is spent", hint="rerun to continue")

    def _asked_wait(self, response: "httpx2.Response", what: str) -> float | None:
        from huggingface_hub.utils._http import parse_ratelimit_headers

        limits = parse_ratelimit_headers(response.headers)
        seconds: float | None = None
        if limits is not None and limits.remaining == 0:
            seconds = limits.reset_in_seconds + 1.0
        elif response.headers.get("retry-after", "").strip().isdigit():
            seconds = float(response.headers["retry-after"]) + 1.0
        if seconds is not None and seconds > _LONGEST_WAIT:
            raise NetworkError(f"{what}: the Hub limits the rate", hint=f"rerun in {seconds:.0f} s")
        return seconds

    def _obey(self, response: "httpx2.Response") -> None:
        """If an answer shows that the rate window is used up, pause before the next request, which would be refused."""
        from huggingface_hub.utils._http import parse_ratelimit_headers

        for hop in (*response.history, response):
            limits = parse_ratelimit_headers(hop.headers)
            if hop.status_code < 400 and limits is not None and limits.remaining == 0:
                wait = min(limits.reset_in_seconds + 1.0, _LONGEST_WAIT)
                self._pause_until = max(self._pause_until, time.monotonic() + wait)


def cache_folder() -> Path:
    """The Hub client's own cache: HF_HUB_CACHE, else HF_HOME/hub, else its default."""
    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("HF_HOME"):
        return Path(folder).expanduser() / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_file(repo: str, filename: str, commit: str = "main") -> Path | None:
    """The path of a file at a commit in the Hub client's cache; None if it is not there. Sends nothing.

    "main" is the commit that the cache last saw under that name: for display only, never for records.
    """
    from huggingface_hub import try_to_load_from_cache

    with _translated(repo):
        found = try_to_load_from_cache(repo, filename, cache_dir=cache_folder(), revision=commit)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def login_mark() -> str:
    """A text that differs between logins and without one, and reveals nothing about the token."""
    from huggingface_hub import get_token

    token = get_token()
    return hashlib.sha256(token.encode()).hexdigest()[:8] if token else ""


def content_oid(path: Path, *, sha1: bool = False) -> str:
    """The Hub's hash of these bytes: SHA-256, or with `sha1` the git blob's SHA-1."""
    if not sha1:
        return file_sha256(path)
    digest = hashlib.sha1(b"blob %d\x00" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class _Meter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._bytes = 0

    def add(self, *, requests: int = 0, received: int = 0) -> None:
        with self._lock:
            self._requests += requests
            self._bytes += received

    def reading(self) -> Traffic:
        with self._lock:
            return Traffic(self._requests, self._bytes)


_meter = _Meter()
_trusted: set[tuple[str, str, int]] = set()


@functools.cache
def _identity() -> Mapping[str, Any]:
    """The user agent of this tool."""
    try:
        version = importlib.metadata.version("lora-cli")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return {"library_name": "lora", "library_version": version}


@functools.cache
def _client() -> None:
    """Give huggingface_hub a session with time limits, a meter and a guard on the token, once per process."""
    import httpx2
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Silence its warnings: they repeat ours, and quote headers from the server.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        disable_progress_bars()
    _trusted.add(_origin(constants.ENDPOINT))
    # Stop huggingface_hub from sending telemetry (installed packages) before our first request.
    constants.HF_HUB_DISABLE_TELEMETRY = True

    class Counted(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for block in self._stream:
                _meter.add(received=len(block))
                yield block

        def close(self) -> None:
            self._stream.close()

    def before(request: httpx2.Request) -> None:
        limits = request.extensions.setdefault("timeout", {})
        # Set time limits: a silent server must not block for ever, and the client's own requests have none.
        for kind in ("connect", "read", "write", "pool"):
            if limits.get(kind) is None:
                limits[kind] = _SILENCE_SECONDS
        if _origin(str(request.url)) not in _trusted:
            request.headers.pop("authorization", None)
        _meter.add(requests=1)

    def after(response: httpx2.Response) -> None:
        head = sum(len(name) + len(value) + 4 for name, value in response.headers.raw)
        _meter.add(received=head + len(response.reason_phrase) + 17)
        if isinstance(response.stream, httpx2.SyncByteStream):
            response.stream = Counted(response.stream)

    def make() -> httpx2.Client:
        return httpx2.Client(
            event_hooks={"request": [hf_request_event_hook, before], "response": [after]},
            follow_redirects=True,
            timeout=_SILENCE_SECONDS,
        )

    set_client_factory(make)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"https": 443}.get(parts.scheme, 80)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Every exception of the client and its transport, as one of this tool's."""
    import httpx2
    from huggingface_hub import errors as theirs

    try:
        yield
    except theirs.OfflineModeIsEnabled as error:
        raise NetworkError(f"{what}: offline mode is on", hint="unset HF_HUB_OFFLINE") from error
    except theirs.GatedRepoError as error:
        raise Gated(
            f"{what} is gated", hint=f"ask for access on its page (huggingface.co/{what}), then `hf auth login`"
        ) from error
    except theirs.RemoteEntryNotFoundError as error:
        raise MissingFile(f"{what}: no such file at this commit") from error
    except theirs.RevisionNotFoundError as error:
        raise NothingMatched(
            f"{what}: no such commit, branch or tag on the Hub", hint="give all 40 digits of a commit"
        ) from error
    except theirs.DisabledRepoError as error:
        raise NothingMatched(f"{what}: disabled by the Hub") from error
    except theirs.RepositoryNotFoundError as error:
        raise NothingMatched(
            f"{what}: no such repository on the Hub, or a private one", hint="check `hf auth whoami`"
        ) from error
    except theirs.HFValidationError as error:
        raise UsageError(f"{what}: not a repository id") from error
    except theirs.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise AccessDenied(f"{what}: the Hub refuses the login ({status})", hint="hf auth login") from error
        if status == 404:
            raise NothingMatched(f"{what}: not found on the Hub") from error
        if status == 429:
            raise NetworkError(f"{what}: the Hub limits the rate", hint="rerun later") from error
        kind = Overloaded if status >= 500 else NetworkError
        raise kind(f"{what}: the Hub answers {status}", hint="rerun later") from error
    except httpx2.TimeoutException as error:
        raise Overloaded(f"{what}: the Hub does not answer", hint="check the network, then rerun") from error
    except (theirs.LocalEntryNotFoundError, theirs.FileMetadataError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        reason = _transport_reason(error)
        raise NetworkError(f"{what}: {reason}", hint="check the network and HF_ENDPOINT, then rerun") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{what}: the disk is full", hint="free some space, then rerun") from error
        if "Consistency check failed" in str(error):
            raise NetworkError(f"{what}: the file arrived incomplete", hint="rerun") from error
        if error.filename is not None:
            raise OutputError(f"{error.filename}: {error.strerror}", hint="check HF_HOME") from error
        raise


def _transport_reason(error: BaseException) -> str:
    import httpx2

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, httpx2.TimeoutException):
            return "the Hub does not answer"
        if isinstance(seen, httpx2.ConnectError):
            return "the Hub cannot be reached"
        seen = seen.__cause__ or seen.__context__
    return "the connection to the Hub broke"


def _text(response: "httpx2.Response") -> bytes:
    return _collect(response, 1_000_000)


def _json_page(response: "httpx2.Response") -> tuple[Any, str]:
    body = _collect(response, 200_000_000)
    try:
        items = json.loads(body)
    except ValueError as error:
        raise NetworkError("the Hub's answer is not JSON", hint="check HF_ENDPOINT and proxies") from error
    following = response.links.get("next", {}).get("url", "")
    return items, str(response.url.join(following)) if following else ""


def _collect(response: "httpx2.Response", limit: int) -> bytes:
    """At most `limit` bytes of the decoded body; the rest is not read."""
    deadline = time.monotonic() + _WHOLE_READ_SECONDS
    body = bytearray()
    for block in response.iter_bytes():
        body += block
        if len(body) >= limit:
            break
        if time.monotonic() > deadline:
            raise NetworkError("the Hub sends too slowly", hint="rerun later")
    return bytes(body[:limit])


def _collect_range(response: "httpx2.Response", begin: int, end: int) -> Part:
    if response.status_code == 416:
        whole = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", ""))
        return Part(b"", int(whole[1]) if whole else 0)
    if response.status_code != 206:
        size_text = response.headers.get("content-length", "")
        body = _collect(response, end)
        # Without a length, a body shorter than `end` is the whole file.
        size = int(size_text) if size_text.isdigit() else len(body)
        return Part(body[begin:], size)
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""))
    if stated is None or int(stated[1]) != begin or not begin <= int(stated[2]) < int(stated[3]):
        raise NetworkError("the Hub answers with another range than the one asked for", hint="rerun later")
    return Part(_collect(response, min(end, int(stated[3])) - begin), int(stated[3]))


def _with_limit(url: str, size: int) -> str:
    """`url` with a page size of at most `size`."""
    parts = urlsplit(url)
    query = re.sub(r"(^|&)limit=(\d+)", lambda m: f"{m[1]}limit={min(int(m[2]), size)}", parts.query)
    return urlunsplit(parts._replace(query=query))


def _listed(item: Any) -> Listed | None:
    """A listing's item; any property may be absent or of another type. None without an id and a commit."""
    if not isinstance(item, Mapping):
        return None
    name, commit = _str(item.get("id")), _str(item.get("sha"))
    if not name or not _COMMIT.fullmatch(commit):
        return None
    card = _mapping(item.get("cardData"))
    peft = _mapping(_mapping(item.get("config")).get("peft"))
    base = card.get("base_model")
    if isinstance(base, list):
        base = base[0] if base else ""
    gated = item.get("gated")
    return Listed(
        hub_id=_str(item.get("_id")) or name,
        id=name,
        author=_str(item.get("author")) or name.partition("/")[0],
        commit=commit,
        files=tuple(filter(None, (_str(_mapping(file).get("rfilename")) for file in _list(item.get("siblings"))))),
        base=_str(peft.get("base_model_name_or_path")) or _str(base),
        licence=_licence(card, item.get("tags")),
        card=_card_text(card, item),
        downloads=_int(item.get("downloads")),
        likes=_int(item.get("likes")),
        gated=gated if isinstance(gated, str) else ("yes" if gated else ""),
        disabled=item.get("disabled") is True,
        created_at=_str(item.get("createdAt")),
        modified_at=_str(item.get("lastModified")),
    )


def _licence(card: Mapping[str, Any], tags: Any) -> str:
    licence = card.get("license")
    if isinstance(licence, list):
        licence = licence[0] if licence else ""
    if _str(licence) == "other":
        return _str(card.get("license_name")) or "other"
    if _str(licence):
        return _str(licence)
    named = [_str(tag) for tag in _list(tags) if _str(tag).startswith("license:")]
    return named[0].removeprefix("license:") if named else ""


def _card_text(card: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """The listing's text about an adapter, for the full-text search: card metadata and tags, no README."""
    words = []
    for key in ("model_name", "tags", "datasets", "language", "pipeline_tag"):
        value = card.get(key)
        words += [_str(v) for v in value] if isinstance(value, list) else [_str(value)]
    words += [_str(tag) for tag in _list(item.get("tags"))]
    words.append(_str(item.get("pipeline_tag")))
    return " ".join(dict.fromkeys(word for word in words if word))[:20_000]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _str(value: Any) -> str:
    # JSON can hold half a surrogate pair, which neither a database nor a terminal accepts.
    return value[:2_000].encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else ""


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62 else 0
