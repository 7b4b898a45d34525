"""What sketches of updates tell without any weights: cosines, near copies, a map of a pool. numpy, not torch."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lora_cli.catalogue.adapters import Catalogue
from lora_cli.catalogue.sketches import StoredSketch
from lora_cli.checks.sketch import SIZE
from lora_cli.records import USABLE, PoolMap, PoolPoint, ReportedAdapter

NEAR: Final = 0.95
"""Adapters of this cosine and above are called near copies."""

_ROUNDING = 1e-6
_MOST = 10_000
_MOST_AT_A_GLANCE = 2_000
_BLOCK = 500
_ROUNDS, _SPARE = 12, 10
Matrix = NDArray[np.float32]


def units(sketches: Sequence[StoredSketch]) -> Matrix:
    """Sketches as rows of length 1, (n, SIZE); zero for an update of zero and for a damaged cell."""
    numbers = np.zeros((len(sketches), SIZE), np.float32)
    for row, one in zip(numbers, sketches, strict=True):
        if len(one.numbers) == 2 * SIZE:
            row[:] = np.frombuffer(one.numbers, "<f2")
    norms = np.linalg.norm(numbers, axis=1, keepdims=True)
    np.divide(numbers, norms, out=numbers, where=norms > 0)
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """The sketched adapter that is most like another one; `same`: of the same weights and configuration."""

    id: str
    cosine: float
    same: bool


def copies_of(catalogue: Catalogue, base: str, here: Mapping[str, StoredSketch]) -> dict[str, Copy]:
    """The nearest other adapter of those of `here`, by id, that have one of cosine `NEAR` and above.

    They are compared with each other and with at most 10,000 sketched adapters of their base.
    """
    return _nearest({**catalogue.sketches.of_base(base, _MOST), **here}, here)


def near_copies(catalogue: Catalogue, base: str) -> tuple[int, int]:
    """How many sketched usable adapters of a base are a near copy of another one, and how many were compared.

    At most 2,000 are compared, those whose commits come first: half a second.
    """
    drawn = catalogue.sketches.of_base(base, _MOST_AT_A_GLANCE)
    return len(_nearest(drawn, drawn)), len(drawn)


def _nearest(every: Mapping[str, StoredSketch], here: Collection[str]) -> dict[str, Copy]:
    """The nearest other one of `every`, of those of `here` by id that have one of cosine `NEAR` and above."""
    found: dict[str, Copy] = {}
    for by_base in (False, True):
        pool = {id: one for id, one in every.items() if one.by_base == by_base}
        ids, rows = [*pool], units([*pool.values()])
        asked = [place for place, id in enumerate(ids) if id in here]
        for start in range(0, len(asked), _BLOCK):
            block = asked[start : start + _BLOCK]
            cosines = rows[block] @ rows.T
            cosines[np.arange(len(block)), block] = -1
            for place, nearest, one in zip(block, cosines.argmax(1).tolist(), cosines, strict=True):
                if one[nearest] >= NEAR:
                    same = pool[ids[place]].content == pool[ids[nearest]].content
                    found[ids[place]] = Copy(id=ids[nearest], cosine=min(float(one[nearest]), 1.0), same=same)
    return found


class Distinct:
    """Adapters taken one by one, each unless it is a copy of one taken before."""

    def __init__(self, cosine: float) -> None:
        self.exact = self.near = self.without = 0
        self._cosine = cosine - _ROUNDING
        self._sha256s: set[str] = set()
        self._rows = {by_base: np.empty((16, SIZE), np.float32) for by_base in (False, True)}
        self._counts = {False: 0, True: 0}

    def take(self, sha256: str, sketch: StoredSketch | None) -> bool:
        """Whether this adapter is taken. `near`, `exact` count those that are not, `without` those without a sketch."""
        if sha256 and sha256 in self._sha256s:
            self.exact += 1
            return False
        if sketch is None:
            self.without += 1
        elif not self._place(sketch):
            self.near += 1
            return False
        self._sha256s.add(sha256)
        return True

    def _place(self, sketch: StoredSketch) -> bool:
        [row] = units([sketch])
        rows, count = self._rows[sketch.by_base], self._counts[sketch.by_base]
        if count and (rows[:count] @ row).max() >= self._cosine:
            return False
        if count == len(rows):
            rows = self._rows[sketch.by_base] = np.concatenate([rows, np.empty_like(rows)])
        rows[count] = row
        self._counts[sketch.by_base] = count + 1
        return True


def map_of(catalogue: Catalogue, adapters: Sequence[ReportedAdapter]) -> PoolMap | None:
    """The usable adapters of the base with most sketches in a plane: the two principal axes of their sketches.

    That is classical scaling of the cosines. At most 10,000 adapters are drawn, those whose commits come first. None
    where fewer than three have a sketch.
    """
    wanted = {one.id: one for one in adapters if one.status in USABLE}
    groups: dict[tuple[str, bool], list[tuple[str, str]]] = {}
    for id, commit, base, by_base in catalogue.sketches.sketched():
        if id in wanted:
            groups.setdefault((base, by_base), []).append((id, commit))
    if not groups:
        return None
    (base, _), names = min(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    chosen = catalogue.sketches.of(names[:_MOST])
    if len(chosen) < 3:
        return None
    rows = units([*chosen.values()])
    places, shares = _principal(rows)
    points = [
        PoolPoint(wanted[id].id, wanted[id].status, float(x), float(y))
        for id, (x, y) in zip(chosen, places, strict=True)
    ]
    usable = sum(one.base == base for one in wanted.values())
    return PoolMap(base=base, points=points, usable=usable, shares=shares)


def _principal(rows: Matrix) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The two principal coordinates of each row, (n, 2), and the shares of the variance that they hold.

    By subspace iteration from a fixed start, O(n SIZE) a round. Signs: the largest entry of an axis is positive.
    """
    centred = rows - rows.mean(0)
    basis = np.random.default_rng(0).standard_normal((SIZE, 2 + _SPARE)).astype(np.float32)
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(centred.T @ (centred @ basis))[0]
    values, turn = np.linalg.eigh((inside := centred @ basis).T.astype(np.float64) @ inside)
    places = (inside @ turn[:, ::-1][:, :2]).astype(np.float64)
    largest = places[np.abs(places).argmax(0), [0, 1]]
    total = float(np.square(centred, dtype=np.float64).sum()) or 1.0
    return places * np.where(largest < 0, -1, 1), (float(values[-1]) / total, float(values[-2]) / total)
