"""`lora pool similarity`: clusters of similar adapters."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.chosen import expand
from lora_cli.commands.options import Adapters, Catalogued, Command, DrawnListing, Selection, examples, with_flags
from lora_cli.errors import NothingMatched
from lora_cli.screen import near
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.pool.compare import Clustered

_COLUMNS = (
    Column("ADAPTER", "id", wide=True),
    Column("CLUSTER", "cluster", "right"),
    Column("NEAREST", "nearest", wide=True),
    Column("COSINE", "cosine", "right"),
    Column("NORM", "norm", "right", minor=True),
    *on_request("commit"),
)


def similarity(
    adapters: Adapters = None,
    k: Annotated[
        int | None, typer.Option("-k", help="Use only the first K adapters.", min=2, show_default="all")
    ] = None,
    selection: Selection = None,
    cut: Annotated[
        float, typer.Option("--cut", help="Clusters join while the mean cosine between them is above this.")
    ] = 0.5,
    *,
    setup: Catalogued,
    listing: Annotated[DrawnListing, _COLUMNS],
) -> None:
    """Compare all pairs of adapters by the cosine of their whole updates: clusters, and the nearest one of each.

    Rows are in the order of the clusters, as in the picture; --json has the whole matrix in that order. A module that
    an adapter lacks counts as zero.
    """
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.pool import compare as step

    screen, plot = listing.screen(), listing.plot
    step.demand_cut(cut)
    settings = setup.load()
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = pool.unweighted(expand(adapters or []), selection, verb="similarity")[:k]
        if len(names) < 2:
            raise NothingMatched(f"{len(names)} adapter is too few to compare", hint="name two or more")
        gathered = pool.adapters(names, whole=True)
        found = step.in_clusters(step.similarity(gathered.adapters, progress), cut)
    matrix = found.similarity.cosines.tolist()
    if plot is not None:
        from lora_cli.plots.compare import draw_similarity

        ids = [adapter.ref.id for adapter in found.similarity.adapters]
        draw_similarity(plot, ids, matrix, found.labels, found.similarity.modules)
    screen.rows(
        "lora.pool.similarity/1",
        _COLUMNS,
        _rows(found, matrix),
        extra={
            "base": gathered.base,
            "modules": found.similarity.modules,
            "cut": cut,
            "cosines": matrix,
            "plot": None if plot is None else str(plot),
        },
    )
    for line in filter(None, [*_lines_about(found, matrix, cut), gathered.unchecked]):
        screen.say(line)
    if plot is not None:
        screen.say(f"  plot: {near(plot)}")


def _rows(found: "Clustered", matrix: list[list[float]]) -> list[dict[str, Any]]:
    adapters = found.similarity.adapters
    rows = []
    for place, adapter in enumerate(adapters):
        nearest = max((i for i in range(len(adapters)) if i != place), key=matrix[place].__getitem__)
        rows.append(
            {
                "id": adapter.ref.id,
                "commit": adapter.ref.commit,
                "cluster": found.labels[place],
                "nearest": adapters[nearest].ref.id,
                "cosine": matrix[place][nearest],
                "norm": found.similarity.norms[place],
            }
        )
    return rows


def _lines_about(found: "Clustered", matrix: list[list[float]], cut: float) -> list[str]:
    """The summary of the matrix, and the adapters that have no direction to compare."""
    from statistics import median

    adapters, n = found.similarity.adapters, len(matrix)
    pairs = [matrix[i][j] for i in range(n) for j in range(i)]
    shared = sum(found.labels.count(label) > 1 for label in set(found.labels))
    lines = [
        f"{counted(n, 'adapter')} · {counted(found.similarity.modules, 'module')} · cosine median {median(pairs):.4f}, "
        f"{min(pairs):.4f} to {max(pairs):.4f} · clusters of two or more at --cut {cut:g}: {shared}"
    ]
    for adapter, norm in zip(adapters, found.similarity.norms, strict=True):
        if norm == 0:
            lines.append(f"  {adapter.ref.id} changes nothing: its cosines are 0")
    return lines


def register(pool: typer.Typer) -> None:
    """Add `lora pool similarity` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples("lora pool similarity --plot pool.svg", "lora pool similarity -k 3 --json"),
    )(with_flags(similarity))
