"""Pictures of results: the losses and coefficients of a fit, and the scores of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from lora_cli.metrics import METRICS
from lora_cli.plots.figure import LABEL_SIZE, NO_LAYER, cells_of, colours_for, figure_in, label, room_for
from lora_cli.records import Coefficients, Score
from lora_cli.text import counted

_WIDTH = 9.0
# Inches of one row with a label, of one column with a label, and of one with a number in each cell.
_ROW, _COLUMN, _NUMBER = 0.17, 0.15, 0.36
# Inches of the loss curves, and of the bar of colours.
_CURVES, _BAR = 2.7, 0.65
# With more rows, a picture would be longer than programs show: labels are left out.
_MOST_ROWS = 400
_LONGEST = 0.05 * _MOST_ROWS
_MOST_LABELS = 60
_MOST_VALUES = 20
_OURS, _THEIRS = "#1f5fa8", "#d1661c"
_LEVELS = (("#d1661c", "--"), ("#7a7a7a", "-."), ("#8c5fa8", ":"), ("#3f8f4f", "--"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The losses of a fit: (step, training loss if any, validation loss) of each point, and those of others by name."""

    points: Sequence[tuple[int, float | None, float]]
    best_step: int
    others: Mapping[str, float]


def draw_fit(file: Path, losses: Losses, coefficients: Coefficients) -> None:
    """The loss curves of a fit, and its coefficients as a heat map of adapters × modules, the largest at the top.

    A column is a part of the model that has coefficients of its own. Of coefficients per rank it shows the mean.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
    columns, grid = _coefficients(coefficients)
    order = sorted(range(len(grid)), key=lambda row: (-sum(abs(c) for c in grid[row] if c == c), row))
    grid, n = [grid[row] for row in order], len(grid)
    adapters = [label(coefficients.adapters[row].rpartition("@")[0]) for row in order]
    # If a column is a whole layer, the number of the layer is enough.
    named = len(columns) <= _MOST_LABELS and any(part for _, part in columns)
    below = [label(" ".join(column).removeprefix(NO_LAYER).strip()) for column in columns] if named else []
    numbers = _numbers(grid) if len(columns) <= _MOST_VALUES and n <= _MOST_ROWS else None
    wide = min((_NUMBER if numbers else _COLUMN) * len(columns), _COLUMN * _MOST_LABELS)
    width = max(_WIDTH, wide + room_for(adapters) + 0.6)
    height = _rows(n) + room_for(below) + 0.6
    with figure_in(file, (width, _CURVES + _BAR + height)) as figure:
        upper, middle, lower = figure.subfigures(3, 1, height_ratios=(_CURVES, _BAR, height))
        _draw_losses(upper, losses)
        colours = colours_for(c for row in grid for c in row)
        axes = lower.add_subplot()
        image = colours.draw(axes, grid, aspect="auto")
        bar = figure.colorbar(image, cax=middle.add_subplot(), orientation="horizontal")
        mean = ", the mean over ranks" if coefficients.granularity == "rank" else ""
        bar.set_label(f"coefficient{mean}")
        if numbers:
            colours.write(axes, grid, numbers)
        if below:
            axes.set_xticks(range(len(columns)), below, rotation=90)
        else:
            _name_layers(axes, columns)
        _name_rows(axes, adapters)
        parts = counted(len(columns), _PARTS[coefficients.granularity])
        axes.set_title(f"{counted(n, 'adapter')}, the largest coefficients first · {parts}")


def draw_scores(file: Path, scores: Sequence[Score], data: str) -> None:
    """The score of each system with its 95 % interval, the best at the top; the baseline in a colour of its own.

    A dot is filled if the difference to the baseline is beyond chance. `data` names the test data.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
    from matplotlib.lines import Line2D

    metric = METRICS.get(scores[0].metric)
    best_first = sorted(scores, key=lambda score: score.value, reverse=metric.better == "higher")
    baseline = next(score for score in scores if not score.baseline)
    names = [label(score.system) for score in best_first]
    with figure_in(file, (_WIDTH, _rows(len(names)) + 1.3)) as figure:
        axes = figure.add_subplot()
        axes.axvline(baseline.value, color=_THEIRS, linewidth=0.8, linestyle="--", zorder=1)
        for row, score in enumerate(best_first):
            colour = _THEIRS if score is baseline else _OURS
            axes.plot([score.low, score.high], [row, row], color=colour, linewidth=1.2, zorder=2)
            filled = colour if score is baseline or score.measurable else "white"
            axes.plot([score.value], [row], "o", color=colour, markerfacecolor=filled, markersize=4.5, zorder=3)
        _name_rows(axes, names)
        if len(names) <= _MOST_ROWS:
            right = axes.secondary_yaxis("right")
            right.set_yticks(range(len(names)), [f"{score.value:.3f}" for score in best_first])
            right.tick_params(length=0, labelsize=LABEL_SIZE)
        axes.set_ylim(len(names) - 0.5, -0.5)
        # Also at the top, if the bottom may be out of sight.
        axes.tick_params(axis="x", top=len(names) > _MOST_LABELS, labeltop=len(names) > _MOST_LABELS)
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel(f"{metric.summary[:-1]} ({metric.better} is better), with 95 % intervals")
        axes.set_title(f"{label(data)}, n = {baseline.n}")
        kinds = (
            (_THEIRS, _THEIRS, f"baseline: {label(baseline.system)}"),
            (_OURS, _OURS, "differs from the baseline"),
            (_OURS, "white", "no measurable difference"),
        )
        dots = [
            Line2D([], [], color=colour, markerfacecolor=inner, marker="o", markersize=4.5, linewidth=1.2, label=text)
            for colour, inner, text in kinds
        ]
        figure.legend(handles=dots, loc="outside upper center", ncols=3, frameon=False, fontsize=LABEL_SIZE)


