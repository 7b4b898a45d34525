"""`lora pool similarity`: clusters of similar adapters."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_cli.columns import Column, on_request
from lora_cli.commands.chosen import expand
from lora_cli.commands.options import Adapters, Catalogued, Command, DrawnListing, Selection, examples, with_flags
from lora_cli.errors import NothingMatched
from lora_cli.screen import near
from lora_cli.text import counted

if TYPE_CHECKING:
    from lora_cli.steps.opened_pool import Pool
    from lora_cli.steps.pool.clusters import Clustered, Similarity

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
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute cosines from the weights, also where all have sketches.")
    ] = False,
    *,
    setup: Catalogued,
    listing: Annotated[DrawnListing, _COLUMNS],
) -> None:
    """Compare all pairs of adapters by the cosine of their whole updates: clusters, and the nearest one of each.

    Rows are in the order of the clusters, as in the picture; --json has the whole matrix in that order. A module that
    an adapter lacks counts as zero. If pool verify --deep has sketched all of them, cosines are estimated from the
    sketches and no weights are read.
    """
    from lora_cli.steps.opened_pool import open_pool
    from lora_cli.steps.pool.clusters import demand_cut, in_clusters

    screen, plot = listing.screen(), listing.plot
    demand_cut(cut)
    settings = setup.load()
    with screen.progress() as progress, open_pool(settings, screen.say, progress) as pool:
        names = pool.unweighted(expand(adapters or []), selection, verb="similarity")[:k]
        if len(names) < 2:
            raise NothingMatched(f"{len(names)} adapter is too few to compare", hint="name two or more")
        measured, base, notes = _compared(pool, names, exact=exact)
        found = in_clusters(measured, cut)
    matrix = found.similarity.cosines.tolist()
    if plot is not None:
        from lora_cli.plots.compare import draw_similarity

        ids = [ref.id for ref in found.similarity.refs]
        draw_similarity(plot, ids, matrix, found.labels, found.similarity.modules)
    screen.rows(
        "lora.pool.similarity/1",
        _COLUMNS,
        _rows(found),
        extra={
            "base": base,
            "modules": found.similarity.modules,
            "from": "weights" if found.similarity.error is None else "sketches",
            "standard_error": found.similarity.error,
            "cut": cut,
            "cosines": matrix,
            "plot": None if plot is None else str(plot),
        },
    )
    for line in [*_lines_about(found, cut), *notes]:
        screen.say(line)
    if plot is not None:
        screen.say(f"  plot: {near(plot)}")


def _compared(pool: "Pool", names: Sequence[str], *, exact: bool) -> "tuple[Similarity, str, list[str]]":
    """The cosines, the base model, and lines on where they come from and on what was not checked."""
    why = ""
    if not exact:
        from lora_cli.steps.pool.alike import by_sketches

        found = by_sketches(pool.catalogue, names, base=pool.base, aliases=pool.aliases, progress=pool.progress)
        if not isinstance(found, str):
            pool.announce_held(found.rows)
            error = f"standard error {found.similarity.error:g} for unrelated adapters, less for near ones"
            line = f"cosines estimated from sketches: {error}; --exact reads the weights"
            return found.similarity, found.base, [line, *filter(None, [found.unchecked])]
        why = f": {found}"
    from lora_cli.steps.pool.compare import similarity as computed

    gathered = pool.adapters(names, whole=True)
    lines = [f"cosines computed from the weights{why}", *filter(None, [gathered.unchecked])]
    return computed(gathered.adapters, pool.progress), gathered.base, lines


def _rows(found: "Clustered") -> list[dict[str, Any]]:
    alike = found.similarity
    return [
        {
            "id": ref.id,
            "commit": ref.commit,
            "cluster": found.labels[place],
            "nearest": alike.refs[nearest].id,
            "cosine": float(alike.cosines[place, nearest]),
            "norm": alike.norms[place],
        }
        for place, (ref, nearest) in enumerate(zip(alike.refs, alike.nearest(), strict=True))
    ]


def _lines_about(found: "Clustered", cut: float) -> list[str]:
    """The summary of the matrix, and the adapters that have no direction to compare."""
    alike, sizes = found.similarity, Counter(found.labels)
    shared = sum(size > 1 for size in sizes.values())
    median, least, most = alike.range()
    lines = [
        f"{counted(len(alike.refs), 'adapter')} · {counted(alike.modules, 'module')} · cosine median {median:.4f}, "
        f"{least:.4f} to {most:.4f} · clusters of two or more at --cut {cut:g}: {shared}"
    ]
    for ref, norm in zip(alike.refs, alike.norms, strict=True):
        if norm == 0:
            lines.append(f"  {ref.id} changes nothing: its cosines are 0")
    return lines


def register(pool: typer.Typer) -> None:
    """Add `lora pool similarity` to the commands of the pool."""
    pool.command(
        cls=Command,
        epilog=examples(
            "lora pool similarity --plot pool.svg",
            "lora pool similarity -k 3 --json",
            "lora pool similarity --exact --cut 0.9",
        ),
    )(with_flags(similarity))
