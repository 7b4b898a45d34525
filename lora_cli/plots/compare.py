"""Pictures of comparisons: all pairs of many adapters, and two adapters module by module."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from lora_cli.errors import Refused
from lora_cli.plots.figure import cells_of, colours_for, figure_in, label, room_for
from lora_cli.text import counted

# With more rows, labels would overlap.
_MOST_LABELS = 60
# With more adapters, numbers would not fit their cells.
_MOST_VALUES = 20
# Limit the grid: module names come from strangers and could be millions.
_MOST_CELLS = 1_000_000
_ONE, _OTHER = "#1f5fa8", "#d1661c"
_NAN = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePair:
    """Two adapters in one module: norms of the updates, their cosine (None: one is zero), singular values of each."""

    module: str
    norms: tuple[float, float]
    cosine: float | None
    spectra: tuple[Sequence[float], Sequence[float]]


def draw_similarity(
    file: Path, labels: Sequence[str], cosines: Sequence[Sequence[float]], clusters: Sequence[int], modules: int
) -> None:
    """The cosine matrix of N adapters as a heat map in colours of its own range; clusters are framed.

    Args:
        labels, cosines, clusters: in the order of the rows, the matrix (N, N).
        modules: the number of modules in the cosines.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
    n = len(labels)
    shown = [label(one) for one in labels] if n <= _MOST_LABELS else []
    margin = room_for(shown)
    side = max(2.6, (0.3 if n <= _MOST_VALUES else 0.17) * n) if shown else 7.0
    with figure_in(file, (side + margin + 1.3, side + margin + 0.5)) as figure:
        axes = figure.add_subplot()
        # The cosine of an adapter with itself says nothing, and would widen the range of the colours.
        others = [[_NAN if i == j else cosine for j, cosine in enumerate(row)] for i, row in enumerate(cosines)]
        colours = colours_for(cosine for row in others for cosine in row)
        figure.colorbar(colours.draw(axes, others), ax=axes, label="cosine", shrink=0.8)
        frames = _frames(clusters)
        for start, end in frames:
            axes.add_patch(_frame(start, end))
        if shown:
            axes.set_xticks(range(n), shown, rotation=90)
            axes.set_yticks(range(n), shown)
            if n <= _MOST_VALUES:
                colours.write(axes, others, [[_short(cosine) for cosine in row] for row in cosines])
        else:
            # Show the clusters of the table that are large enough for a label.
            seen = [(start, end) for start, end in frames if (end - start) * _MOST_LABELS >= n]
            axes.set(xticks=[], ylabel="cluster")
            axes.set_yticks([(start + end - 1) / 2 for start, end in seen], [str(clusters[at]) for at, _ in seen])
            axes.set_xlabel(f"{n} adapters in the order of their clusters")
        many = f"{counted(len(frames), 'cluster')} of two or more"
        axes.set_title(f"{n} adapters · {counted(modules, 'module')} · {many}")


def draw_diff(file: Path, names: tuple[str, str], pairs: Sequence[ModulePair]) -> None:
    """Two adapters: cosine and both norms by layer and kind of module, and the spectra of all modules.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
        Refused: more modules than fit into a picture.
    """
    cells = cells_of([pair.module for pair in pairs])
    layers, kinds = (list(dict.fromkeys(side)) for side in zip(*cells, strict=True))
    if len(layers) * len(kinds) > _MOST_CELLS:
        raise Refused(
            f"{len(kinds):,} kinds of modules in {len(layers):,} layers: too many to draw", hint="leave out --plot"
        )
    shown = [label(kind) for kind in kinds] if len(kinds) <= _MOST_LABELS else []
    height = min(max(1.2, 0.16 * len(layers)), 9.0) + 1.4 * room_for(shown)
    with figure_in(file, (min(max(8.0, 3.6 + 0.75 * len(kinds)), 24.0), height + 3.6)) as figure:
        figure.suptitle(f"A: {label(names[0], 90)}\nB: {label(names[1], 90)}", ha="left", x=0.02)
        upper, lower = figure.subfigures(2, 1, height_ratios=(height, 2.8))
        cosines = [pair.cosine for pair in pairs]
        one, other = ([pair.norms[side] or None for pair in pairs] for side in (0, 1))
        # Both norms share their colours, so that they can be compared.
        of_cosines, of_norms = (colours_for(v for v in values if v is not None) for values in (cosines, one + other))
        panels = (("cosine", cosines, of_cosines), ("norm of A", one, of_norms), ("norm of B", other, of_norms))
        for axes, (title, values, colours) in zip(upper.subplots(1, 3, sharey=True), panels, strict=True):
            image = colours.draw(axes, _grid(cells, layers, kinds, values), aspect="auto")
            axes.set_title(title, fontsize=8)
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            step = 1 + (len(layers) - 1) // 32
            axes.set_yticks(range(0, len(layers), step), [label(layer, 24) for layer in layers[::step]])
            upper.colorbar(image, ax=axes, location="right")
        upper.axes[0].set_ylabel("layer")
        _draw_spectra(lower.subplots(1, 2, sharey=True), pairs)


