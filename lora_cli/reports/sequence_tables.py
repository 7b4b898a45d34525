"""The tables of a sequence's report, once for its page and once for Markdown: columns, and rows of numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from lora_cli.columns import Column
from lora_cli.reports.study_facts import Ruled, SequenceReport
from lora_cli.reports.study_tables import gain_rows, p_in_words, spread
from lora_cli.text import difference

MEASURES = (
    Column("Rule", "system"),
    Column("Final", "final", "right", show=lambda row: _over_seeds(row, "final")),
    Column("Forgetting", "forgetting", "right", show=lambda row: _over_seeds(row, "forgetting")),
    Column("Backward transfer", "backward_transfer", "right", show=lambda row: _over_seeds(row, "backward_transfer")),
    Column("Forward transfer", "forward_transfer", "right", show=lambda row: _over_seeds(row, "forward_transfer")),
    Column("Seeds", "seeds", "right", show=lambda row: len(row["seeds"])),
)
ORDER = (
    Column("Place", "place", "right"),
    Column("Rule", "system"),
    Column("Final", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("Gain over the next one", "gain", "right", show=lambda row: _gain(row)),
    Column("p (Holm)", "p_holm", "right", show=lambda row: None if row["gain"] is None else p_in_words(row["p_holm"])),
    Column("Order", "shown", show=lambda row: _shown(row)),
)
RULES = (
    Column("Rule", "system"),
    Column("Merge method", "method"),
    Column("Weights of the running LoRA and the new one at task t", "weights"),
)
TASKS = (
    Column("Task", "system"),
    Column("Test examples", "n", "right"),
    Column("Base", "base", "right", show=lambda row: None if row["base"] is None else f"{row['base']:.3f}"),
    Column("Training data (sha256)", "train"),
    Column("Test data (sha256)", "test"),
)
LORAS = (
    Column("LoRA trained alone", "system"),
    Column("Task", "task"),
    Column("Weights (sha256)", "sha256"),
)


def without_pool(columns: Sequence[Column]) -> list[Column]:
    """The columns of a study's table that a sequence has, whose rules take no pools."""
    named = [replace(column, heading="Rule") if column.key == "system" else column for column in columns]
    return [column for column in named if column.key != "pool"]


def rule_rows(report: SequenceReport) -> list[dict[str, Any]]:
    """Each rule with its measures, as means over the seeds and by seed."""
    return [_rule_row(one) for one in report.rules]


def _rule_row(one: Ruled) -> dict[str, Any]:
    return {
        "system": one.rule,
        "method": one.method,
        "weights": one.weights,
        "seeds": [*one.seeds],
        "a": [[*row] for row in one.a],
        **{name: fmean(values) for name, values in one.measures.items()},
        "by_seed": {name: [*values] for name, values in one.measures.items()},
    }


def order_rows(report: SequenceReport) -> list[dict[str, Any]]:
    """The rules from the best to the worst, each beside the one behind it."""
    values, gains = {row.system: row.value for row in report.rows}, gain_rows(report, "next")
    beside = {row["system"]: row for row in gains}
    rows = []
    for place, rule in enumerate(report.order, 1):
        found = beside.get(rule, {})
        told = {name: found.get(name) for name in ("gain", "low", "high", "p_holm", "shown", "needed")}
        rows.append({"place": place, "system": rule, "value": values[rule], **told})
    return rows


def task_rows(report: SequenceReport) -> list[dict[str, Any]]:
    """The tasks in their order."""
    return [
        {"system": one.name, "n": one.n, "base": one.base, "train": one.train, "test": one.test} for one in report.tasks
    ]


def lora_rows(report: SequenceReport) -> list[dict[str, Any]]:
    """The LoRAs of which all others are made."""
    return [{"system": one.cell, "task": one.task, "sha256": one.sha256} for one in report.loras]


def _over_seeds(row: Mapping[str, Any], name: str) -> str:
    values = row["by_seed"][name]
    return f"{row[name]:.3f}" if len(values) == 1 else f"{row[name]:.3f} ({spread(values)})"


def _gain(row: Mapping[str, Any]) -> str | None:
    return None if row["gain"] is None else difference(row["gain"], row["low"], row["high"])


def _shown(row: Mapping[str, Any]) -> str | None:
    return None if row["gain"] is None else "shown" if row["shown"] else "not separable"
