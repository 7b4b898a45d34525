"""The ways in which names that PEFT does not apply can be read as names of a base."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lora_cli.formats.skeleton import OWN, WEIGHT, Skeleton, Spelling

INNER = ".base_layer"
"""The name of the wrapped module in PEFT's layers."""
_TEXT_OF_MULTIMODAL = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|language_model\.)")

Rule = Callable[[Sequence[str]], list[str]]


def rules(base: Skeleton) -> Iterator[tuple[Rule, Spelling]]:
    """Ways to read names that PEFT does not apply as names of the base, the surest first, and whose names they are."""

    def renamed(names: Sequence[str]) -> list[str]:
        found = base.renamed(names, WEIGHT)
        return [found.get(name, name) for name in names]

    prefix = f"{base.prefix}."
    places: list[tuple[Callable[[str], str], Spelling]] = [
        (lambda name: name, OWN),
        (lambda name: prefix + name, Spelling(cut=prefix)),
        (lambda name: name.removeprefix(prefix), Spelling(added=prefix)),
        (lambda name: f"{base.decoder}.{name.removeprefix('model.')}", OWN),
        (lambda name: f"{base.decoder}.{name}", OWN),
        (lambda name: _TEXT_OF_MULTIMODAL.sub(f"{base.decoder}.", name), OWN),
    ]
    for cut in ("", INNER):
        for reading in (list[str], renamed):
            for place, spelling in places:
                yield partial(_read_by, cut, reading, place), spelling


def _read_by(
    cut: str, reading: Callable[[Sequence[str]], list[str]], place: Callable[[str], str], names: Sequence[str]
) -> list[str]:
    return [place(name) for name in reading([name.removesuffix(cut) for name in names])]
