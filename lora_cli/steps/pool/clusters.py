"""Cosines of all pairs of adapters, the nearest of each, and the clusters among them. numpy and scipy, not torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_cli.errors import UsageError
from lora_cli.records import AdapterRef

# The optimal order of leaves is O(N³): 0.3 s here, 2 s for twice as many.
_MOST_IN_OPTIMAL_ORDER = 500


class Range(NamedTuple):
    """The median and the bounds of some numbers."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Similarity:
    """Cosines of all pairs of adapters: `cosines` (N, N) float64, over `modules` modules; `norms` of whole updates.

    The diagonal is 1; an adapter whose update is zero has 0 throughout. `error` is the standard error of the cosine of
    unrelated updates where cosines are estimates from sketches, None where they are computed from the weights.
    """

    refs: tuple[AdapterRef, ...]
    cosines: NDArray[np.float64]
    norms: tuple[float, ...]
    modules: int
    error: float | None = None

    def nearest(self) -> list[int]:
        """The place of the other adapter that each one is most like; two adapters or more."""
        others = self.cosines.copy()
        np.fill_diagonal(others, -np.inf)
        found: list[int] = others.argmax(1).tolist()
        return found

    def range(self) -> Range:
        """That of the cosines of different adapters; two adapters or more."""
        pairs = self.cosines[np.tril_indices(len(self.refs), -1)]
        return Range(float(np.median(pairs)), float(pairs.min()), float(pairs.max()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clustered:
    """A Similarity with similar adapters next to each other; `labels` numbers the clusters from 1."""

    similarity: Similarity
    labels: tuple[int, ...]


def demand_cut(cut: float) -> None:
    """UsageError unless -1 <= cut < 1."""
    if not -1 <= cut < 1:
        raise UsageError(f"--cut is a cosine in -1 <= cut < 1, not {cut}")


def in_clusters(found: Similarity, cut: float) -> Clustered:
    """Clusters by average linkage on 1 − cosine: two join while the mean cosine between them is above `cut`.

    The order of the leaves is the optimal one (Bar-Joseph et al. 2001) of up to 500 adapters, of more that in which
    they joined; whatever the order of the adapters was.

    Raises:
        UsageError: `cut` is not in -1 <= cut < 1.
    """
    # Imported here: it takes half a second of CPU, and a merge needs only the cosines.
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    demand_cut(cut)
    n = len(found.refs)
    # scipy breaks ties by position; sort first, so that the order of the arguments does not matter.
    places: Sequence[int] = sorted(range(n), key=lambda i: found.refs[i].pinned)
    labels = [1] * n
    if n > 1:
        distances = 1 - found.cosines[np.ix_(places, places)]
        np.fill_diagonal(distances, 0)
        optimal = n <= _MOST_IN_OPTIMAL_ORDER
        tree = hierarchy.linkage(squareform(distances, checks=False), "average", optimal_ordering=optimal)
        leaves = hierarchy.leaves_list(tree)
        names = hierarchy.fcluster(tree, 1 - cut, "distance")[leaves].tolist()
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names), 1)}
        labels = [numbers[name] for name in names]
        places = [places[leaf] for leaf in leaves.tolist()]
    ordered = Similarity(
        refs=tuple(found.refs[i] for i in places),
        cosines=found.cosines[np.ix_(places, places)],
        norms=tuple(found.norms[i] for i in places),
        modules=found.modules,
        error=found.error,
    )
    return Clustered(similarity=ordered, labels=tuple(labels))
