"""Pictures of comparisons, as PNG or SVG: the only user of matplotlib. Equal numbers give equal bytes."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from lora_cli.errors import OutputError, Refused, UsageError
from lora_cli.names import layer_of
from lora_cli.screen import safe
from lora_cli.text import counted

FORMATS = (".png", ".svg")
# With more rows, labels would overlap.
_MOST_LABELS = 60
# With more adapters, numbers would not fit their cells.
_MOST_VALUES = 20
# Limit the grid: module names come from strangers and could be millions.
_MOST_CELLS = 1_000_000
_LONGEST_LABEL = 36
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 150,
    # Show a stranger's id as plain text, never as mathematics or TeX.
    "text.parse_math": False,
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lora",
}
_ONE, _OTHER = "#1f5fa8", "#d1661c"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePair:
    """Two adapters in one module: norms of the updates, their cosine (None: one is zero), singular values of each."""

    module: str
    norms: tuple[float, float]
    cosine: float | None
    spectra: tuple[Sequence[float], Sequence[float]]


def demand_plottable(file: Path) -> None:
    """UsageError unless the name of a plot ends in a supported format."""
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"{file.name}: a plot is .png or .svg", hint="give --plot NAME.svg")


def draw_similarity(
    file: Path, labels: Sequence[str], cosines: Sequence[Sequence[float]], clusters: Sequence[int], modules: int
) -> None:
    """The cosine matrix of N adapters as a heat map; clusters are framed.

    Args:
        labels, cosines, clusters: in the order of the rows, the matrix (N, N).
        modules: the number of modules in the cosines.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
    n = len(labels)
    shown = [_label(label) for label in labels] if n <= _MOST_LABELS else []
    margin = 0.065 * max(map(len, shown), default=0)
    side = max(2.6, (0.3 if n <= _MOST_VALUES else 0.17) * n) if shown else 7.0
    with _figure(file, (side + margin + 1.3, side + margin + 0.5)) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
        frames = _frames(clusters)
        for start, end in frames:
            axes.add_patch(_frame(start, end))
        if shown:
            axes.set_xticks(range(n), shown, rotation=90)
            axes.set_yticks(range(n), shown)
            axes.tick_params(length=0, labelsize=7)
            if n <= _MOST_VALUES:
                _write_values(axes, cosines)
        else:
            # Show the clusters of the table that are large enough for a label.
            seen = [(start, end) for start, end in frames if (end - start) * _MOST_LABELS >= n]
            axes.set(xticks=[], ylabel="cluster")
            axes.set_yticks([(start + end - 1) / 2 for start, end in seen], [str(clusters[at]) for at, _ in seen])
            axes.set_xlabel(f"{n} adapters in the order of their clusters")
        many = f"{counted(len(frames), 'cluster')} of two or more"
        axes.set_title(f"{counted(n, 'adapter')} · {counted(modules, 'module')} · {many}")


def draw_diff(file: Path, names: tuple[str, str], pairs: Sequence[ModulePair]) -> None:
    """Two adapters: cosine and both norms by layer and kind of module, and the spectra of all modules.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
        Refused: more modules than fit into a picture.
    """
    cells = _cells([pair.module for pair in pairs])
    layers, kinds = (list(dict.fromkeys(side)) for side in zip(*cells, strict=True))
    if len(layers) * len(kinds) > _MOST_CELLS:
        raise Refused(
            f"{len(kinds):,} kinds of modules in {len(layers):,} layers: too many to draw", hint="leave out --plot"
        )
    shown = [_label(kind) for kind in kinds] if len(kinds) <= _MOST_LABELS else []
    height = min(max(1.2, 0.16 * len(layers)), 9.0) + 0.09 * max(map(len, shown), default=0)
    with _figure(file, (min(max(8.0, 3.6 + 0.75 * len(kinds)), 24.0), height + 3.6)) as figure:
        figure.suptitle(f"A: {_label(names[0], 90)}\nB: {_label(names[1], 90)}", ha="left", x=0.02)
        upper, lower = figure.subfigures(2, 1, height_ratios=(height, 2.8))
        largest = max(max(pair.norms) for pair in pairs) or 1.0
        one, other = ([pair.norms[side] or None for pair in pairs] for side in (0, 1))
        limits = {"norm": (0.0, largest), "cosine": (-1.0, 1.0)}
        panels = (
            ("cosine", "cosine", [pair.cosine for pair in pairs], "RdBu_r"),
            ("norm of A", "norm", one, "viridis"),
            ("norm of B", "norm", other, "viridis"),
        )
        for axes, (title, what, values, colours) in zip(upper.subplots(1, 3, sharey=True), panels, strict=True):
            grid = _grid(cells, layers, kinds, values)
            low, high = limits[what]
            image = axes.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            axes.set_facecolor("#dddddd")
            axes.set_title(title, fontsize=8)
            axes.set_xticks(range(len(shown)), shown, rotation=90)
            step = 1 + (len(layers) - 1) // 32
            axes.set_yticks(range(0, len(layers), step), [_label(layer, 24) for layer in layers[::step]])
            axes.tick_params(length=0, labelsize=7)
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
        axes.xaxis.get_major_locator().set_params(integer=True)
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


