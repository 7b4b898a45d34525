"""The part of `lora eval` that scores tasks of lm-evaluation-harness."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lora_cli.columns import Column, on_request
from lora_cli.commands.chosen import chosen_or_last
from lora_cli.commands.options import DrawnListing, Loaded
from lora_cli.errors import UsageError
from lora_cli.harness_options import HarnessOptions
from lora_cli.recipes import EvalOptions
from lora_cli.records import TaskScore
from lora_cli.settings import base_of
from lora_cli.text import difference, interval

COLUMNS = (
    Column("SYSTEM", "system", wide=True, least=12),
    Column("TASK", "task", wide=True, least=8),
    Column("METRIC", "metric", wide=True, least=6),
    Column("SCORE", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("STDERR", "stderr", "right", show=lambda row: None if row["stderr"] is None else f"{row['stderr']:.3f}"),
    Column("N", "n", "right"),
    Column("DELTA", "difference", "right", of="delta", show=lambda row: _difference(row)),
    Column("95 % CI", "interval", "right", minor=True, show=lambda row: _interval(row)),
    Column("P", "p", "right", minor=True),
    Column("P HOLM", "p_holm", "right", minor=True),
    *on_request("low", "high", "delta", "delta_low", "delta_high", "higher", "baseline"),
)


def demand_nothing_else(given: object) -> None:
    """Raise UsageError if options are `given` that mean nothing to the harness."""
    if given:
        raise UsageError(
            "--harness goes with --limit, --fewshot, --trust-task, --baseline and --batch-size alone",
            hint="its tasks bring their data, prompts and metrics",
        )


def evaluate_by_harness(
    adapters: list[str] | None,
    out: Path | None,
    setup: Loaded,
    options: EvalOptions,
    harness: HarnessOptions,
    listing: DrawnListing,
    *,
    resume: bool,
) -> None:
    """Score adapters and the bare base on tasks of lm-evaluation-harness, on one load of the base."""
    screen, settings = replace(listing, table=COLUMNS).screen(), setup.load()
    base_of(settings)

    from lora_cli.steps.evaluate.harness import HarnessRequest
    from lora_cli.steps.opened_pool import open_pool

    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = chosen_or_last(pool, adapters, settings)
        baseline, size = options.baseline, options.batch_size
        request = HarnessRequest(pool, names, settings, harness, baseline=baseline, batch_size=size)
        scores = request.run(settings.db, out=out, resume=resume, progress=progress)
    screen.rows(
        "lora.eval.harness/1",
        COLUMNS,
        [asdict(score) for score in scores],
        identity="system",
        caption=f"lm-evaluation-harness {request.run_settings['lm_eval']}, paired differences to {baseline}, "
        f"bootstrap seed {settings.seed}",
        extra={**request.run_settings, "rows_file": str(request.rows(out))},
    )
    for name in idle(scores):
        screen.warn(f"{name} gives the base's values in every metric: 'lora pool verify' tells whether it fits")


def idle(scores: Sequence[TaskScore]) -> list[str]:
    """The systems that give the base's value in every metric, and on every example that can be compared."""
    of_base = {(score.task, score.metric): score.value for score in scores if score.system == "base"}
    others = dict.fromkeys(score.system for score in scores if score.system != "base")
    moved = {
        score.system
        for score in scores
        if score.value != of_base[score.task, score.metric]
        or (score.baseline == "base" and (score.delta_low, score.delta_high) != (0, 0))
    }
    return [name for name in others if name not in moved]


def _interval(row: Mapping[str, Any]) -> str | None:
    return None if row["low"] is None else interval(row["low"], row["high"])


def _difference(row: Mapping[str, Any]) -> str | None:
    return None if row["delta"] is None else difference(row["delta"], row["delta_low"], row["delta_high"])
