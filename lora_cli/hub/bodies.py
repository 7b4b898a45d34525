"""The bodies of the Hub's answers: unpacked within limits, and compared with the hash and size that the Hub tells."""

import hashlib
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_cli.hub.items import items
from lora_cli.hub.problems import Unfit

if TYPE_CHECKING:
    import httpx2

_BLOCK = 1 << 16
_LONGEST_PAGE = 16_000_000  # bytes of JSON, unpacked
_LONGEST_ADDRESS = 4_000
_LARGEST_BLOB = 12_000_000  # the Hub takes no larger file outside LFS, and tells the size of one in it
_OID = re.compile(r'(?:W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?')
_SIZE = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_NO_RANGE = re.compile(r"bytes \*/([0-9]{1,18})")


class Part(NamedTuple):
    """Some bytes of a file, the size of the whole file, and its SHA-256 as the Hub states it, "" outside LFS."""

    data: bytes
    size: int
    sha256: str


def json_list(response: "httpx2.Response") -> Iterator[Any]:
    """The elements of a body that is a list, each as soon as it is there."""
    try:
        yield from items(_unpacked(response, _LONGEST_PAGE))
    except ValueError as error:
        raise Unfit(f"the Hub's answer is {error}", hint="check HF_ENDPOINT and proxies") from error


def json_object(response: "httpx2.Response") -> Any:
    """A body that is one object."""

    try:
        [found] = items([b"[", *_unpacked(response, _LONGEST_PAGE), b"]"])
    except ValueError as error:
        raise Unfit("the Hub's answer is no JSON object", hint="check HF_ENDPOINT and proxies") from error
    return found


def next_page(response: "httpx2.Response") -> str:
    """The address of the page after this one, "" if this is the last one."""
    following = response.links.get("next", {}).get("url", "")
    if len(following) > _LONGEST_ADDRESS:
        raise Unfit("the listing's next page has no usable address")
    return str(response.url.join(following)) if following else ""


def whole_file(response: "httpx2.Response", limit: int, commit: str = "") -> bytes:
    """A file's bytes, of the hash that the Hub tells; the first `limit + 1` bytes of one that is longer."""
    facts = _facts_in(response, commit)
    if facts.size is not None and facts.size > limit:
        body = _first(response, limit + 1)
        fits = len(body) > limit
    else:
        body = _first(response, _LARGEST_BLOB if facts.size is None else facts.size + 1)
        fits = facts.size in (None, len(body)) and _hash(body, facts.oid) == facts.oid
    if not fits:
        raise Unfit("the bytes received do not match the Hub's hash")
    return body[: limit + 1]


def file_range(response: "httpx2.Response", begin: int, end: int, commit: str) -> Part:
    """The bytes from `begin` to `end` (exclusive), also of an answer that ignores the range."""
    facts = _facts_in(response, commit)
    range_text = response.headers.get("content-range", "")
    if response.status_code == 206:
        stated = _RANGE.fullmatch(range_text)
        size = int(stated[3]) if stated else 0
        if stated is None or (int(stated[1]), int(stated[2])) != (begin, min(end, size) - 1):
            raise Unfit("the Hub answers with another range than the one asked for")
        body = _first(response, min(end, size) - begin + 1)
    elif response.status_code == 416:
        stated = _NO_RANGE.fullmatch(range_text)
        size, body = int(stated[1]) if stated else -1, b""
        if not 0 <= size <= begin:
            raise Unfit("the Hub refuses a range that the file has")
    else:
        length = response.headers.get("content-length", "")
        size = int(length) if _SIZE.fullmatch(length) else -1
        body = _first(response, min(end, size))[begin:]
    if size < 0 or facts.size not in (None, size) or len(body) != max(min(end, size) - begin, 0):
        raise Unfit("the Hub answers with a file of another size, or with a part of the range")
    return Part(body, size, facts.oid if len(facts.oid) == 64 else "")


class _Facts(NamedTuple):
    """The Hub's facts about a file: the hash that names its bytes, and the size, None if the Hub does not tell it."""

    oid: str
    size: int | None


def _facts_in(response: "httpx2.Response", commit: str) -> _Facts:
    """The facts about the file of this answer, from the first hop that names the commit; "" is any commit."""
    for hop in (*response.history, response):
        oid = _OID.fullmatch(hop.headers.get("x-linked-etag", hop.headers.get("etag", "")))
        named = hop.headers.get("x-repo-commit")
        if oid and named is not None and commit in ("", named):
            size = _SIZE.fullmatch(hop.headers.get("x-linked-size", ""))
            return _Facts(oid[1], int(size[0]) if size else None)
    raise Unfit("the answer does not come from a Hub")


def _hash(data: bytes, oid: str) -> str:
    """The hash of these bytes, of the kind of `oid`."""
    return (hashlib.sha256(data) if len(oid) == 64 else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()


def _first(response: "httpx2.Response", count: int) -> bytes:
    """At most `count` bytes of the body; the rest is not read."""
    body = bytearray()
    for block in _unpacked(response):
        body += block[: count - len(body)]
        if len(body) >= count:
            break
    return bytes(body)


def _unpacked(response: "httpx2.Response", limit: int | None = None) -> Iterator[bytes]:
    """The body in small blocks, however well it is packed: the client would unpack without a limit."""
    packing = response.headers.get("content-encoding", "identity").strip().lower()
    if packing not in ("identity", "gzip"):
        raise Unfit(f"the answer is packed by {packing[:20]!r}, which was not asked for")
    unpack = zlib.decompressobj(31) if packing == "gzip" else None
    whole = 0
    for raw in response.iter_raw():
        left = raw
        while left:
            if unpack is None:
                block, left = left, b""
            else:
                block, left = _next(unpack, left)
            whole += len(block)
            if limit is not None and whole > limit:
                raise Unfit(f"the answer has more than {limit:,} bytes")
            yield block
    if unpack is not None and not unpack.eof:
        raise Unfit("the answer is cut short")


def _next(unpack: Any, packed: bytes) -> tuple[bytes, bytes]:
    try:
        return unpack.decompress(packed, _BLOCK), unpack.unconsumed_tail
    except zlib.error as error:
        raise Unfit("the answer is packed wrongly") from error
