"""How far adapters lie from the others of their pool, in robust z-scores of the spread of their updates. numpy alone.

Each statistic is put on a scale on which ordinary adapters scatter evenly, and a value is split into the level of its
adapter, the effect of its module and a rest: two rounds of Tukey's median polish. The levels are compared with each
other, and each rest with those of the same module. Source: Tukey, Exploratory Data Analysis (1977).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lora_cli.checks.spectra import AdapterSpread, Spread

FEWEST: Final = 20
"""Fewer adapters of one base are not compared: the median deviation of a handful is a matter of luck."""
USUAL: Final = 3.0
"""The usual range is that of |z| up to here."""

_PEERS = 10
_SIGMA = 1.4826  # of a normal distribution, over its median deviation
_LEAST_REST = 1e-12
_LEAST_SIGMA = 1e-6
_ROUNDS = 2
_Values = NDArray[np.float64]

_BACK: Mapping[str, Callable[[float], float]] = {
    "norm": lambda x: float(np.exp(x)),
    "concentration": lambda x: float(1 / (1 + np.exp(-x))),
    "entropy": lambda x: min(max(x, 0.0), 1.0),
}
assert tuple(_BACK) == Spread._fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Unusual:
    """The value of an adapter that lies furthest from the others.

    `statistic` is a field of `Spread`. `module` is "" for the level of the whole adapter, the median over its modules.
    `low` to `high` is the usual range: where |z| is at most 3, for an adapter of this level in this module.
    """

    module: str
    statistic: str
    value: float
    low: float
    high: float
    z: float

    def in_words(self) -> str:
        """The statistic, its value, its module and the usual range."""
        where = f"in {self.module}" if self.module else "in the median module"
        return f"{self.statistic} {self.value:.3g} {where}, usual {self.low:.3g} to {self.high:.3g}"


def compare(pool: Sequence[AdapterSpread]) -> list[Unusual | None]:
    """The most unusual value of each adapter of a pool; None for an adapter that changes nothing.

    The rests of a module scatter at least as much as those of all modules together: the scatter of a few adapters is
    often small by chance, and of fewer than ten it is not used at all. O(n m log n) for n adapters of m modules.
    """
    modules = sorted({name for spreads in pool for name in spreads})
    place = {name: number for number, name in enumerate(modules)}
    values = np.full((len(pool), len(modules), len(Spread._fields)), np.nan)
    for row, spreads in zip(values, pool, strict=True):
        for name, spread in spreads.items():
            row[place[name]] = spread
    scaled = _scaled(values)  # (adapters, modules, statistics)
    levels, effects = _polished(scaled)
    rests = scaled - levels[:, None] - effects
    of_all = _sigma(rests.reshape(-1, rests.shape[-1]), 0)
    sigmas = np.fmax(np.where(_counts(scaled) >= _PEERS, _sigma(rests, 0), 0), of_all)
    middle, sigma = _median(levels, 0), _sigma(levels - _median(levels, 0), 0)
    z = np.concatenate([((levels - middle) / sigma)[:, None], rests / sigmas], axis=1)
    expected = np.concatenate([np.broadcast_to(middle, levels.shape)[:, None], levels[:, None] + effects], axis=1)
    spans = np.concatenate([sigma[None], sigmas])
    names, found = ["", *modules], list[Unusual | None]()
    for one, usual, level in zip(np.nan_to_num(z), expected, levels, strict=True):
        module, statistic = np.unravel_index(np.abs(one).argmax(), one.shape)
        at, span = usual[module, statistic], spans[module, statistic]
        field, score = Spread._fields[statistic], float(one[module, statistic])
        low, value, high = (_BACK[field](at + k * span) for k in (-USUAL, score, USUAL))
        known = Unusual(module=names[module], statistic=field, value=value, low=low, high=high, z=score)
        found.append(known if np.isfinite(level).any() else None)
    return found


def _scaled(values: _Values) -> _Values:
    """log norm, log-odds of the concentration, entropy; NaN where the update is zero or has rank 1."""
    norm, share, entropy = np.moveaxis(values, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(norm > 0, np.log(norm), np.nan)
        odds = np.log(share) - np.log(np.maximum(1 - share, _LEAST_REST))
    # At rank 1 the first direction holds everything, whatever the adapter does.
    return np.stack([logs, np.where(np.isnan(entropy), np.nan, odds), entropy], axis=-1)


def _polished(scaled: _Values) -> tuple[_Values, _Values]:
    """The level of each adapter, (n, statistics), and the effect of each module, (modules, statistics)."""
    enough = _counts(scaled) >= _PEERS
    effects = np.zeros(scaled.shape[1:])
    for _ in range(_ROUNDS):
        levels = _median(scaled - effects, 1)
        effects = np.where(enough, _median(scaled - levels[:, None], 0), 0.0)
    return _median(scaled - effects, 1), effects


def _counts(scaled: _Values) -> NDArray[np.int64]:
    """How many adapters have each value."""
    return np.asarray(np.isfinite(scaled).sum(0))


def _median(values: _Values, axis: int) -> _Values:
    """The median without NaN; NaN where there is nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmedian(values, axis=axis))


def _sigma(deviations: _Values, axis: int) -> _Values:
    """The standard deviation that the median deviation stands for."""
    return np.maximum(_SIGMA * _median(np.abs(deviations), axis), _LEAST_SIGMA)
