"""A small study on the main task of a finished world, as `lora demo --study` shows it."""

from pathlib import Path
from typing import Any

from lora_cli.api import open_pool
from lora_cli.records import Progress, silent
from lora_cli.world.layout import World
from lora_cli.world.tour import CHOSEN, NEW_LORA, NEW_LORA_RECIPE

SYSTEMS = "base,average,ties,lego,adaptive,adaptive+target,target"
SEEDS = 2


def small_study(world: World, db: Path, folder: Path, *, progress: Progress = silent) -> list[dict[str, Any]]:
    """Compare ways to recycle the world's pool for its main task: the rows of `lora study --json`.

    The catalogue `db` holds the pool. The study's folder is `folder`; cells that are done there are not done again.

    Raises:
        Partial: a cell failed; the others are kept.
    """
    target = world.targets[0]
    with open_pool(
        str(world.base), db=db, progress=progress, base_aliases=(world.base_name,), device="cpu", seed=world.seed
    ) as pool:
        return pool.study(
            data=target.train,
            test=target.test,
            out=folder,
            jobs=None,
            systems=SYSTEMS,
            seeds=SEEDS,
            k=CHOSEN[world.size],
            target_rank=NEW_LORA.rank,
            target_alpha=NEW_LORA.alpha,
            target_dropout=NEW_LORA.dropout,
            target_steps=NEW_LORA_RECIPE.steps,
            target_lr=NEW_LORA_RECIPE.lr,
        )