def _write_values(axes: Any, cosines: Sequence[Sequence[float]]) -> None:
    for row, line in enumerate(cosines):
        for column, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, _short(value), ha="center", va="center", color=colour, fontsize=6)


def _short(cosine: float) -> str:
    """Two digits, or three if two would round a cosine to 1."""
    text = f"{cosine:.2f}".replace("-0.00", "0.00")
    return f"{cosine:.3f}" if text in ("1.00", "-1.00") and abs(cosine) < 0.9995 else text


def _grid(
    cells: Sequence[tuple[str, str]], layers: Sequence[str], kinds: Sequence[str], values: Sequence[float | None]
) -> list[list[float]]:
    """Values by layer and kind, NaN for none."""
    grid = [[float("nan")] * len(kinds) for _ in layers]
    for (layer, kind), value in zip(cells, values, strict=True):
        if value is not None:
            grid[layers.index(layer)][kinds.index(kind)] = value
    return grid


def _cells(modules: Sequence[str]) -> list[tuple[str, str]]:
    """Row and column of every module: its layer, and its name in the layer.

    `model.layers.3.mlp.up_proj` is layer 3's `mlp.up_proj`. If a model has several stacks of layers, such as encoder
    and decoder, the row includes the stack; a module outside all layers has the row –.
    """
    layers = [layer if (layer := layer_of(module)) and layer.place else None for module in modules]
    stacks = _told_apart(list(dict.fromkeys(layer.stack for layer in layers if layer)))
    return [
        (f"{stacks[layer.stack]} {layer.number}".strip(), layer.place) if layer else ("–", module)
        for module, layer in zip(modules, layers, strict=True)
    ]


def _told_apart(stacks: Sequence[str]) -> dict[str, str]:
    """A short name for each stack of layers, "" for the only one: the first part in which they differ, if it is enough.

    `encoder.block` and `decoder.block` are `encoder` and `decoder`.
    """
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    parts = [stack.split(".") for stack in stacks]
    shared = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), min(map(len, parts)))
    names = [".".join(one[shared : shared + 1]) for one in parts]
    return dict(zip(stacks, names if len(set(names)) == len(names) else stacks, strict=True))


def _label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """An id for a picture: without characters that do not print or that the font lacks, and not too long."""
    shown = "".join(c if c < "\u0250" else c.encode("ascii", "backslashreplace").decode() for c in safe(text))
    if len(shown) <= longest:
        return shown
    # Keep both ends of an id: ids differ in owners as often as in last parts.
    head = longest // 3
    return f"{shown[:head]}…{shown[head + 1 - longest :]}"


@contextmanager
def _figure(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure that is written to `file` if the block succeeds."""
    demand_plottable(file)
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.set_loglevel("ERROR")
    metadata = {"Date": None, "Creator": None} if file.suffix.lower() == ".svg" else {"Software": None}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        data = io.BytesIO()
        figure.savefig(data, format=file.suffix.lower()[1:], metadata=metadata)
    _write(file, data.getvalue())


def _write(file: Path, data: bytes) -> None:
    """Write a file completely or not at all, replacing an earlier one."""
    if file.is_symlink():
        raise OutputError(f"{file}: a link; outputs are never written through links")
    partial = file.parent / f".{file.name}.{os.getpid()}.partial"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            partial.unlink()
