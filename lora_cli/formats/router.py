"""router.json, the file of a router: which adapters beside it tokens choose among, and how."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lora_cli.errors import DataError, UsageError
from lora_cli.files import read_given
from lora_cli.formats.run_record import is_plain
from lora_cli.hashes import sha256_of
from lora_cli.records import AdapterRef
from lora_cli.settings import folder_of

ROUTER_FILE: Final = "router.json"
NO_LORA: Final = "a router, which no single LoRA equals"
_SCHEMA = "lora.router/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An adapter of a router: its folder beside router.json, its `id@commit`, and the SHA-256 of the weights there."""

    folder: str
    adapter: str
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFile:
    """The contents of router.json.

    `preset` and `knobs` are those of `lora fit`. `peft` holds the arguments of PEFT's ArrowConfig, None where PEFT
    cannot run this router; `why_not` then gives the reason.
    """

    preset: str
    knobs: Mapping[str, Any]
    base: str
    adapters: Sequence[Member]
    peft: Mapping[str, Any] | None
    why_not: str = ""

    @property
    def text(self) -> str:
        """The file's text."""
        return json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1) + "\n"


def router_folder(name: str) -> Path | None:
    """The folder of a router at `name`; None for anything else."""
    folder = folder_of(name)
    return folder if folder is not None and (folder / ROUTER_FILE).is_file() else None


def router_ref(folder: Path, members: Sequence[AdapterRef]) -> AdapterRef:
    """The router in a folder over these adapters: its name is made of the last two parts of its path.

    Its commit is made of router.json and of the adapters' own, which change with their configurations too.
    """
    place, parts = folder.resolve(), [sha256_of(folder / ROUTER_FILE), *(member.commit for member in members)]
    commit = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:40]
    return AdapterRef(id="/".join(place.parts[-2:]).lstrip("/"), commit=commit, source="folder", repo=str(place))


def read_router(folder: Path) -> RouterFile:
    """The router in a folder. DataError for a router.json that is malformed, or that `lora fit` could not write."""
    file = folder / ROUTER_FILE
    try:
        found = json.loads(read_given(file).decode())
        if found.pop("schema") != _SCHEMA:
            raise ValueError(f"no {_SCHEMA}")
        members = tuple(Member(**{name: str(value) for name, value in one.items()}) for one in found.pop("adapters"))
        router = RouterFile(adapters=members, **found)
        from lora_cli.recipes import FIT_METHODS  # a merge has no use for them

        FIT_METHODS.check(router.preset, router.knobs)
        if FIT_METHODS.get(router.preset).kind != "routing":
            raise ValueError("a preset that makes no router")
        if not members or not all(is_plain(one.folder) for one in members):
            raise ValueError("no adapters beside it")
        return router
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError):
        raise DataError(f"{file}: no router", hint="give the folder that lora fit --preset arrow wrote") from None
