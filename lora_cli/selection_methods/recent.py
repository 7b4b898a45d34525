"""Selection by age."""

from collections.abc import Sequence
from datetime import UTC, datetime

from lora_cli.methods import method


@method("catalogue")
def recent(created_at: Sequence[str], modified_at: Sequence[str]) -> list[float]:
    """Time of the last change, or of the creation where that is later or alone known, in seconds since 1970.

    An adapter without a date has 0.

    Source: created_at and modified_at of the catalogue; the Hub counts a change of the card as one.
    """
    dates = zip(created_at, modified_at, strict=True)
    return [max(_seconds(created), _seconds(modified)) for created, modified in dates]


def _seconds(date: str) -> float:
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return 0.0
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
