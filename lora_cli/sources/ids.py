"""A list of ids as a source: the adapters of a Hub that a text file names, one on each line."""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.rows import Known
from lora_cli.errors import DataError, LoraError, NothingMatched
from lora_cli.files import read_given
from lora_cli.hub.client import Hub
from lora_cli.names import id_and_revision, repo_and_folder
from lora_cli.records import Adapter, Progress
from lora_cli.sources import Found, Sought, Source
from lora_cli.sources.hub import AskingSource, HubReader

_BATCH = 64
_THREADS = 8


def ids(place: str, budget: int | None, progress: Progress) -> Source:
    """The ids in the file `place`: one a line, empty lines and what follows a # are left out."""
    return IdsSource(Path(place), Hub(progress=progress, budget=budget))


class IdsSource(AskingSource):
    """The adapters that a file names, as `owner/name[@revision][:folder]`; each takes a request of its own."""

    def __init__(self, file: Path, hub: Hub) -> None:
        super().__init__(str(file), hub)
        self._file = file
        self._missing: set[str] = set()
        _read(file)

    def batches(self, sought: Sought, progress: Progress) -> Iterator[list[Found]]:
        reader = HubReader(self._hub, sought.rules, sought.max_bytes)
        self._missing.clear()
        named = [*_read(self._file).items()][: sought.limit]
        for start in range(0, len(named), _BATCH):
            batch = named[start : start + _BATCH]
            with ThreadPoolExecutor(_THREADS) as pool:
                found = [*pool.map(lambda one: self._found(sought.catalogue, reader, *one), batch)]
            yield [one for some in found for one in some]
            progress("asking for repositories", start + len(batch), len(named))

    def vanished(self, sought: Sought, seen: Collection[str]) -> list[str]:
        """The stored ones that the file names and the Hub no longer has: others may be anywhere."""
        known = sought.catalogue.known(sorted(self._missing), base=sought.rules.base or None)
        return [id for id, row in known.items() if row.status != "gone"]

    def _found(self, catalogue: Catalogue, reader: HubReader, text: str, line: int) -> list[Found]:
        """The adapters of one line; for one that cannot be had, an entry whose `read` tells why."""
        id, revision = id_and_revision(text)
        repo, folder = repo_and_folder(id) or (id, "")
        stub = Adapter(id=id, commit="0" * 40, source="hub", repo=repo, subfolder=folder)
        try:
            if folder:
                return [reader.one(repo, revision, folder)]
            return [*reader.all_in(self._hub.repository(repo, revision))]
        except NothingMatched as error:
            if catalogue.known([id]):
                self._missing.add(id)
                return []
            reason = f"{self._file.name}:{line}: {error.message}"
            return [Found(stub, _differs, partial(_gone, stub, reason))]
        except LoraError as error:
            return [Found(stub, _differs, partial(_raise, error))]


def _differs(known: Known) -> bool:
    return False


def _gone(stub: Adapter, reason: str, row: Adapter | None) -> Adapter:
    """The `read` of an adapter that is not on the Hub."""
    return replace(stub, status="gone", reason=reason)


def _raise(error: LoraError, row: Adapter | None) -> Adapter:
    raise error


def _read(file: Path) -> Mapping[str, int]:
    """The ids in a file with their lines. DataError names the first line that holds none."""
    try:
        text = read_given(file).decode()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        id = line.partition("#")[0].strip()
        if not id:
            continue
        if repo_and_folder(id_and_revision(id)[0]) is None:
            raise DataError(
                f"{file}:{number}: {id[:80]!r} is no id of the Hub",
                hint="one id a line: owner/name, with :folder if any",
            )
        found.setdefault(id, number)
    if not found:
        raise DataError(f"{file}: holds no ids", hint="one id a line: owner/name")
    return found