_PARTS = {"adapter": "part", "layer": "layer", "sublayer": "sublayer", "module": "module", "rank": "module"}


def _draw_losses(figure: Any, losses: Losses) -> None:
    axes = figure.add_subplot()
    trained = [(step, training) for step, training, _ in losses.points if training is not None]
    steps, validation = [step for step, _, _ in losses.points], [loss for _, _, loss in losses.points]
    axes.plot(*zip(*trained, strict=True), color="#9dbbe0", linewidth=1.2, marker=".", label="training")
    axes.plot(steps, validation, color=_OURS, linewidth=1.6, marker=".", label="validation")
    best = validation[steps.index(losses.best_step)]
    axes.plot([losses.best_step], [best], "o", color=_OURS, markersize=7, label=f"best: {best:.3f}")
    for (name, loss), (colour, dashes) in zip(losses.others.items(), _LEVELS, strict=False):
        axes.axhline(loss, color=colour, linewidth=1.2, linestyle=dashes, label=f"{name}: {loss:.3f}")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)


def _coefficients(coefficients: Coefficients) -> tuple[list[tuple[str, str]], list[list[float]]]:
    """(layer, part) of each column, and the coefficient of each adapter there, NaN for an adapter without ranks."""
    modules = [*coefficients.values]
    parts = dict(zip(modules, (_part(*cell, coefficients.granularity) for cell in cells_of(modules)), strict=True))
    columns = list(dict.fromkeys(parts.values()))
    places = {column: place for place, column in enumerate(columns)}
    grid = [[math.nan] * len(columns) for _ in coefficients.adapters]
    for module, rows in coefficients.values.items():
        for line, ranks in zip(grid, rows, strict=True):
            place = places[parts[module]]
            # An adapter that lacks a module has 0 there, and its coefficient in other modules of the same part.
            if ranks and not abs(line[place]) > 0:
                line[place] = math.fsum(ranks) / len(ranks)
    return columns, grid


def _part(layer: str, module: str, granularity: str) -> tuple[str, str]:
    """The part of the model whose coefficients a module shares."""
    if granularity == "adapter":
        return "", "all modules"
    if layer == NO_LAYER or granularity in ("module", "rank"):
        return layer, module
    return layer, "" if granularity == "layer" else module.partition(".")[0]


def _numbers(grid: Sequence[Sequence[float]]) -> list[list[str]] | None:
    """The coefficients with two or three digits of the largest one; None if they would not fit their cells."""
    largest = max((abs(c) for row in grid for c in row if c == c), default=0.0)
    if not 1e-2 <= largest < 1e3:
        return None
    exponent = math.floor(math.log10(largest))
    digits = 2 - exponent if exponent >= 0 else 1 - exponent
    # Adding 0 turns -0 into 0.
    return [[f"{round(c, digits) + 0.0:.{digits}f}" for c in row] for row in grid]


def _name_layers(axes: Any, columns: Sequence[tuple[str, str]]) -> None:
    """Label columns (layer, part) by their layers: one tick at the middle of each, as many as have room.

    A line stands between two layers; the parts are named once, if all layers have the same ones.
    """
    runs, parts, start = list[tuple[str, float]](), set[tuple[str, ...]](), 0
    for layer, run in groupby(columns, key=lambda column: column[0]):
        own = tuple(part.rpartition(".")[2] for _, part in run)
        runs.append((layer, start + (len(own) - 1) / 2))
        start += len(own)
        if layer != NO_LAYER:
            parts.add(own)
        if any(own) and start < len(columns):
            axes.axvline(start - 0.5, color="#555555", linewidth=0.4)
    step = 1 + (len(runs) - 1) // _MOST_LABELS
    names = [label(layer, 24) for layer, _ in runs[::step]]
    axes.set_xticks([middle for _, middle in runs[::step]], names, rotation=90 if room_for(names) > _COLUMN else 0)
    [same] = parts if len(parts) == 1 else [()]
    within = f", and in each from the left: {', '.join(label(part, 24) for part in same)}" if len(same) > 1 else ""
    axes.set_xlabel(f"layer{within}" if len(same) <= _MOST_VALUES else "layer")


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)) if len(names) <= _MOST_ROWS else [], names if len(names) <= _MOST_ROWS else [])
    axes.tick_params(axis="y", length=0, labelsize=LABEL_SIZE)


def _rows(count: int) -> float:
    """The inches of so many rows."""
    return max(0.5, _ROW * count) if count <= _MOST_ROWS else _LONGEST
