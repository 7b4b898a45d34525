"""The bodies of the Hub's answers: read up to a limit, as a range of a file, or as JSON."""

import json
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_cli.errors import NetworkError

if TYPE_CHECKING:
    import httpx2

_WHOLE_READ_SECONDS = 300.0


class Part(NamedTuple):
    """Some bytes of a file, and the size of the whole file."""

    data: bytes
    size: int


def text(response: "httpx2.Response") -> bytes:
    """A short body."""
    return collect(response, 1_000_000)


def json_page(response: "httpx2.Response") -> tuple[Any, str]:
    """A body of JSON, and the URL of the next page; "" if this is the last one."""
    body = collect(response, 200_000_000)
    try:
        items = json.loads(body)
    except ValueError as error:
        raise NetworkError("the Hub's answer is not JSON", hint="check HF_ENDPOINT and proxies") from error
    following = response.links.get("next", {}).get("url", "")
    return items, str(response.url.join(following)) if following else ""


def collect(response: "httpx2.Response", limit: int) -> bytes:
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


def collect_range(response: "httpx2.Response", begin: int, end: int) -> Part:
    """The bytes from `begin` to `end` (exclusive), also of an answer that ignores the range."""
    if response.status_code == 416:
        whole = re.fullmatch(r"bytes \*/(\d+)", response.headers.get("content-range", ""))
        return Part(b"", int(whole[1]) if whole else 0)
    if response.status_code != 206:
        size_text = response.headers.get("content-length", "")
        body = collect(response, end)
        # Without a length, a body shorter than `end` is the whole file.
        size = int(size_text) if size_text.isdigit() else len(body)
        return Part(body[begin:], size)
    stated = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""))
    if stated is None or int(stated[1]) != begin or not begin <= int(stated[2]) < int(stated[3]):
        raise NetworkError("the Hub answers with another range than the one asked for", hint="rerun later")
    return Part(collect(response, min(end, int(stated[3])) - begin), int(stated[3]))
