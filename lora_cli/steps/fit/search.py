"""A search without gradients for few coefficients: CMA-ES, each generation in one batch. Source: arXiv 2307.13269."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cma
import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import Refused
from lora_cli.files import read_regular
from lora_cli.fit_methods import Learning, Search
from lora_cli.models.base_model import BaseModel
from lora_cli.models.mixture import Mixture
from lora_cli.outputs import whole_file
from lora_cli.steps.fit.objective import Objective, direction
from lora_cli.steps.train.descent import Checkpoint, Learnt, Parts, Point, losses

_FIRST_SPREAD = 1 / 3
"""The deviation of the first generation, as a share of the bound."""
Report = Callable[[int, int], None]


class Found(NamedTuple):
    """The outcome of a search: the objective's value at the start, and that of the θ that is kept."""

    learnt: Learnt
    start: float
    best: float


def search(
    base: BaseModel,
    mixture: Mixture,
    parts: Parts,
    how: Learning,
    objective: Objective,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    progress: Report,
) -> Found:
    """Find θ of the lowest cost; `base` already runs through `mixture`. The same seed gives the same result.

    The cost is the objective's value, negated where higher is better, plus the penalty; it is infinite where the value
    is not finite. The start is the first evaluation. The steps of the result count evaluations, generation by
    generation; a training loss of its curve is the lowest cost so far.

    Args:
        how: with a `search`.
        checkpoint: where the values are kept. With a state of the same key the search asks for the same candidates
            again and takes their values from there; the outcome is the same to the bit.
        progress: called as (evaluations done, evaluations in all).

    Raises:
        Refused: the objective is not finite at the start. OutputError: the checkpoint cannot be written.
        Also the errors of the objective.
    """
    assert how.search is not None
    space, start = how.search, mixture.theta.detach().clone()
    strategy, evaluations = _strategy(start, space, seed), _Evaluations(objective, checkpoint)
    [first] = evaluations.of(start[None], lambda done: progress(done, space.evaluations))
    if not math.isfinite(first):
        raise Refused(f"the objective {space.objective} is {first} at the start", hint=_HINTS[space.better == "metric"])
    [lowest] = costs([first], start[None], mixture, how)
    best, at, value = start, 0, first
    loss, each = losses(base, parts.validation)
    curve, before, done = [Point(step=0, training=None, validation=loss)], each, 1
    while done < space.evaluations and not evaluations.late:
        tried = strategy.ask()[: space.evaluations - done]
        thetas = torch.tensor(np.array(tried), dtype=start.dtype, device=start.device)
        values = evaluations.of(thetas, lambda done: progress(done, space.evaluations))
        if not values:
            break
        found = costs(values, thetas[: len(values)], mixture, how)
        if len(found) == strategy.popsize:
            strategy.tell(tried, found)
        place = min(range(len(found)), key=found.__getitem__)
        done += len(found)
        if found[place] < lowest:
            lowest, best, at, value = found[place], thetas[place], done, values[place]
            with mixture.trying(best[None]):
                loss, each = losses(base, parts.validation)
        curve.append(Point(step=done, training=lowest, validation=loss))
    progress(done, space.evaluations)
    with torch.no_grad():
        mixture.theta.copy_(best)
    learnt = Learnt(
        curve=tuple(curve),
        trace=(),
        unit="evaluation",
        done=done,
        steps=space.evaluations,
        speed=0.0,
        best_step=at,
        loss_before=curve[0].validation,
        loss_after=loss,
        each_before=tuple(before),
        each_after=tuple(each),
    )
    return Found(learnt, first, value)


_HINTS = {True: "leave out adapters of extreme norm", False: "the command must print a number for the base too"}
"""The remedy, by whether the objective is a metric."""


def costs(values: Sequence[float], thetas: Tensor, mixture: Mixture, how: Learning) -> list[float]:
    """What the search lowers, of θ (K, size) with these values of the objective."""
    assert how.search is not None
    sign = -1.0 if direction(how.search) == "higher" else 1.0
    penalties = (how.l1 * mixture.penalties(thetas).double().cpu()).tolist()
    found = [sign * value + penalty for value, penalty in zip(values, penalties, strict=True)]
    return [cost if math.isfinite(cost) else math.inf for cost in found]


class _Evaluations:
    """The values of all candidates in the order in which they are tried, kept in a checkpoint.

    The state is plain numbers: the candidates follow from the seed and the values before them.
    """

    def __init__(self, objective: Objective, checkpoint: Checkpoint | None) -> None:
        self._objective, self._checkpoint = objective, checkpoint
        self._known = [] if checkpoint is None else _stored(checkpoint)
        self._done = 0
        self.late = False

    def of(self, thetas: Tensor, report: Callable[[int], None]) -> list[float]:
        """The values of the next candidates, (K, size); of the first of them alone if the time limit comes."""
        first, last = self._done, self._done + len(thetas)
        self._done = min(last, len(self._known))
        while self._done < last and not self.late:
            report(self._done)
            group = thetas[self._done - first :][: self._objective.at_once]
            self._known += self._objective.values(group)
            self._done += len(group)
            self._keep()
        return self._known[first : self._done]

    def _keep(self) -> None:
        if self._checkpoint is None:
            return
        state = json.dumps({"key": self._checkpoint.key, "values": self._known})
        with whole_file(self._checkpoint.file) as file:
            file.write(state.encode())
        self.late = time.monotonic() >= self._checkpoint.deadline


def _stored(checkpoint: Checkpoint) -> list[float]:
    """The values in a state, none if there is no state or it belongs to another search."""
    try:
        state = json.loads(read_regular(checkpoint.file))
        return [float(value) for value in state["values"]] if state["key"] == checkpoint.key else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _strategy(start: Tensor, space: Search, seed: int) -> "cma.CMAEvolutionStrategy":
    # Its own seed is that of all numpy; a generator of ours leaves that alone.
    numbers = np.random.default_rng(seed)
    options = {
        "bounds": [-space.bound, space.bound],
        "randn": lambda *shape: numbers.standard_normal(shape),
        "seed": np.nan,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(start.cpu().double().numpy(), _FIRST_SPREAD * space.bound, options)
