"""Methods that judge answers: the order that they make, and what a race costs and finds on a simulated pool."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from lora_cli.recipes import SELECTION_METHODS
from lora_cli.selection_methods._fits import Fits
from lora_cli.selection_methods._trials import Standing, Trials

N, EXAMPLES, K = 960, 100, 30
every_method = pytest.mark.parametrize(
    "name", sorted(name for name, one in SELECTION_METHODS.methods.items() if one.kind == "trials")
)


class Simulated:
    """Candidates of known answers; `asked` is the number of examples that each was asked."""

    def __init__(self, right: NDArray[np.bool_], likely: NDArray[np.float64], *, k: int = K) -> None:
        self.right, self.likely, self.k = right, likely, k
        self.names = [f"author/{place}@{place:040x}" for place in range(len(right))]
        self.asked: dict[int, int] = {}
        self.failing: set[int] = set()

    def judge(self, places: Sequence[int], count: int) -> Mapping[int, Standing]:
        self.asked.update(dict.fromkeys(places, count))
        return {
            place: Standing(count, float(self.right[place, :count].mean()), float(self.likely[place, :count].mean()))
            for place in places
            if place not in self.failing
        }

    def trials(self) -> Trials:
        return Trials(
            names=self.names,
            examples=self.right.shape[1],
            judge=self.judge,
            enough=lambda ranked: min(self.k, len(ranked)),
        )

    def best(self, name: str) -> list[int]:
        trials = self.trials()
        return trials.ranked(SELECTION_METHODS.load(name)(trials))[: self.k]

    @property
    def cost(self) -> float:
        return sum(self.asked.values()) / self.right.size


def pool(seed: int, shared: float, count: int = N) -> tuple[Simulated, NDArray[np.float64], NDArray[np.bool_]]:
    """A pool with the spread of arXiv 2602.12323 (5 % at .11 and less, median .44, the 30th of 960 .57): answers, true
    shares of right ones, those that collapsed. `shared` is the correlation of two adapters' luck with one example."""
    rng = np.random.default_rng(seed)
    collapsed = rng.random(count) < 0.05
    true = np.clip(rng.normal(0.44, 0.075, count), 0.02, 0.98)
    true[collapsed] = rng.uniform(0.001, 0.11, collapsed.sum())
    able = np.array([NormalDist().inv_cdf(one) for one in true])[:, None]
    luck = shared**0.5 * rng.normal(size=EXAMPLES) + (1 - shared) ** 0.5 * rng.normal(size=(count, EXAMPLES))
    right = able + luck > 0
    likely = -1.2 + 1.5 * (true - 0.44)[:, None] + 0.5 * (right - 0.5) + rng.normal(0, 0.4, right.shape)
    likely[collapsed] -= 4
    return Simulated(right, likely), true, collapsed


@pytest.mark.parametrize("shared", [0.0, 0.2, 0.4])
def test_a_race_finds_the_best_of_960_at_three_tenths_of_the_cost(shared: float) -> None:
    lost = []
    for seed in range(3):
        simulated, true, _ = pool(seed, shared)
        whole = true[simulated.best("evaluation")].mean()
        assert simulated.cost == 1
        simulated.asked.clear()
        lost.append(whole - true[simulated.best("race")].mean())
        assert simulated.cost < 0.3
    assert np.mean(lost) < 0.01
    assert max(lost) < 0.015


def test_the_collapsed_are_dropped_after_five_examples_and_nobody_else() -> None:
    simulated, _, collapsed = pool(0, 0.2)
    simulated.best("race")
    assert {place for place, count in simulated.asked.items() if count == 5} == set(np.flatnonzero(collapsed))


def test_adapters_without_effect_are_not_taken_for_the_usual_ones() -> None:
    right = np.zeros((40, EXAMPLES), dtype=bool)
    likely = np.full((40, EXAMPLES), -2.0)
    likely[30:] = -2.5  # less likely than all others, by far less than a collapse
    simulated = Simulated(right, likely, k=2)
    simulated.best("race")
    assert min(simulated.asked.values()) == 10


def test_the_last_cut_rests_on_all_examples() -> None:
    simulated, _, _ = pool(1, 0.2)
    simulated.best("race")
    rounds = sorted(simulated.asked.values())
    # Half of 915 that did not collapse, of these and so on, but never fewer than twice those that are wanted.
    assert [rounds.count(count) for count in (5, 10, 20, 40, 80, 100)] == [45, 457, 229, 114, 55, 60]
    few, _, _ = pool(1, 0.2, count=40)
    few.best("race")
    assert few.asked == dict.fromkeys(few.asked, EXAMPLES) | {p: 5 for p, count in few.asked.items() if count == 5}


