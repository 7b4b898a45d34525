"""The header of weights on the Hub, read without the weights."""

from lora_cli.errors import HeaderError
from lora_cli.formats.header import Header, header_length, parse_header
from lora_cli.hub.client import Hub
from lora_cli.records import Adapter


def probe_header(hub: Hub, adapter: Adapter, file: str, guess: int) -> tuple[Header | HeaderError, int]:
    """The header of weights on the Hub, and the bytes read: one range request, two if `guess` was too short.

    No hash covers a part of a file, so bytes that are no header are read once more before they count.
    """
    first = _probe(hub, adapter, file, guess)
    return first if isinstance(first[0], Header) else _probe(hub, adapter, file, guess)


def _probe(hub: Hub, adapter: Adapter, file: str, guess: int) -> tuple[Header | HeaderError, int]:
    needed = 0
    try:
        first, size = hub.read_range(adapter.repo, file, adapter.commit, 0, guess)
        needed = 8 + header_length(first[:8], size)
        if needed > len(first):
            first += hub.read_range(adapter.repo, file, adapter.commit, len(first), needed).data
        return parse_header(first[:needed], size), needed
    except HeaderError as error:
        return error, needed
