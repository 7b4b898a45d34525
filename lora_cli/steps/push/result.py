"""The folder of a result as it may go to the Hub: which of its files, and that they are what its record says."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lora_cli.errors import DataError, NothingMatched, Refused
from lora_cli.files import read_regular, reading, special_kind
from lora_cli.formats.card import CARD_FILE
from lora_cli.formats.coefficients import COEFFICIENTS_FILE
from lora_cli.formats.config import parse_config
from lora_cli.formats.facts import LoraConfigFacts
from lora_cli.formats.header import read_header
from lora_cli.formats.kinds import CONFIG_NAME, DENSE_FILE, WEIGHTS_NAME
from lora_cli.formats.router import ROUTER_FILE
from lora_cli.formats.run_record import RECORD_FILE, is_intact, read_record
from lora_cli.formats.store import folder_ref
from lora_cli.hashes import sha256_of, stamp_of
from lora_cli.hub.push import Upload
from lora_cli.names import is_commit
from lora_cli.records import Progress, patient, silent
from lora_cli.redaction import holds_a_token
from lora_cli.settings import folder_of, folders_like
from lora_cli.text import meant

FILES: Final = (CONFIG_NAME, WEIGHTS_NAME, RECORD_FILE, COEFFICIENTS_FILE)
"""The files of a result that go to the Hub, if they are there, besides its card."""
_ALWAYS = FILES[:3]
_OTHERS = {ROUTER_FILE: "a router", DENSE_FILE: "whole updates", "config.json": "a whole model"}
_LARGEST_IN_GIT = 10_000_000  # bytes; the Hub takes no larger file outside LFS
_LARGEST_CARD = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result that passed the checks.

    `pinned` is its `id@commit`, `uploads` are its files but for the card, `own_card` is a README.md that lora did not
    write, "" for none. `unchecked` names the files whose hash its record does not hold.
    """

    folder: Path
    pinned: str
    record: Mapping[str, Any]
    config: LoraConfigFacts
    uploads: Sequence[Upload]
    own_card: str
    unchecked: Sequence[str] = ()

    @property
    def verb(self) -> str:
        """The command that made it."""
        return str(self.record["command"])

    @property
    def rank(self) -> int:
        """Its highest rank."""
        return max([self.config.rank or 1, *self.config.rank_pattern.values()])

    @property
    def parents(self) -> Mapping[str, str]:
        """The adapters that it was made of, or the model, `id@commit` → SHA-256 of the weights."""
        inputs: Mapping[str, str] = self.record["inputs"]
        return {
            name.removeprefix("tuned:"): str(sha256)
            for name, sha256 in inputs.items()
            if is_commit(name.rpartition("@")[2]) and not name.startswith("base:")
        }


def read_result(text: str, progress: Progress = silent) -> Result:
    """The result in a folder, its files compared with its record.

    Raises:
        NothingMatched: no such folder.
        Refused: no adapter that lora made, or one that was changed or not finished; a file that is a link, or that
            holds a token. DataError: a file that cannot be read.
    """
    folder = _folder(text)
    _demand_an_adapter(folder)
    record = read_record(folder)
    if not (isinstance(made_by := record.get("command"), str) and made_by.isidentifier()):
        raise DataError(f"{folder / RECORD_FILE}: a damaged record")
    if record.get("unfinished"):
        raise Refused(f"{folder}: not finished", hint=f"run its lora {made_by} to the end first")
    uploads = [_upload(folder / name, progress) for name in FILES if name in _ALWAYS or (folder / name).exists()]
    for one in uploads:
        if record["outputs"].get(one.path, one.sha256) != one.sha256:
            raise Refused(f"{folder / one.path} has changed since lora wrote it", hint="make the result again")
    if not is_intact(record):
        raise Refused(f"{folder / RECORD_FILE} has changed since lora wrote it", hint="make the result again")
    if WEIGHTS_NAME not in record["outputs"]:
        raise Refused(f"{folder / RECORD_FILE}: not the record of this adapter", hint="make the result again")
    config = parse_config(read_regular(folder / CONFIG_NAME))
    if config.peft_type != "LORA":
        raise Refused(f"{folder}: {config.peft_type} in place of LORA")
    read_header(folder / WEIGHTS_NAME)
    own_card = _own_card(folder, record)
    for one in uploads:
        if one.path != WEIGHTS_NAME:
            data = one.content if isinstance(one.content, bytes) else read_regular(one.content)
            demand_no_token(folder / one.path, data.decode("utf-8", "replace"))
    demand_no_token(folder / CARD_FILE, own_card)
    pinned = folder_ref(folder).pinned
    unchecked = [one.path for one in uploads if one.path not in (RECORD_FILE, *record["outputs"])]
    return Result(
        folder=folder,
        pinned=pinned,
        record=record,
        config=config,
        uploads=uploads,
        own_card=own_card,
        unchecked=unchecked,
    )


def demand_no_token(file: Path, text: str) -> None:
    """Refused if a text that becomes public holds a token of the Hub."""
    if holds_a_token(text):
        raise Refused(f"{file} holds what looks like a token of the Hub", hint="take it out")


def upload_of(name: str, data: bytes) -> Upload:
    """A file whose bytes are at hand."""
    return Upload(
        path=name,
        content=data,
        sha256=hashlib.sha256(data).hexdigest(),
        git_sha1=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        size=len(data),
    )


def _folder(text: str) -> Path:
    folder = folder_of(text)
    if folder is None:
        raise NothingMatched(f"{text}: no such folder", hint=meant(folders_like(text), "give the folder of a result"))
    return folder.resolve()


def _demand_an_adapter(folder: Path) -> None:
    for name in (*FILES, CARD_FILE):
        file = folder / name
        if file.is_symlink():
            raise Refused(f"{file}: a link; only a folder's own files go to the Hub", hint="copy the file in its place")
        if special := special_kind(file):
            raise Refused(f"{file}: {special}, not a file")
    if all((folder / name).is_file() for name in _ALWAYS):
        return
    for name, what in _OTHERS.items():
        if (folder / name).is_file():
            raise Refused(f"{folder}: {what}; lora push uploads adapters", hint="hf upload takes any folder")
    absent = next(name for name in _ALWAYS if not (folder / name).is_file())
    raise Refused(f"{folder}: no {absent}", hint="give a result of lora merge, fit, train, convert or extract")


def _upload(file: Path, progress: Progress) -> Upload:
    stamp = stamp_of(file)
    size = stamp[2]
    if size <= _LARGEST_IN_GIT:
        with reading(file):
            return upload_of(file.name, read_regular(file, size + 1))
    sha256 = sha256_of(file, patient(progress))
    return Upload(path=file.name, content=file, sha256=sha256, git_sha1="", size=size, stamp=stamp)


def _own_card(folder: Path, record: Mapping[str, Any]) -> str:
    """The README.md that lora did not write; "" if it wrote it, or if there is none."""
    file = folder / CARD_FILE
    if not file.is_file():
        return ""
    with reading(file):
        data = read_regular(file, _LARGEST_CARD + 1)
    if len(data) > _LARGEST_CARD:
        raise Refused(f"{file}: more than {_LARGEST_CARD:,} bytes are no model card")
    if hashlib.sha256(data).hexdigest() == record["results"].get("card"):
        return ""
    try:
        return data.decode()
    except UnicodeError:
        raise DataError(f"{file}: not UTF-8 text") from None