@every_method
def test_the_order_of_candidates_does_not_matter(name: str) -> None:
    simulated, _, _ = pool(2, 0.3, count=200)
    found = [simulated.names[place] for place in simulated.best(name)]
    back = Simulated(simulated.right[::-1], simulated.likely[::-1])
    back.names = simulated.names[::-1]
    assert [back.names[place] for place in back.best(name)] == found


@every_method
def test_those_that_cannot_be_judged_are_left_out(name: str) -> None:
    simulated, _, _ = pool(3, 0.3, count=100)
    best = simulated.best(name)
    simulated.failing = {*best[:5]}
    trials = simulated.trials()
    found = SELECTION_METHODS.load(name)(trials)
    assert simulated.failing.isdisjoint(found)
    assert trials.ranked(found)[:3] == best[5:8]


@every_method
@pytest.mark.parametrize("examples", [1, 4, 7, 10, 13])
def test_few_examples_and_one_candidate_will_do(name: str, examples: int) -> None:
    right = np.eye(3, examples, dtype=bool)
    simulated = Simulated(right, np.zeros(right.shape), k=1)
    able = range(min(3, examples))
    assert simulated.best(name) == [
        min(able, key=lambda place: hashlib.sha256(simulated.names[place].encode()).hexdigest())
    ]
    alone = Simulated(right[:1], np.zeros((1, examples)), k=5)
    assert alone.best(name) == [0]


def test_more_examples_then_merit_then_likelihood_decide() -> None:
    by: Callable[[int, float, float | None], Standing] = Standing
    ranked = [by(100, 0.2, None), by(20, 0.9, -1.0), by(20, 0.5, -1.0), by(20, 0.5, -2.0), by(20, 0.5, None)]
    trials = Simulated(np.zeros((5, 1), dtype=bool), np.zeros((5, 1))).trials()
    assert trials.ranked(dict(enumerate(ranked))) == [0, 1, 2, 3, 4]
    assert trials.ranked(dict(enumerate(ranked[::-1]))) == [4, 3, 2, 1, 0]


class Fitted:
    """Fits whose loss is 10 minus the worth of what is in them, and a price for each adapter."""

    def __init__(self, worth: Sequence[float], most: int, price: float = 0.0) -> None:
        self.worth, self.most, self.price = worth, most, price
        self.tried: list[tuple[int, ...]] = []

    def loss(self, places: Sequence[int]) -> float:
        self.tried.append(tuple(places))
        return 10 - sum(self.worth[place] - self.price for place in places)

    def scan(self) -> tuple[list[int], float]:
        names = [f"a/{place}@{place:040x}" for place in range(len(self.worth))]
        found: tuple[list[int], float] = SELECTION_METHODS.load("scan")(
            Fits(names=names, most=self.most, loss=self.loss)
        )
        return found


def test_a_scan_goes_from_segments_to_single_adapters_and_joins_the_best() -> None:
    worth = [0.0] * 27
    worth[13], worth[14], worth[20] = 3.0, 1.0, 2.0
    fitted = Fitted(worth, 9, price=0.5)
    # Segments of 9, 3 and 1: the best pair of the best segment beats what is wider.
    assert fitted.scan() == ([13, 14], 10 - 3.0)
    segments = [tuple(range(start, start + 9)) for start in (0, 9, 18)]
    finer = [(9, 10, 11), (12, 13, 14), (15, 16, 17), (12,), (13,), (14,)]
    assert fitted.tried == [*segments, *finer, (13, 14), (13, 14, 12)]
    # Where every adapter helps, the widest segment is the best.
    assert Fitted([1.0] * 6, 3).scan() == ([0, 1, 2], 7.0)


@pytest.mark.parametrize(("count", "most"), [(1, 1), (1, 5), (2, 1), (4, 3), (7, 4), (30, 30)])
def test_a_scan_fits_nothing_twice_and_never_too_many(count: int, most: int) -> None:
    fitted = Fitted([1.0 + place for place in range(count)], most, price=2.0)
    chosen, loss = fitted.scan()
    assert len(fitted.tried) == len({*fitted.tried})
    assert max(map(len, fitted.tried)) <= most
    assert loss == min(fitted.loss(one) for one in [*fitted.tried])
    assert 0 < len(chosen) <= most
