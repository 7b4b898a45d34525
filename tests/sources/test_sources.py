"""The laws that every source of adapters obeys, whatever it lists. A new source adds its row to `PLACES`."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from huggingface_hub import close_session

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.errors import LoraError
from lora_cli.methods import file_names
from lora_cli.sources import Source, open_source
from lora_cli.steps.pool.sync import SyncOptions, SyncReport, sync
from tests.fake_hub import BASE, FakeHub, lora_files


class OfFolders:
    """Adapters in a folder tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)

    def put(self, name: str, rank: int) -> None:
        (self.root / name).mkdir(parents=True, exist_ok=True)
        for file, data in lora_files(rank=rank).items():
            (self.root / name / file).write_bytes(data)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.root / name)


class OfHub:
    """Adapters on a stand-in for the Hub."""

    def __init__(self, fake: FakeHub) -> None:
        self.fake = fake
        self.place = fake.endpoint

    def put(self, name: str, rank: int) -> None:
        self.fake.add(f"pool/{name}", lora_files(rank=rank))

    def remove(self, name: str) -> None:
        del self.fake.repos[f"pool/{name}"]


class OfIds(OfHub):
    """A file that names repositories of a Hub."""

    def __init__(self, fake: FakeHub, file: Path) -> None:
        super().__init__(fake)
        self.place = str(file)

    def put(self, name: str, rank: int) -> None:
        super().put(name, rank)
        with Path(self.place).open("a") as file:
            file.write(f"pool/{name}  # rank {rank}\n\n")


@contextmanager
def of_folders(home: Path) -> Iterator[OfFolders]:
    yield OfFolders(home / "pool")


@contextmanager
def of_hub(home: Path) -> Iterator[OfHub]:
    with FakeHub() as fake:
        yield OfHub(fake)
        close_session()


@contextmanager
def of_ids(home: Path) -> Iterator[OfIds]:
    with FakeHub() as fake, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", fake.endpoint)
        yield OfIds(fake, home / "ids.txt")
        close_session()


PLACES: dict[str, Callable[[Path], AbstractContextManager[OfFolders | OfHub]]] = {
    "folder": of_folders,
    "hub": of_hub,
    "ids": of_ids,
}


@pytest.fixture(params=PLACES)
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[OfFolders | OfHub, Source]]:
    """A place with two adapters, and the source that lists it."""
    with PLACES[request.param](tmp_path) as place:
        place.put("one", rank=2)
        place.put("two", rank=4)
        yield place, open_source(request.param, place.place)


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    with Catalogue(tmp_path / "catalogue.db") as opened:
        yield opened


def counts(report: SyncReport) -> tuple[int, int, int, int]:
    return report.new, report.changed, report.unchanged, report.gone


def test_every_file_is_a_source_with_a_row() -> None:
    assert set(PLACES) == set(file_names("lora_cli.sources"))


def test_adapters_are_read_once_and_then_only_if_they_changed(
    pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue
) -> None:
    place, source = pool
    assert counts(sync(catalogue, source, base=BASE)) == (2, 0, 0, 0)
    rows = {row.id: (row.rank, row.status, row.base) for row in catalogue.find()}
    assert rows == {"pool/one": (2, "ok", BASE), "pool/two": (4, "ok", BASE)}
    assert counts(sync(catalogue, source, base=BASE)) == (0, 0, 2, 0)
    place.put("two", rank=8)
    place.put("three", rank=2)
    assert counts(sync(catalogue, source, base=BASE)) == (1, 1, 1, 0)
    assert catalogue.get("pool/two").rank == 8


def test_an_adapter_that_left_its_source_is_gone_and_may_come_back(
    pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue
) -> None:
    place, source = pool
    sync(catalogue, source, base=BASE)
    place.remove("one")
    assert counts(sync(catalogue, source, base=BASE)) == (0, 0, 1, 1)
    assert (catalogue.get("pool/one").status, catalogue.get("pool/two").status) == ("gone", "ok")
    place.put("one", rank=2)
    assert counts(sync(catalogue, source, base=BASE)) == (0, 1, 1, 0)


def test_a_limit_holds_and_calls_nothing_gone(pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue) -> None:
    _, source = pool
    sync(catalogue, source, base=BASE)
    assert counts(sync(catalogue, source, SyncOptions(limit=1), base=BASE)) == (0, 0, 1, 0)
    assert {row.status for row in catalogue.find()} == {"ok"}


def test_a_dry_run_stores_nothing(pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue) -> None:
    _, source = pool
    report = sync(catalogue, source, SyncOptions(dry_run=True), base=BASE)
    assert dict(report.plan) == {"pool/one": "new", "pool/two": "new"}
    assert not catalogue.path.exists()


def test_a_source_lists_every_base_or_asks_for_one(
    pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue
) -> None:
    _, source = pool
    if source.needs_base:
        with pytest.raises(LoraError, match="no base model"):
            sync(catalogue, source)
    else:
        assert counts(sync(catalogue, source)) == (2, 0, 0, 0)


def test_the_sync_is_stored_under_the_name_of_its_source(
    pool: tuple[OfFolders | OfHub, Source], catalogue: Catalogue
) -> None:
    place, source = pool
    assert sync(catalogue, source, base=BASE).source == source.name == str(place.place)
