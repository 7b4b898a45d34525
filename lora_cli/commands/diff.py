"""`lora diff`: two adapters side by side."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands import completing
from lora_cli.commands.options import Catalogued, Command, DrawnListing, examples, with_flags
from lora_cli.screen import near
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.pool.compare import Diff, ModuleDiff

_COLUMNS = (
    Column("MODULE", "module", wide=True),
    Column("NORM A", "norm_a", "right"),
    Column("NORM B", "norm_b", "right"),
    Column("COSINE", "cosine", "right"),
    Column("ANGLE OUT", "angle_out", "right"),
    Column("MEAN OUT", "mean_out", "right", minor=True),
    Column("ANGLE IN", "angle_in", "right"),
    Column("MEAN IN", "mean_in", "right", minor=True),
    Column("RANK A", "rank_a", "right", minor=True),
    Column("RANK B", "rank_b", "right", minor=True),
    *on_request("shape", "effective_rank_a", "effective_rank_b", "stable_rank_a", "stable_rank_b"),
    *on_request("angles_out", "angles_in", "spectrum_a", "spectrum_b"),
)
_COPIES, _PARTLY, _ORTHOGONAL = 0.95, 0.3, 0.05


def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="Id of the catalogue or the Hub, or a folder.", autocompletion=completing.adapters
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other adapter.", autocompletion=completing.adapters)],
    *,
    setup: Catalogued,
    listing: Annotated[DrawnListing, _COLUMNS],
) -> None:
    """Compare two adapters module by module: norms, cosine, principal angles in degrees, ranks; --json has the spectra.

    ANGLE OUT is the smallest angle between the output spaces of the two updates, ANGLE IN between their input spaces:
    0 means a shared direction, 90 nothing in common. The last line compares the adapters as a whole.
    """
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.pool.compare import diff as step

    screen, plot = listing.screen(), listing.plot
    with screen.progress() as progress, open_pool(setup.load(), screen.say, progress) as pool:
        gathered = pool.adapters([a, b], whole=True)
        one, other = gathered.adapters
        found = step(one, other, progress)
    if plot is not None:
        draw(plot, (one.ref.id, other.ref.id), found)
    screen.rows(
        "lora.diff/1",
        _COLUMNS,
        [_row(module) for module in found.modules],
        identity="module",
        caption=f"A {one.ref.id} · B {other.ref.id} · angles in degrees, the smallest and the mean",
        extra={
            "a": one.ref.pinned,
            "b": other.ref.pinned,
            "base": gathered.base,
            "norms": list(found.norms),
            "cosine": found.cosine,
            "chance": found.chance,
            "plot": None if plot is None else str(plot),
        },
    )
    for line in filter(None, [*lines_about(found), gathered.unchecked]):
        screen.say(line)
    if plot is not None:
        screen.say(f"  plot: {near(plot)}")


def draw(file: Path, names: tuple[str, str], found: "Diff") -> None:
    """The picture of a steps.compare.Diff."""
    from lora_cli.plots.compare import ModulePair, draw_diff

    pairs = [
        ModulePair(
            module=module.module,
            norms=(module.one.norm, module.other.norm),
            cosine=module.cosine,
            spectra=(module.one.spectrum, module.other.spectrum),
        )
        for module in found.modules
    ]
    draw_diff(file, names, pairs)


def lines_about(found: "Diff") -> list[str]:
    """The summary of a steps.compare.Diff, and the modules that only one of the two adapters changes."""
    norms = found.norms
    if found.cosine is None:
        zero = [name for name, norm in zip("AB", norms, strict=True) if norm == 0]
        still = f"{zero[0]} changes nothing" if len(zero) == 1 else "neither changes anything"
        return [f"diff: norms {norms[0]:.4g} and {norms[1]:.4g} · {still}, so there is no cosine"]
    n = len(found.modules)
    lines = [
        f"diff: norms {norms[0]:.4g} and {norms[1]:.4g} · cosine {found.cosine:.4f} over {counted(n, 'module')} "
        f"(random directions: ±{found.chance:.1g}) · {verdict(found.cosine)}"
    ]
    for name, here, there in (("A", "one", "other"), ("B", "other", "one")):
        alone = [m for m in found.modules if getattr(m, here).norm > 0 and getattr(m, there).norm == 0]
        if alone:
            lines.append(f"  only {name} changes {len(alone)} of the modules, such as {alone[0].module}")
    return lines


def verdict(cosine: float) -> str:
    """A cosine of whole adapters in words."""
    if abs(cosine) >= _COPIES:
        return "near copies, whatever their sizes" if cosine > 0 else "near opposites"
    if abs(cosine) < _ORTHOGONAL:
        return "nearly orthogonal"
    return f"{'partly' if abs(cosine) >= _PARTLY else 'weakly'} {'aligned' if cosine > 0 else 'opposed'}"


def _row(module: "ModuleDiff") -> dict[str, Any]:
    one, other = module.one, module.other
    return {
        "module": module.module,
        "shape": list(module.shape),
        "norm_a": one.norm,
        "norm_b": other.norm,
        "cosine": module.cosine,
        "angle_out": _angle(module.outputs, min),
        "mean_out": _angle(module.outputs, mean),
        "angle_in": _angle(module.inputs, min),
        "mean_in": _angle(module.inputs, mean),
        "rank_a": one.rank,
        "rank_b": other.rank,
        "effective_rank_a": one.effective_rank,
        "effective_rank_b": other.effective_rank,
        "stable_rank_a": one.stable_rank,
        "stable_rank_b": other.stable_rank,
        "angles_out": list(module.outputs),
        "angles_in": list(module.inputs),
        "spectrum_a": list(one.spectrum),
        "spectrum_b": list(other.spectrum),
    }


def _angle(angles: tuple[float, ...], of: Callable[[tuple[float, ...]], float]) -> float | None:
    """An angle rounded to a millionth of a degree: smaller parts are rounding noise."""
    return round(of(angles), 6) if angles else None


def register(root: typer.Typer) -> None:
    """Add `lora diff` to the command tree."""
    root.command(
        cls=Command,
        epilog=examples(
            "lora diff pool/tarn/mirror pool/mossy/double",
            "lora diff pool/tarn/mirror pool/mossy/double --plot diff.svg --json",
        ),
    )(with_flags(diff))
