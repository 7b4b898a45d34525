"""A picture of a sequence: the scores on every task after each task was learnt, one heat map per rule."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_cli.plots.figure import colours_for, figure_in, label, room_for

# With more tasks, numbers would not fit their cells.
_MOST_VALUES = 12
_CELL, _LEAST, _WIDE = 0.42, 1.6, 3
"""Inches of a cell and of the smallest heat map; heat maps beside each other."""


def draw_sequence(
    file: Path, tasks: Sequence[str], grids: Mapping[str, Sequence[Sequence[float]]], metric: str
) -> None:
    """The scores a[i][j] of each rule as a heat map: rows are the tasks learnt so far, columns the tasks scored.

    All heat maps share their colours, so that rules can be compared.

    Args:
        tasks: (T,) names in the order of the sequence.
        grids: rule → (T, T).
        metric: what the scores are, in words.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
    names = [label(task) for task in tasks]
    across, down = min(_WIDE, len(grids)), -(-len(grids) // _WIDE)
    margin, side = room_for(names), max(_LEAST, _CELL * len(tasks))
    with figure_in(file, (across * side + margin + 1.4, down * (side + 0.4) + margin + 0.5)) as figure:
        colours = colours_for(score for grid in grids.values() for row in grid for score in row)
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (rule, grid) in zip(panels, grids.items(), strict=False):
            image = colours.draw(axes, grid)
            if len(tasks) <= _MOST_VALUES:
                colours.write(axes, grid, [[f"{score:.2f}" for score in row] for row in grid])
            axes.set_title(label(rule), fontsize=8)
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        for axes in panels[len(grids) :]:
            axes.set_axis_off()
        for axes in panels[max(0, len(grids) - across) : len(grids)]:
            axes.tick_params(axis="x", labelbottom=True)
        figure.supylabel("after learning", fontsize=8)
        figure.supxlabel("score on", fontsize=8)
        figure.colorbar(image, ax=panels.tolist(), label=metric, shrink=0.8)
