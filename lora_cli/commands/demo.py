"""`lora demo`: builds a miniature world and runs the whole tool on it."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_cli.columns import Column
from lora_cli.commands.options import Command, Document, examples, with_flags
from lora_cli.screen import Screen, near
from lora_cli.settings import load
from lora_cli.text import difference, interval

if TYPE_CHECKING:
    from lora_cli.records import Progress, Score
    from lora_cli.world import World
    from lora_cli.world.tour import Chapter

_COLUMNS = (
    Column("TASK", "task", wide=True, least=12),
    Column("SYSTEM", "system", wide=True, least=18),
    Column("SCORE", "score", "right"),
    Column("95 % CI", "interval", "right"),
    Column("N", "n", "right", minor=True),
    Column("Δ VS BASE", "difference", "right"),
    Column("CHANGED", "changed", "right", minor=True),
)


def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that does not exist yet.")] = Path(
        "lora-demo"
    ),
    size: Annotated[
        Literal["small", "test"], typer.Option("--size", help="small (minutes) or test (half a minute).")
    ] = "small",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", show_default="0")] = None,
    study: Annotated[bool, typer.Option("--study", help="Then run a small study on the main task.")] = False,
    *,
    form: Document,
) -> None:
    """Build a miniature world and run sync, select, merge, fit and eval on it; no network, no download.

    Trains a tiny base model and a pool of LoRAs, and breaks some adapters on purpose. One table compares the results.
    The folder stays and has a lora.toml: enter it and try the commands.
    """
    from lora_cli.world import build

    screen = form.screen()
    number = load({"seed": seed}).seed
    with screen.progress() as progress:
        screen.say(f"demo: building a {size} world in {near(folder.absolute())}, seed {number}")
        world = build(folder, size=size, seed=number, progress=progress)

        from lora_cli.world.tour import tour

        db, runs = folder.absolute() / "lora.db", folder.absolute() / "lora-runs"
        found = tour(world, db, runs, progress=progress)
        studied = _studied(world, db, runs / "study", progress) if study else []
    synced = found.synced
    screen.say(
        f"pool: {synced.seen} adapters, {synced.seen - synced.unusable} usable; "
        f"the others are listed with the reason: lora pool list --where 'status!=ok'"
    )
    screen.rows(
        "lora.demo/1",
        _COLUMNS,
        [_row(chapter.target.name, score) for chapter in found.chapters for score in chapter.scores],
        identity="system",
        caption="exact match on prompts never trained on; Wilson and paired bootstrap intervals, 95 %",
        extra={"folder": str(folder.absolute()), "size": size, "seed": number, **({"study": studied} if study else {})},
    )
    for chapter in found.chapters:
        _tell(screen, chapter)
    if study:
        _show_study(screen, found.chapters[0].target.name, studied)
    screen.say("")
    activate = Path(sys.prefix) / "bin" / "activate"
    if shutil.which("lora") is None and activate.is_file():
        screen.say(f"for `lora` to be found: . {near(activate)}")
    screen.say(f"next: cd {near(folder.absolute())}, then")
    for line in ("lora pool sync", "lora merge --method ties", "lora fit --data task.jsonl", "lora eval"):
        screen.say(f"  {line}")


def _studied(world: "World", db: Path, folder: Path, progress: "Progress") -> list[dict[str, Any]]:
    from lora_cli.world.study import small_study

    return small_study(world, db, folder, progress=progress)


def _show_study(screen: Screen, task: str, rows: list[dict[str, Any]]) -> None:
    """The table of the study; a JSON document holds its rows already."""
    from lora_cli.commands.study.shown import LINES

    screen.say("")
    screen.say(f"study of {task}: the same comparison by `lora study`, whose folder is lora-runs/study")
    if screen.format != "json":
        caption = f"exact match, n = {rows[0]['n']}, means over seeds, paired differences, 95 %"
        screen.rows("lora.study/1", LINES, rows, identity="name", caption=caption)


def _row(task: str, score: "Score") -> dict[str, Any]:
    return {
        "task": task,
        "system": score.system,
        "value": score.value,
        "score": f"{score.value:.2f}",
        "low": score.low,
        "high": score.high,
        "interval": interval(score.low, score.high, places=2),
        "n": score.n,
        "delta": score.delta,
        "difference": _difference(score),
        "changed": None if score.delta is None else f"{score.changed}/{score.n}",
    }


def _difference(score: "Score") -> str | None:
    if score.delta is None or score.delta_low is None or score.delta_high is None:
        return None
    return difference(score.delta, score.delta_low, score.delta_high, places=2)


def _tell(screen: Screen, chapter: "Chapter") -> None:
    target = chapter.target
    inside = [name for name in chapter.nearest if name.partition("/")[2] in target.relevant]
    pool = f"the nearest adapters hold {', '.join(inside)}" if inside else "no adapter of the pool was trained on it"
    screen.say("")
    screen.say(f"{target.name}: {pool}")
    for one, other, score in chapter.claims:
        low, high = score.delta_low or 0, score.delta_high or 0
        verdict = "better" if low > 0 else "worse" if high < 0 else "no measurable difference"
        screen.say(f"  {one} − {other}: {_difference(score)}: {verdict}")


def register(root: typer.Typer) -> None:
    """Add `lora demo` to the command tree."""
    root.command(cls=Command, epilog=examples("lora demo", "lora demo tiny --size test --seed 1", "lora demo --study"))(
        with_flags(demo)
    )
