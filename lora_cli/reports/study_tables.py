"""The tables of a study's report, once for its page and once for Markdown: columns, and rows of numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_cli.columns import Column
from lora_cli.names import unpinned
from lora_cli.reports.study_facts import Control, Report, Row, Used, needed_in_words
from lora_cli.text import counted, difference, duration, interval

AGAINST: dict[Control, str] = {
    "base": "Gain over the base",
    "target": "Gain over a new LoRA on the same data",
    "noise": "Gain over the same fit of random weights",
    "sequential": "Gain over training one LoRA on",
    "alone": "Gain over each task's LoRA alone",
    "next": "Gain over the next rule in order",
}
SCORES = (
    Column("System", "system"),
    Column("Pool", "pool"),
    Column("Score", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("95 % interval", "interval", "right", show=lambda row: interval(row["low"], row["high"])),
    Column("Seeds", "seeds", "right"),
    Column("Of single seeds", "by_seed", "right", show=lambda row: spread(row["by_seed"])),
)
GAINS = (
    Column("System", "system"),
    Column("Pool", "pool"),
    Column("Gain", "gain", "right", show=lambda row: difference(row["gain"], row["low"], row["high"])),
    Column("p", "p", "right", show=lambda row: p_in_words(row["p"])),
    Column("p (Holm)", "p_holm", "right", show=lambda row: p_in_words(row["p_holm"])),
    Column("Shown", "shown", show=lambda row: _shown(row)),
    Column("Wins", "wins", "right"),
    Column("Losses", "losses", "right"),
    Column("Examples to show it", "needed", "right", show=lambda row: needed_in_words(row["needed"])),
)
COSTS = (
    Column("System", "system"),
    Column("Pool", "pool"),
    Column("Score", "value", "right", show=lambda row: f"{row['value']:.3f}"),
    Column("Time", "seconds", "right", show=lambda row: None if row["seconds"] is None else duration(row["seconds"])),
    Column("Tokens", "tokens", "right", show=lambda row: _count(row["tokens"])),
)
ADAPTERS = (
    Column("Adapter", "id"),
    Column("Commit", "commit"),
    Column("Licence", "licence"),
    Column("Cells", "cells"),
)


def score_rows(report: Report) -> list[dict[str, Any]]:
    """The score of each system on each pool."""
    return [
        {
            "system": row.system,
            "pool": row.pool,
            "role": row.role,
            "value": row.value,
            "low": row.low,
            "high": row.high,
            "n": row.n,
            "seeds": len(row.by_seed),
            "by_seed": [*row.by_seed],
            "seconds": row.seconds,
            "tokens": row.tokens,
        }
        for row in report.rows
    ]


def gain_rows(report: Report, control: Control) -> list[dict[str, Any]]:
    """The gain of each system over one control."""
    return [_gain_row(row, control) for row in report.rows if control in row.gains]


def _gain_row(row: Row, control: Control) -> dict[str, Any]:
    gain = row.gains[control]
    return {
        "system": row.system,
        "pool": row.pool,
        "gain": gain.found.delta,
        "low": gain.found.low,
        "high": gain.found.high,
        "p": gain.found.p,
        "p_holm": gain.p_holm,
        "shown": gain.shown,
        "wins": gain.wins,
        "losses": gain.losses,
        "spread": gain.spread,
        "needed": gain.needed,
        "least": gain.least,
    }


def adapter_rows(adapters: Sequence[Used]) -> list[dict[str, Any]]:
    """The adapters that cells were made of."""
    return [
        {
            "id": unpinned(one.pinned),
            "commit": one.pinned.rpartition("@")[2],
            "licence": one.licence,
            "sha256": one.sha256,
            "cells": [*one.cells],
        }
        for one in adapters
    ]


def undone_in_words(report: Report) -> str:
    """How many cells have no result, "" if all have one."""
    parts = [f"{len(one):,} {what}" for one, what in ((report.failed, "failed"), (report.missing, "not tried")) if one]
    if not parts:
        return ""
    return f"{report.done:,} of {counted(report.planned, 'cell')} done, {', '.join(parts)}: the verdict may change."


def spread(values: Sequence[float]) -> str:
    """The range of values over seeds."""
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


def p_in_words(value: float) -> str:
    """A p value for a table."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _shown(row: Mapping[str, Any]) -> str:
    return "not separable" if not row["shown"] else "better" if row["gain"] > 0 else "worse"


def _count(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"
