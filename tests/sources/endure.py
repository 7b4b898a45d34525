"""A sync through faults at random, compared with one in calm: `python -m tests.sources.endure 2000 1` (size, seed)."""

import sys
import tempfile
from pathlib import Path

import pytest

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import NetworkError
from lora_cli.hub import patience
from lora_cli.hub.client import Hub
from lora_cli.records import Adapter
from lora_cli.sources.hub import HubSource
from lora_cli.steps.pool.sync import SyncReport, sync
from tests.fake_hub import BASE, FakeHub
from tests.faults import ODD_NAMES, RandomFaults

_MOST_SYNCS = 60


def endure(folder: Path, size: int, seed: int) -> tuple[dict[str, int], int]:
    """Sync `size` adapters while every fault is played, until nothing is left; then once more in health.

    Returns how often each fault was played, and the number of syncs. Everything that could be had is stored as a calm
    sync stores it, the rest says why it is not, and the last sync ends as if nothing had gone wrong.
    """
    with pytest.MonkeyPatch.context() as patched, FakeHub() as fake:
        patched.setattr(patience, "REQUEST_SECONDS", 2.0)
        patched.setattr(patience, "_STEP", 0.05)
        patched.setattr("lora_cli.hub.connection.REQUEST_SECONDS", 2.0)
        patched.setattr("lora_cli.hub.connection._FIRST_WAIT", 0.01)
        fake.add_many(size)
        for name in ODD_NAMES:
            fake.add(name)
        with Catalogue(folder / "calm.db") as calm, Catalogue(folder / "rough.db") as rough:
            _sync(fake, calm)
            right = _rows(calm)
            faults = fake.random_faults = RandomFaults(seed, share=0.1, doomed=0.05, seconds=0.5)
            syncs = _until_nothing_is_left(fake, rough, len(right))
            found = _rows(rough)
            failed = {id for id, row in found.items() if row.status == "failed"}
            assert found.keys() == right.keys()
            assert all(found[id] == right[id] for id in found.keys() - failed)
            assert all(found[id].reason for id in failed)
            assert not [id for id in failed if not faults.is_doomed(id)], "what could be had is there"
            fake.heal()
            assert _sync(fake, rough).complete
            assert _rows(rough) == right
    return dict(faults.sent), syncs


def _until_nothing_is_left(fake: FakeHub, catalogue: Catalogue, size: int) -> int:
    """Sync until all adapters are seen and only doomed repositories fail; the number of syncs."""
    for count in range(1, _MOST_SYNCS + 1):
        try:
            report = _sync(fake, catalogue)
        except NetworkError:
            continue  # the listing failed
        faults = fake.random_faults
        if report.seen == size and faults and all(faults.is_doomed(id) for id, _ in report.failures):
            return count
    raise AssertionError(f"something is left after {_MOST_SYNCS} syncs")


def _sync(fake: FakeHub, catalogue: Catalogue) -> SyncReport:
    return sync(catalogue, HubSource(Hub(fake.endpoint, silence=0.4)), base=BASE)


def _rows(catalogue: Catalogue) -> dict[str, Adapter]:
    return {row.id: catalogue.get(row.id) for row in catalogue.find()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        sent, syncs = endure(Path(place), int(sys.argv[1]), int(sys.argv[2]))
    print(f"{sum(sent.values()):,} faults of {len(sent)} kinds in {syncs} syncs; nothing lost")
