"""Recorded runs: a row per run in the catalogue's database."""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_cli.catalogue.database import open_for_reading, open_for_writing, writing
from lora_cli.catalogue.rows import text
from lora_cli.errors import NothingMatched, OutputError
from lora_cli.formats.run_record import Run, key_of
from lora_cli.records import Score, TaskScore
from lora_cli.redaction import redacted


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
    run = new_run(now, command, settings, inputs)
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
            error = redacted(f"{type(caught).__name__}: {caught}")
            raise
        finally:
            ended = {"status": status, "ended": datetime.now(UTC).isoformat(), "error": error}
            with writing(connection) as table:
                table.table("runs").update(run.id, {**ended, "record": json.dumps(run.record())})


def new_run(now: datetime, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Run:
    """A run that begins now."""
    return Run(
        id=f"{now:%Y%m%dT%H%M%S}-{command}-{secrets.token_hex(3)}",
        command=command,
        settings=settings,
        inputs=inputs,
        key=key_of(command, settings, inputs),
    )


def add_scores(
    db: Path,
    run: Run,
    scores: Sequence[Score | TaskScore],
    adapters: Mapping[str, Sequence[str]],
    task: str,
    *,
    called: str = "",
) -> None:
    """Store the scores of an evaluation. `adapters` maps a system to its `id@commit`s; `task` is the data's SHA-256.

    The task is `called` so, else by its file and the first digits of its hash. A system of one adapter is a score of
    this adapter.
    """
    called = called or f"{run.settings['data']}@{task[:8]}"
    rows = []
    for score in scores:
        values, pinned = asdict(score), list(adapters.get(score.system, ()))
        id, _, commit = pinned[0].rpartition("@") if len(pinned) == 1 else ("", "", "")
        rows.append(
            {"run_id": run.id, "task_sha256": task, "task": called}
            | {"adapters": json.dumps(pinned), "adapter": id, "commit": commit}
            | {name: values.pop(name) for name in ("system", "metric", "value", "low", "high", "n")}
            | {"details": json.dumps(values)}
        )
    with closing(open_for_writing(db)) as connection, writing(connection) as table:
        for row in rows:
            found = table.execute("SELECT key FROM adapters WHERE id = ?", [text(row["adapter"])]).fetchone()
            row["adapter"] = found[0] if found else None
        table.table("scores").insert_all(rows)


def all_runs(db: Path, *, command: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
    """The latest runs, newest first."""
    with closing(open_for_reading(db)) as connection:
        where, values = ("command = ?", [command]) if command else (None, [])
        rows = connection["runs"].rows_where(where, values, order_by="started desc, rowid desc", limit=limit)
        return [dict(row) for row in rows]


def all_inputs(db: Path) -> list[str]:
    """The inputs of all runs: `id@commit`, or the name of a file."""
    with closing(open_for_reading(db)) as connection:
        rows = connection.execute("SELECT DISTINCT key FROM runs, json_each(record, '$.inputs')")
        return [str(row[0]) for row in rows]


def find(db: Path, prefix: str) -> dict[str, Any]:
    """The one run whose id starts with `prefix`, with its record and the scores that it computed.

    Raises:
        NothingMatched: no such run, or more than one.
    """
    with closing(open_for_reading(db)) as connection:
        matches = list(connection["runs"].rows_where("substr(id, 1, ?) = ?", [len(prefix), prefix], limit=3))
        if len(matches) != 1:
            problem = "no run" if not matches else "more than one run"
            raise NothingMatched(f"{problem} whose id starts with {prefix!r}", hint="see 'lora runs list'")
        [row] = matches
        scores = [dict(score) for score in connection["scores"].rows_where("run_id = ? AND NOT imported", [row["id"]])]
    for score in scores:
        score.update(adapters=json.loads(score["adapters"]), details=json.loads(score["details"]))
    return {**row, "record": json.loads(row["record"]), "scores": scores}


def remove(db: Path, ids: Sequence[str]) -> None:
    """Delete runs and their scores; output files stay."""
    with closing(open_for_writing(db)) as connection, writing(connection) as table:
        for id in ids:
            table.execute("DELETE FROM scores WHERE run_id = ?", [id])
            table.execute("DELETE FROM runs WHERE id = ?", [id])


def pushed_as(db: Path, commit: str) -> list[str]:
    """Where the adapter of this commit was pushed to, as `owner/name@commit`, the newest push first."""
    query = (
        "SELECT json_extract(record, '$.results.repo') || '@' || json_extract(record, '$.results.commit') AS place "
        "FROM runs JOIN json_each(record, '$.inputs') j WHERE command = 'push' AND status = 'done' "
        "AND substr(j.key, -41) = ? GROUP BY place ORDER BY max(started) DESC, max(runs.rowid) DESC"
    )
    with closing(open_for_reading(db)) as connection:
        return [str(row[0]) for row in connection.execute(query, [f"@{commit}"]) if row[0] is not None]


def latest_output(db: Path, commands: Sequence[str], *holding: str) -> tuple[str, Path] | None:
    """Command and folder of the newest finished run of one of `commands` whose output still exists.

    holding: files, one of which must be in the output.
    """
    with closing(open_for_reading(db)) as connection:
        marks = ", ".join("?" * len(commands))
        where = f"status = 'done' and out is not null and command in ({marks})"
        for row in connection["runs"].rows_where(where, list(commands), order_by="started desc, rowid desc"):
            if any(Path(row["out"], name).exists() for name in holding or ("",)):
                return row["command"], Path(row["out"])
    return None
