"""What the cards of adapters and of their base state: licence and data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.errors import LoraError
from lora_cli.formats.base_names import split_revision
from lora_cli.formats.card import datasets_of, licence_of, read_card
from lora_cli.names import is_model
from lora_cli.records import Adapter, AdapterRef
from lora_cli.settings import folder_of


class Stated(NamedTuple):
    """The licence, "" for none, and the data sets that a card names. The licences of data sets are not looked up."""

    licence: str = ""
    datasets: tuple[str, ...] = ()


def stated_of(found: Sequence[tuple[AdapterRef, Adapter | None]]) -> dict[str, Stated]:
    """What the cards of adapters state, by `id@commit`: the catalogue's facts, else those of the card in the folder."""
    return {
        ref.pinned: Stated(row.licence, row.datasets) if row is not None else _of_folder(Path(ref.repo))
        for ref, row in found
    }


def stated_of_base(base: str, *, ask: bool) -> Stated:
    """What the card of a base states, in its folder or in the Hub's cache.

    ask: else the Hub is asked by one request; where it cannot be reached, nothing is stated.
    """
    name, revision = split_revision(base)
    if (folder := folder_of(base)) is not None:
        return _of_folder(folder)
    if not is_model(name):
        return Stated()
    from lora_cli.hub.cache import cached_file
    from lora_cli.hub.client import Hub

    try:
        if (card := cached_file(name, "README.md", revision or "main")) is not None:
            return _of_folder(card.parent)
        if ask:
            listed = Hub().repository(name, revision)
            return Stated(listed.licence, listed.datasets)
    except LoraError:
        pass
    return Stated()


def recorded_licences(terms: Mapping[str, Stated]) -> dict[str, str]:
    """Licences as run.json holds them: of each adapter by `id@commit`, and of the base, if it states one, as "base".

    Args:
        terms: the statements by `id@commit`, "" for the base.
    """
    return {pinned or "base": one.licence for pinned, one in terms.items() if pinned or one.licence}


def _of_folder(folder: Path) -> Stated:
    card = read_card(folder)
    return Stated(licence_of(card), datasets_of(card))
