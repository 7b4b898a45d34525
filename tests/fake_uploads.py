"""The part of the stand-in Hub that takes uploads: repositories made, files, commits; and what goes wrong with them.

A token may write to the owners that `Uploads.tokens` gives it; LFS files go to the second port, as to a CDN.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from typing import Any

import yaml

TOKEN = "hf_" + "wRiTeR" * 6
READER = "hf_" + "rEaDeR" * 6
HANG_UP = "hang-up"
"""A fault: the connection is reset in the middle of the request's body."""


class Uploads:
    """What was uploaded: LFS objects by their hash, and every commit as (repository, parent, new head)."""

    def __init__(self) -> None:
        self.tokens: dict[str, set[str]] = {TOKEN: {"me", "acme"}, READER: set()}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, str]] = []
        self.made: list[tuple[str, str]] = []
        self.part_size = 0
        """The size of the parts in which LFS files are asked for, 0 for whole files."""
        self.ignored: set[str] = set()
        self.before_commit: Any = None
        """Called with the repository before a commit is taken."""
        self._parts: dict[str, dict[int, bytes]] = {}
        self._lock = threading.Lock()

    def may_write(self, handler: Any, owner: str) -> int:
        """200, or the status of the refusal."""
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.tokens:
            return 401
        return 200 if owner in self.tokens[token] else 403

    def sees(self, handler: Any, repo: Any) -> bool:
        """Whether the one who asks may know of a repository."""
        return not repo.private or self.may_write(handler, repo.id.partition("/")[0]) == 200


