"""The common parts of all pictures: style, labels, colours, names of modules, and the writing of the file."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli.errors import UsageError
from lora_cli.escapes import safe
from lora_cli.names import layer_of
from lora_cli.outputs import whole_file

FORMATS = (".png", ".svg")
ABSENT = "#dddddd"
"""The colour of cells without a value."""
NO_LAYER = "–"
"""The row of modules outside all layers."""
LABEL_SIZE = 7
"""Points of the labels along an axis."""
# Inches per character of a label along an axis.
_CHARACTER = 0.065
_LONGEST_LABEL = 36
# The relative luminance above which black is easier to read than white: both have the same contrast there.
_MIDDLE = 0.179
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 150,
    # Show a stranger's id as plain text, never as mathematics or TeX.
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.useoffset": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lora",
}


def demand_plottable(file: Path | None) -> None:
    """UsageError unless the name of a plot, if there is one, ends in a supported format."""
    if file is not None and file.suffix.lower() not in FORMATS:
        raise UsageError(f"{file.name}: a plot is .png or .svg", hint="give --plot NAME.svg")


@contextmanager
def figure_in(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of `size` in inches that is written to `file` if the block succeeds.

    Raises:
        UsageError: `file` is neither .png nor .svg. OutputError: it is a link or cannot be written.
    """
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
    with whole_file(file) as stream:
        stream.write(data.getvalue())


def label(text: str, longest: int = _LONGEST_LABEL) -> str:
    """An id for a picture: without characters that do not print or that the font lacks, and not too long."""
    shown = "".join(
        c if c < "\u0250" or c == NO_LAYER else c.encode("ascii", "backslashreplace").decode() for c in safe(text)
    )
    if len(shown) <= longest:
        return shown
    # Keep both ends of an id: ids differ in owners as often as in last parts.
    head = longest // 3
    return f"{shown[:head]}…{shown[head + 1 - longest :]}"


def room_for(labels: Iterable[str]) -> float:
    """The inches that labels take, across an axis along which they are short."""
    return _CHARACTER * max(map(len, labels), default=0)


@dataclass(frozen=True, slots=True)
class Colours:
    """The colours of a heat map: a colour map of matplotlib, and the values at its two ends."""

    map: str
    low: float
    high: float

    def draw(self, axes: Any, grid: Sequence[Sequence[float]], **more: Any) -> Any:
        """`grid` as a heat map on `axes`, NaN in the colour of absence; returns matplotlib's image."""
        axes.set_facecolor(ABSENT)
        axes.tick_params(length=0, labelsize=LABEL_SIZE)
        return axes.imshow(grid, cmap=self.map, vmin=self.low, vmax=self.high, interpolation="nearest", **more)

    def write(self, axes: Any, grid: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]) -> None:
        """Write a text into every cell that has a value, black or white, whichever its colour lets one read."""
        for row, (line, words) in enumerate(zip(grid, texts, strict=True)):
            for column, (value, text) in enumerate(zip(line, words, strict=True)):
                if math.isfinite(value):
                    axes.text(column, row, text, ha="center", va="center", color=self.ink(value), fontsize=6)

    def ink(self, value: float) -> str:
        """The colour of a text on the colour of `value`."""
        import matplotlib

        red, green, blue, _ = matplotlib.colormaps[self.map]((value - self.low) / (self.high - self.low))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > _MIDDLE else "white"


def colours_for(values: Iterable[float]) -> Colours:
    """Colours that fit the values: blue, white at 0 and red if one is negative, else from the least to the largest."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if low < 0:
        limit = max(-low, high)
        return Colours("RdBu_r", -limit, limit)
    if low == high:
        return Colours("viridis", 0.0, high or 1.0)
    return Colours("viridis", low, high)


def cells_of(modules: Sequence[str]) -> list[tuple[str, str]]:
    """Row and column of every module: its layer, and its name in the layer.

    `model.layers.3.mlp.up_proj` is layer 3's `mlp.up_proj`. If a model has several stacks of layers, such as encoder
    and decoder, the row includes the stack; a module outside all layers has the row –.
    """
    layers = [layer_of(module) for module in modules]
    stacks = _short_names(list(dict.fromkeys(layer.stack for layer in layers if layer is not None)))
    return [
        (NO_LAYER, module) if layer is None else (f"{stacks[layer.stack]} {layer.number}".strip(), layer.place)
        for module, layer in zip(modules, layers, strict=True)
    ]


def _short_names(stacks: Sequence[str]) -> dict[str, str]:
    """A short name for each stack of layers, "" for the only one: the first part in which they differ, if it is enough.

    `encoder.block` and `decoder.block` are `encoder` and `decoder`.
    """
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    parts = [stack.split(".") for stack in stacks]
    shared = next((i for i, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), min(map(len, parts)))
    names = [".".join(one[shared : shared + 1]) for one in parts]
    return dict(zip(stacks, names if len(set(names)) == len(names) else stacks, strict=True))
