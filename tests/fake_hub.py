"""A stand-in for the Hugging Face Hub on 127.0.0.1: what the real client needs to list, read and download adapters.

Two ports: the Hub itself, and a second one as the CDN to which LFS files are redirected. Everything asked is recorded.
"""

import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

from tests.fake_files import BASE, lora_files
from tests.fake_uploads import Uploads, answer_upload, details, receive
from tests.faults import ANSWERS, Fault, RandomFaults

LISTING_PROPERTIES = {
    "author",
    "cardData",
    "config",
    "createdAt",
    "disabled",
    "downloads",
    "downloadsAllTime",
    "evalResults",
    "gated",
    "gguf",
    "inference",
    "inferenceProviderMapping",
    "lastModified",
    "library_name",
    "likes",
    "mask_token",
    "model-index",
    "pipeline_tag",
    "private",
    "safetensors",
    "sha",
    "siblings",
    "spaces",
    "tags",
    "transformersInfo",
    "trendingScore",
    "widgetData",
    "resourceGroup",
}


@dataclass
class Repo:
    """A repository of the stand-in; `files` may be changed with `commit`, `names` maps branches and tags to commits.

    `raw` holds JSON texts that the listing shows in place of properties.
    """

    id: str
    files: dict[str, bytes]
    base: str = BASE
    created: datetime = field(default_factory=lambda: datetime(2026, 1, 1, tzinfo=UTC))
    downloads: int = 0
    likes: int = 0
    licence: str = "apache-2.0"
    tags: tuple[str, ...] = ()
    gated: str | bool = False
    listed: bool = True
    hub_id: str = ""
    private: bool = False
    sha: str = ""
    versions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hub_id = self.hub_id or hashlib.md5(self.id.encode()).hexdigest()[:24]
        self.commit()

    def commit(self, **files: bytes) -> None:
        """Replace files (`adapter_config__json=…`) and move on to a new commit."""
        self.files |= {name.replace("__", "."): data for name, data in files.items()}
        digest = hashlib.sha1(self.id.encode() + self.sha.encode())
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + data)
        self.sha = digest.hexdigest()
        self.versions[self.sha] = dict(self.files)

    def at(self, revision: str) -> str:
        """The commit of a branch, tag or whole commit, "" if there is none."""
        commit = self.sha if revision == "main" else self.names.get(revision, revision)
        return commit if commit in self.versions else ""

    def is_lfs(self, name: str) -> bool:
        return name.endswith((".safetensors", ".bin"))

    def item(self, expand: Sequence[str], commit: str = "") -> dict[str, Any]:
        stamp = self.created.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        everything = {
            "author": self.id.partition("/")[0],
            "cardData": {"base_model": self.base, "license": self.licence, "tags": list(self.tags)},
            "config": {"peft": {"base_model_name_or_path": self.base, "task_type": "CAUSAL_LM"}},
            "createdAt": stamp,
            "disabled": False,
            "downloads": self.downloads,
            "gated": self.gated,
            "lastModified": stamp,
            "library_name": "peft",
            "likes": self.likes,
            "pipeline_tag": "text-generation",
            "private": self.private,
            "sha": commit or self.sha,
            "siblings": [{"rfilename": name} for name in (".gitattributes", *self.versions[commit or self.sha])],
            "tags": ["peft", "safetensors", f"base_model:adapter:{self.base}", *self.tags, f"license:{self.licence}"],
        }
        return {"_id": self.hub_id, "id": self.id, "modelId": self.id} | {
            name: value for name, value in everything.items() if name in expand
        }

    def text(self, expand: Sequence[str]) -> str:
        """The item as the listing shows it."""
        item = {name: value for name, value in self.item(expand).items() if name not in self.raw}
        raw = "".join(f', "{name}": {text}' for name, text in self.raw.items() if name in expand)
        return f"{json.dumps(item)[:-1]}{raw}}}"