def details(repo: Any, commit: str) -> dict[str, Any]:
    """A repository as the Hub describes it with the facts about its files."""
    siblings = []
    for name, data in repo.versions[commit].items():
        fact: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
        if repo.is_lfs(name):
            fact["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        siblings.append(fact)
    return {"_id": repo.hub_id, "id": repo.id, "sha": commit, "private": repo.private, "siblings": siblings}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def receive(handler: Any) -> bool:
    """Read the body of a request; False if the connection is cut in the middle of it."""
    length = int(handler.headers.get("Content-Length", "0"))
    if handler.fault and handler.fault.kind == HANG_UP:
        handler.rfile.read(length // 2)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.connection.close()
        return False
    handler.body = handler.rfile.read(length)
    return True


def answer_upload(handler: Any, path: str) -> None:
    """Answer a request that writes."""
    uploads: Uploads = handler.hub.uploads
    if handler.role == "cdn":
        return _put(handler, uploads, path) if handler.command == "PUT" else _complete(handler, uploads)
    asked = {} if path.endswith("/commit/main") else json.loads(handler.body)
    if path == "/api/repos/create":
        return _make(handler, uploads, asked)
    if path == "/api/validate-yaml":
        return _validate(handler, asked["content"])
    found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git)?/(info/lfs/.*|preupload/main|commit/main)", path)
    if found is None:
        return handler.answer(404, b"{}")
    name, what = found[1], found[2]
    status = uploads.may_write(handler, name.partition("/")[0])
    if status != 200:
        return handler.answer(status, b"{}")
    if name not in handler.hub.repos:
        return handler.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
    repo = handler.hub.repos[name]
    match what:
        case "preupload/main":
            return _preupload(handler, uploads, repo, asked)
        case "info/lfs/objects/batch":
            return _batch(handler, uploads, asked)
        case "info/lfs/objects/verify":
            whole = len(uploads.objects.get(asked["oid"], b"")) == asked["size"]
            return handler.answer(200 if whole else 404, b"{}")
    return _commit(handler, uploads, repo)


def _validate(handler: Any, card: str) -> None:
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    told: dict[str, Any] = {"errors": [], "warnings": [] if front else [{"message": "empty or missing yaml metadata"}]}
    try:
        yaml.safe_load(front[1] if front else "")
    except yaml.YAMLError:
        told["errors"].append({"message": "bad YAML"})
    handler.answer(400 if told["errors"] else 200, json.dumps(told).encode())


def _make(handler: Any, uploads: Uploads, asked: dict[str, Any]) -> None:
    owner, name = asked["organization"], asked["name"]
    status = uploads.may_write(handler, owner)
    if status != 200:
        return handler.answer(status, b"{}")
    id = f"{owner}/{name}"
    url = json.dumps({"url": f"{handler.hub.endpoint}/{id}"}).encode()
    if id in handler.hub.repos:
        return handler.answer(409, url)
    handler.hub.add(id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=asked["visibility"] == "private")
    uploads.made.append((id, asked["visibility"]))
    return handler.answer(200, url)


def _preupload(handler: Any, uploads: Uploads, repo: Any, asked: dict[str, Any]) -> None:
    files = []
    for one in asked["files"]:
        name, lfs = one["path"], repo.is_lfs(one["path"])
        there = repo.files.get(name)
        oid = None if there is None else hashlib.sha256(there).hexdigest() if lfs else git_sha1(there)
        mode = "lfs" if lfs else "regular"
        files.append({"path": name, "uploadMode": mode, "shouldIgnore": name in uploads.ignored, "oid": oid})
    handler.answer(200, json.dumps({"files": files}).encode())


def _batch(handler: Any, uploads: Uploads, asked: dict[str, Any]) -> None:
    base = handler.path.partition("/info/lfs/")[0]
    objects = []
    for one in asked["objects"]:
        oid, size = one["oid"], one["size"]
        actions: dict[str, Any] = {}
        if oid not in uploads.objects:
            href, header = f"{handler.hub.cdn}/upload/{oid}", {}
            if uploads.part_size:
                count = -(-size // uploads.part_size)
                header = {"chunk_size": str(uploads.part_size)}
                header |= {str(part): f"{href}?part={part}" for part in range(1, count + 1)}
                href = f"{handler.hub.cdn}/complete"
            verify = {"href": f"{handler.hub.endpoint}{base}/info/lfs/objects/verify"}
            actions = {"actions": {"upload": {"href": href, "header": header}, "verify": verify}}
        objects.append({"oid": oid, "size": size, **actions})
    handler.answer(200, json.dumps({"transfer": "basic", "objects": objects}).encode())


def _put(handler: Any, uploads: Uploads, path: str) -> None:
    oid = path.rpartition("/")[2]
    part = re.search(r"\?part=([0-9]+)", handler.path)
    if part is not None:
        uploads._parts.setdefault(oid, {})[int(part[1])] = handler.body
        return handler.answer(200, b"", {"ETag": f'"{hashlib.md5(handler.body).hexdigest()}"'})
    return _store(handler, uploads, oid, handler.body)


def _complete(handler: Any, uploads: Uploads) -> None:
    asked = json.loads(handler.body)
    parts = uploads._parts.pop(asked["oid"], {})
    return _store(handler, uploads, asked["oid"], b"".join(parts[one["partNumber"]] for one in asked["parts"]))


def _store(handler: Any, uploads: Uploads, oid: str, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != oid:
        return handler.answer(400, b"{}")
    uploads.objects[oid] = data
    return handler.answer(200, b"{}")


def _commit(handler: Any, uploads: Uploads, repo: Any) -> None:
    if uploads.before_commit is not None:
        uploads.before_commit(repo)
    lines = [json.loads(line) for line in handler.body.decode().splitlines()]
    header = lines[0]["value"]
    with uploads._lock:
        if header.get("parentCommit", repo.sha) != repo.sha:
            return handler.answer(412, b"{}")
        files, parent = dict(repo.files), repo.sha
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if len(uploads.objects.get(value["oid"], b"")) != value["size"]:
                        return handler.answer(422, b"{}")
                    files[value["path"]] = uploads.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        repo.files = files
        repo.commit()
        uploads.commits.append((repo.id, parent, repo.sha))
    told = {"commitUrl": f"{handler.hub.endpoint}/{repo.id}/commit/{repo.sha}", "commitOid": repo.sha}
    return handler.answer(200, json.dumps(told).encode())