def _draw_spectra(both: Any, pairs: Sequence[ModulePair]) -> None:
    """Every module's singular values as a thin line, and their median over the modules."""
    import numpy as np

    for side, (axes, colour) in enumerate(zip(both, (_ONE, _OTHER), strict=True)):
        spectra = [pair.spectra[side] for pair in pairs if len(pair.spectra[side])]
        axes.set_title(f"singular values of {'AB'[side]}", fontsize=8)
        axes.set_xlabel("direction")
        if not spectra:
            axes.text(0.5, 0.5, "changes nothing", ha="center", va="center", transform=axes.transAxes)
            continue
        for spectrum in spectra:
            axes.plot(
                range(1, len(spectrum) + 1), spectrum, color=colour, alpha=0.25, linewidth=0.6, marker=_dot(spectrum)
            )
        longest = max(len(spectrum) for spectrum in spectra)
        # Count missing singular values as 0, else the median could increase with k.
        all_medians = [np.median([s[k] if k < len(s) else 0.0 for s in spectra]) for k in range(longest)]
        medians = [median for median in all_medians if median > 0]
        axes.plot(
            range(1, len(medians) + 1), medians, color=colour, linewidth=1.8, label="median", marker=_dot(medians)
        )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        # With few powers of ten on the axis, label other ticks too.
        low, high = axes.get_ylim()
        digits = "123456789" if high < 10 * low else "25" if high < 1000 * low else ""
        axes.yaxis.set_minor_formatter(
            lambda value, _, digits=digits: f"{value:.6g}" if f"{value:e}"[0] in digits else ""
        )
        axes.set_xlim(0.5, longest + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title=counted(len(spectra), "module"))


def _dot(values: Sequence[float]) -> str:
    """A marker for a line of one point, which would be invisible."""
    return "o" if len(values) == 1 else ""


def _frames(clusters: Sequence[int]) -> list[tuple[int, int]]:
    """The bounds of clusters of two or more."""
    ends = accumulate(sizes := [len([*run]) for _, run in groupby(clusters)])
    return [(end - size, end) for size, end in zip(sizes, ends, strict=True) if size > 1]


def _frame(start: int, end: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start - 0.5, start - 0.5), end - start, end - start, fill=False, edgecolor="black", linewidth=1.2)


def _short(cosine: float) -> str:
    """Two digits, or three if two would round a cosine to 1."""
    text = f"{cosine:.2f}".replace("-0.00", "0.00")
    return f"{cosine:.3f}" if text in ("1.00", "-1.00") and abs(cosine) < 0.9995 else text


def _grid(
    cells: Sequence[tuple[str, str]], layers: Sequence[str], kinds: Sequence[str], values: Sequence[float | None]
) -> list[list[float]]:
    """Values by layer and kind, NaN for none."""
    grid = [[_NAN] * len(kinds) for _ in layers]
    for (layer, kind), value in zip(cells, values, strict=True):
        if value is not None:
            grid[layers.index(layer)][kinds.index(kind)] = value
    return grid