@dataclass
class Asked:
    """One request as it arrived."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]


class FakeHub:
    """The stand-in; use as a context manager. `endpoint` is what HF_ENDPOINT should be."""

    def __init__(self, page_size: int = 1000) -> None:
        self.page_size = page_size
        self.repos: dict[str, Repo] = {}
        self.renamed: dict[str, str] = {}
        self.asked: list[Asked] = []
        self.bytes_sent = 0
        self.delay = 0.0
        self.redirects = True
        self.answer_headers: dict[str, str] = {}
        self.random_faults: RandomFaults | None = None
        self.closed = threading.Event()
        self.uploads = Uploads()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [self._serve("hub"), self._serve("cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def _serve(self, role: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "role": role})
        server = _Server(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, id: str, files: dict[str, bytes] | None = None, **facts: Any) -> Repo:
        repo = Repo(id, lora_files() if files is None else files, **facts)
        self.repos[id] = repo
        return repo

    def add_many(self, count: int) -> None:
        """`count` adapters of ranks 2, 4, 8 and 16 by ten authors."""
        pool = [lora_files(rank=rank) for rank in (2, 4, 8, 16)]
        for n in range(count):
            start = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=n)
            self.add(f"author{n % 10}/lora-{n:04d}", dict(pool[n % 4]), created=start, downloads=n, likes=n % 7)

    def rename(self, old: str, new: str) -> None:
        repo = self.repos.pop(old)
        repo.id = new
        self.repos[new] = repo
        self.renamed[old] = new

    def fail(self, match: str, kind: str = "status", times: int = 1, **facts: Any) -> None:
        """Make requests go wrong in one of the ways of `faults.KINDS`."""
        self._faults.append(Fault(match, kind, times, **facts))

    def heal(self) -> None:
        """Let nothing go wrong any more."""
        with self._lock:
            self._faults.clear()
            self.random_faults = None

    def forget(self) -> None:
        """Start counting anew."""
        with self._lock:
            self.asked.clear()
            self.bytes_sent = 0

    def paths(self, match: str = "", server: str = "") -> list[str]:
        return [a.path for a in list(self.asked) if match in a.path and server in a.server]

    def _fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.match in path:
                    fault.times -= 1
                    return fault
            return self.random_faults.next(path) if self.random_faults else None


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    role: str
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        hub = self.hub
        path = unquote(urlsplit(self.path).path)
        with hub._lock:
            hub.asked.append(Asked(self.role, self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.delay:
            time.sleep(hub.delay)
        self.fault = hub._fault(f"{self.role}:{self.path}")
        writes = self.command in ("POST", "PUT")
        if writes and not receive(self):
            return None
        if self.fault and self.fault.kind in ANSWERS:
            return ANSWERS[self.fault.kind](self, self.fault)
        if writes:
            return answer_upload(self, path)
        if self.role == "cdn":
            return self.cdn(path)
        if path == "/api/models":
            return self.listing()
        if found := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            repo = hub.repos[found[1]]
            return self.content(repo.versions[found[2]][found[3]], self.file_headers(repo, found[2], found[3]))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(found[1], found[2], found[3])
        return self.answer(404, b"{}")

    do_HEAD = do_POST = do_PUT = do_GET

    def listing(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        expand = query.get("expand", [])
        if unknown := set(expand) - LISTING_PROPERTIES:
            return self.answer(400, json.dumps({"error": f"unknown {sorted(unknown)}"}).encode())
        wanted = set(query.get("filter", []))
        repos = [
            repo for repo in self.hub.repos.values()
            if repo.listed
            and wanted <= {"peft", f"base_model:adapter:{repo.base}", *repo.tags}
            and query.get("author", [repo.id.partition("/")[0]])[0] == repo.id.partition("/")[0]
            and query.get("search", [""])[0] in repo.id
        ]  # fmt: skip
        repos.sort(key=lambda repo: (repo.created, repo.id), reverse=True)
        size = min(int(query.get("limit", ["1000"])[0]), self.hub.page_size)
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + size < len(repos):
            following = urlencode({**query, "cursor": start + size}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}/api/models?{following}>; rel="next"'
        body = f"[{', '.join(repo.text(expand) for repo in repos[start : start + size])}]".encode()
        headers["Content-Type"] = "application/json"
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, 6)
            headers["Content-Encoding"] = "gzip"
        return self.answer(200, body, headers)

    def info(self, name: str, revision: str) -> None:
        if name in self.hub.renamed:
            return self.answer(307, b"", {"Location": f"/api/models/{quote(self.hub.renamed[name])}"})
        if name not in self.hub.repos or not self.hub.uploads.sees(self, self.hub.repos[name]):
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.repos[name].at(revision)
        if not commit:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        query = parse_qs(urlsplit(self.path).query)
        if "blobs" in query:
            return self.answer(200, json.dumps(details(self.hub.repos[name], commit)).encode())
        return self.answer(200, json.dumps(self.hub.repos[name].item(query.get("expand", []), commit)).encode())

    def resolve(self, name: str, revision: str, file: str) -> None:
        if name in self.hub.renamed:
            return self.answer(307, b"", {"Location": f"/{quote(self.hub.renamed[name])}/resolve/{revision}/{file}"})
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if repo.gated:
            status = 403 if "Authorization" in self.headers else 401
            return self.answer(status, b"{}", {"X-Error-Code": "GatedRepo"})
        commit = repo.at(revision)
        if not commit:
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if file not in repo.versions[commit]:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = self.file_headers(repo, commit, file)
        if not self.hub.redirects:
            return self.content(repo.versions[commit][file], headers)
        if repo.is_lfs(file):
            headers["Location"] = f"{self.hub.cdn}/{repo.id}/{commit}/{quote(file)}?signature=abc"
            return self.answer(302, b"", headers)
        headers["Location"] = f"/api/resolve-cache/models/{quote(repo.id)}/{commit}/{quote(file)}"
        return self.answer(307, b"", headers)

    def cdn(self, path: str) -> None:
        owner, name, commit, file = path.lstrip("/").split("/", 3)
        return self.content(self.hub.repos[f"{owner}/{name}"].versions[commit][file], {})

    def file_headers(self, repo: Repo, commit: str, file: str) -> dict[str, str]:
        data = repo.versions[commit][file]
        if repo.is_lfs(file):
            return {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
        blob = hashlib.sha1(b"blob %d\x00" % len(data) + data).hexdigest()
        return {"X-Repo-Commit": commit, "ETag": f'"{blob}"'}

    def content(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's bytes, or the range of them that was asked for, with the fault of this request in them."""
        kind = self.fault.kind if self.fault else ""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if kind == "garbage":
            data = bytes(255 - byte for byte in data)
        if kind == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if kind == "unasked-range" and not wanted:
            told = {**headers, "Content-Range": f"bytes 0-{len(data) // 2 - 1}/{len(data)}"}
            return self.answer(206, data[: len(data) // 2], told)
        if kind == "no-range" or not wanted:
            return self.answer(200, data, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if begin >= len(data):
            return self.answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        stated = begin + 1 if kind == "wrong-range" else begin
        whole = {"wrong-size": str(len(data) + 1000), "absurd-size": "9" * 5000}.get(kind, str(len(data)))
        headers["Content-Range"] = f"bytes {stated}-{end}/{whole}"
        return self.answer(206, data[begin : end + 1], headers)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if kind == "cut" and status in (200, 206):
            body = body[: len(body) // 2]
        lines = {"Content-Length": str(len(body)), **self.hub.answer_headers, **headers}
        head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        if self.command == "HEAD":
            body = b""
        if kind == "truncate":
            body = body[: len(body) // 2]
            self.close_connection = True
        # Counted first: whoever has read the answer must find it counted.
        with self.hub._lock:
            self.hub.bytes_sent += len(head) + len(body)
        self.wfile.write(head.encode("latin-1"))
        for at in range(0, len(body), step := len(body) // 8 + 1 if kind == "slow" else len(body) or 1):
            if at:
                time.sleep(self.fault.seconds)
            self.wfile.write(body[at : at + step])
            self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        """Quiet."""
