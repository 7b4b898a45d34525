"""Recorded runs: a row per run in the catalogue's database, and a `run.json` beside its output."""

import hashlib
import importlib.metadata
import json
import platform
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_cli.errors import DataError, NothingMatched, OutputError
from lora_cli.migrations import open_for_reading, open_for_writing, writing
from lora_cli.records import Score

RECORD_FILE = "run.json"
_PACKAGES = ("lora-cli", "torch", "safetensors", "numpy", "numba", "transformers", "peft", "huggingface_hub")


@dataclass(slots=True)
class Run:
    """A running run: inputs, outputs and results are added to its record during the work."""

    id: str
    command: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    key: str
    device: str = "cpu"
    outputs: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    lock: dict[str, Any] = field(default_factory=dict)

    def take(self, folder: Path) -> None:
        """Take outputs and results from `folder`, where this run was finished before."""
        record = read_record(folder)
        self.device = record["device"]
        self.outputs.update(record["outputs"])
        self.results.update(record["results"])
        self.lock.update(record.get("merge.lock", {}))

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
        }


def versions() -> dict[str, str]:
    """Versions of Python and of every package used in the arithmetic."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


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
    text = json.dumps([command, settings, inputs, versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def record_text(record: Mapping[str, Any]) -> str:
    """The bytes of a `run.json`."""
    return json.dumps(record, indent=2, sort_keys=True) + "\n"


def finished(folder: Path, key: str) -> bool:
    """True if `folder` holds the finished output of a run with this key."""
    try:
        return bool(read_record(folder)["key"] == key)
    except DataError:
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """The record beside a finished output. DataError if it is missing or malformed."""
    file = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}") from None
    except RecursionError:
        raise DataError(f"{file}: not a record of lora") from None
    if not isinstance(record, dict) or record.get("schema") != "lora.run/1":
        raise DataError(f"{file}: not a record of lora")
    wanted = {"key": str, "device": str, "settings": dict, "inputs": dict, "outputs": dict, "results": dict}
    if not all(isinstance(record.get(name), kind) for name, kind in wanted.items()):
        raise DataError(f"{file}: a damaged record")
    if not isinstance(record.get("merge.lock", {}), dict) or not all(map(_is_plain, record["outputs"])):
        raise DataError(f"{file}: a damaged record")
    return record


def _is_plain(name: str) -> bool:
    """Whether a name is a plain file name, without folders."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def claim(folder: Path, key: str, *, force: bool, replace: bool = False) -> bool:
    """Is this run's result already in `folder`? True: reuse it. False: the folder is free, do the work.

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
        if finished(folder, key):
            if not force and (changed := _changed(folder)):
                raise OutputError(
                    f"{folder / changed} has changed since it was written", hint="replace the folder with --force"
                )
            return not force
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


def _changed(folder: Path) -> str:
    """The first output that is missing or differs from its record, "" for none."""
    outputs = read_record(folder)["outputs"]
    for name, sha256 in outputs.items():
        # Open regular files only: opening a pipe could block for ever.
        if not (folder / name).is_file():
            return str(name)
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return str(name)
    return "" if outputs else RECORD_FILE


def is_output(folder: Path) -> bool:
    """True if `folder` was made by a recorded run."""
    try:
        read_record(folder)
    except DataError:
        return False
    return True


@contextmanager
def recorded(
    db: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str], out: Path | None
) -> Iterator[Run]:
    """Record a run around its work, even if the work fails.

    Args:
        inputs: `id@commit` (or a file's name) → SHA-256 of its bytes.
        out: folder or file that the run makes.
    """
    if out is not None and not str(out).isprintable():
        raise OutputError(f"{str(out)!r}: a name with characters that do not print", hint="choose another -o")
    now = datetime.now(UTC)
    run = Run(
        id=f"{now:%Y%m%dT%H%M%S}-{command}-{secrets.token_hex(3)}",
        command=command,
        settings=settings,
        inputs=inputs,
        key=key_of(command, settings, inputs),
    )
    with closing(open_for_writing(db)) as connection:
        with writing(connection) as table:
            # An older "running" row for this output was killed or will lose the rename: mark it failed.
            table.execute(
                "UPDATE runs SET status = 'failed', error = 'interrupted (no end was recorded)' "
                "WHERE status = 'running' AND out = ?",
                [str(out.absolute()) if out else None],
            )
            table.table("runs").insert(
                {"id": run.id, "command": command, "status": "running", "started": now.isoformat(),
                 "out": str(out.absolute()) if out else None, "record": json.dumps(run.record())}
            )  # fmt: skip
        status, error = "failed", None
        try:
            yield run
            status = "done"
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
            raise
        finally:
            ended = {"status": status, "ended": datetime.now(UTC).isoformat(), "error": error}
            with writing(connection) as table:
                table.table("runs").update(run.id, {**ended, "record": json.dumps(run.record())})


def add_scores(db: Path, run: Run, scores: Sequence[Score], adapters: Mapping[str, Sequence[str]], task: str) -> None:
    """Store the scores of an evaluation. `adapters` maps a system to its `id@commit`s; `task` is the data's SHA-256."""
    rows = []
    for score in scores:
        values = asdict(score)
        rows.append(
            {"run_id": run.id, "task_sha256": task, "adapters": json.dumps(list(adapters.get(score.system, ())))}
            | {name: values.pop(name) for name in ("system", "metric", "value", "low", "high", "n")}
            | {"details": json.dumps(values)}
        )
    with closing(open_for_writing(db)) as connection, writing(connection) as table:
        table.table("scores").insert_all(rows)


def all_runs(db: Path, *, command: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """The latest runs, newest first."""
    with closing(open_for_reading(db)) as connection:
        where, values = ("command = ?", [command]) if command else (None, [])
        rows = connection["runs"].rows_where(where, values, order_by="started desc, rowid desc", limit=limit)
        return [dict(row) for row in rows]


def find(db: Path, prefix: str) -> dict[str, Any]:
    """The one run whose id starts with `prefix`, with its record and its scores.

    Raises:
        NothingMatched: no such run, or more than one.
    """
    with closing(open_for_reading(db)) as connection:
        matches = list(connection["runs"].rows_where("substr(id, 1, ?) = ?", [len(prefix), prefix], limit=3))
        if len(matches) != 1:
            problem = "no run" if not matches else "more than one run"
            raise NothingMatched(f"{problem} whose id starts with {prefix!r}", hint="see 'lora runs list'")
        [row] = matches
        scores = [dict(score) for score in connection["scores"].rows_where("run_id = ?", [row["id"]])]
    for score in scores:
        score.update(adapters=json.loads(score["adapters"]), details=json.loads(score["details"]))
    return {**row, "record": json.loads(row["record"]), "scores": scores}


def remove(db: Path, ids: Sequence[str]) -> None:
    """Delete runs and their scores; output files stay."""
    with closing(open_for_writing(db)) as connection, writing(connection) as table:
        for id in ids:
            table.execute("DELETE FROM scores WHERE run_id = ?", [id])
            table.execute("DELETE FROM runs WHERE id = ?", [id])


def latest_output(db: Path, commands: Sequence[str], holding: str = "") -> tuple[str, Path] | None:
    """Command and folder of the newest finished run of one of `commands` whose output still exists.

    holding: a file that must be in the output.
    """
    with closing(open_for_reading(db)) as connection:
        marks = ", ".join("?" * len(commands))
        where = f"status = 'done' and out is not null and command in ({marks})"
        for row in connection["runs"].rows_where(where, list(commands), order_by="started desc, rowid desc"):
            if Path(row["out"], holding).exists():
                return row["command"], Path(row["out"])
    return None
