"""`run.json`, the record beside every output: how it was made, and whether it is still what was made."""

import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lora_cli.errors import DataError, OutputError
from lora_cli.files import read_given
from lora_cli.hashes import file_sha256
from lora_cli.records import Progress, patient, silent
from lora_cli.redaction import redacted

RECORD_FILE = "run.json"
_PACKAGES = ("lora-cli", "torch", "safetensors", "numpy", "numba", "transformers", "peft", "huggingface_hub")


@dataclass(slots=True)
class Run:
    """A running run: inputs, outputs and results are added to its record during the work.

    `unfinished` says where the work stopped before its end; a rerun goes on from there, and replaces the output.
    """

    id: str
    command: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    key: str
    device: str = "cpu"
    outputs: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)
    unfinished: str = ""

    def take(self, folder: Path) -> None:
        """Take outputs and results from `folder`, where this run was finished before."""
        record = read_record(folder)
        self.device = record["device"]
        self.outputs.update(record["outputs"])
        self.results.update(record["results"])
        self.lock.update(record.get("merge.lock", {}))

    def write(self, folder: Path) -> None:
        """Write `run.json` into `folder`."""
        text = redacted(json.dumps(self.record(), indent=2, sort_keys=True))
        (folder / RECORD_FILE).write_text(text + "\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """The contents of `run.json`, without times and paths, so that equal work gives equal bytes."""
        return {
            "schema": "lora.run/1",
            "key": self.key,
            "command": self.command,
            "settings": dict(self.settings),
            "inputs": dict(self.inputs),
            "device": self.device,
            "versions": versions(),
            "outputs": self.outputs,
            "results": self.results,
            **({"merge.lock": self.lock} if self.lock else {}),
            **({"unfinished": self.unfinished} if self.unfinished else {}),
        }


def versions() -> dict[str, str]:
    """Versions of Python and of every package used in the arithmetic."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def peak_bytes() -> int:
    """The peak memory of this process, as the system counts it."""
    try:
        # getrusage includes the parent's memory at the fork, so read /proc instead.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def key_of(command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """SHA-256 over everything that decides the result of a run: equal keys mean equal work."""
    return _key(command, settings, inputs, versions())


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether the command, settings, inputs and versions of a record are those of its key."""
    deciding = (record.get(name) for name in ("command", "settings", "inputs", "versions"))
    return bool(record["key"] == _key(*deciding))


def _key(*deciding: Any) -> str:
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def made_by(folder: Path, key: str) -> Literal["", "unfinished", "finished"]:
    """Whether `folder` holds the output of a run with this key, and whether its work came to its end."""
    try:
        record = read_record(folder)
    except DataError:
        return ""
    if record["key"] != key:
        return ""
    return "unfinished" if record.get("unfinished") else "finished"


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside a finished output. DataError if it is missing or malformed."""
    file = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(read_given(file).decode())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file}: {error}") from None
    except RecursionError:
        raise DataError(f"{file}: not a record of lora") from None
    if not isinstance(record, dict) or record.get("schema") != "lora.run/1":
        raise DataError(f"{file}: not a record of lora")
    wanted = {"key": str, "device": str, "settings": dict, "inputs": dict, "outputs": dict, "results": dict}
    if not all(isinstance(record.get(name), kind) for name, kind in wanted.items()):
        raise DataError(f"{file}: a damaged record")
    if not isinstance(record.get("merge.lock", {}), dict) or not all(map(_is_inside, record["outputs"])):
        raise DataError(f"{file}: a damaged record")
    return record


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it."""
    return all(map(is_plain, name.split("/")))


def is_plain(name: str) -> bool:
    """Whether a name is a plain file name, without folders."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def claim(folder: Path, key: str, *, force: bool, replace: bool = False, progress: Progress = silent) -> bool:
    """Is this run's result already in `folder`? True: reuse it. False: do the work, which may replace what is there.

    Args:
        force: redo the work in any case; whatever output the folder holds may be replaced.
        replace: an output of another run may be replaced.

    Raises:
        OutputError: the folder holds an output that may not be replaced, a result that was changed or cut short since,
            or something that this tool did not make.
    """
    try:
        if folder.is_symlink():
            raise OutputError(f"{folder}: a link; outputs are never written through links")
        if made := made_by(folder, key):
            if not force and (changed := _changed(folder, progress)):
                raise OutputError(
                    f"{folder / changed} has changed since it was written", hint="replace the folder with --force"
                )
            return made == "finished" and not force
        if not folder.exists():
            return False
        if not (force or replace):
            raise OutputError(f"{folder} exists", hint="choose another folder with -o, or replace it with --force")
        if not (folder.is_dir() and (is_output(folder) or not any(folder.iterdir()))):
            raise OutputError(f"{folder}: not an output of lora, so --force leaves it alone", hint="choose another -o")
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be read ({error.strerror})", hint="choose another folder with -o"
        ) from error
    return False


def _changed(folder: Path, progress: Progress) -> str:
    """The first output that is missing or differs from its record, "" for none."""
    outputs, report = read_record(folder)["outputs"], patient(progress)
    for name, sha256 in outputs.items():
        # Open regular files only: opening a pipe could block for ever.
        if not (folder / name).is_file():
            return str(name)
        if file_sha256(folder / name, report) != sha256:
            return str(name)
    return "" if outputs else RECORD_FILE


def is_output(folder: Path) -> bool:
    """True if `folder` was made by a recorded run."""
    try:
        read_record(folder)
    except DataError:
        return False
    return True
