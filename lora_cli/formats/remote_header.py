"""The header of weights on the Hub, read without the weights."""

from typing import NamedTuple

from lora_cli.errors import HeaderError
from lora_cli.formats.header import Header, header_length, parse_header
from lora_cli.hub.client import Hub
from lora_cli.records import Adapter


class Probed(NamedTuple):
    """A header, or why there is none, the bytes that it needs, and the weights' SHA-256 as the Hub states it."""

    header: Header | HeaderError
    needed: int
    sha256: str


def probe_header(hub: Hub, adapter: Adapter, file: str, guess: int) -> Probed:
    """The header of weights on the Hub: one range request of `guess` bytes, two if those were too few.

    No hash covers a part of a file, so bytes that are no header are read once more before they count.
    """
    first = _probe(hub, adapter, file, guess)
    return first if isinstance(first.header, Header) else _probe(hub, adapter, file, guess)


def _probe(hub: Hub, adapter: Adapter, file: str, guess: int) -> Probed:
    needed, sha256 = 0, ""
    try:
        first, size, sha256 = hub.read_range(adapter.repo, file, adapter.commit, 0, guess)
        needed = 8 + header_length(first[:8], size)
        if needed > len(first):
            first += hub.read_range(adapter.repo, file, adapter.commit, len(first), needed).data
        return Probed(parse_header(first[:needed], size), needed, sha256)
    except HeaderError as error:
        return Probed(error, needed, sha256)
