"""A search without gradients for few coefficients: CMA-ES, each generation in one batch. Source: arXiv 2307.13269."""

import math
from collections.abc import Callable, Sequence

import cma
import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import Refused
from lora_cli.fit_methods import Learning, Search
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.mixture import Mixture
from lora_cli.steps.train.descent import Learnt, Parts, Point, losses, passes

_FIRST_SPREAD = 1 / 3
"""The deviation of the first generation, as a share of the bound."""


def search(
    base: BaseModel,
    mixture: Mixture,
    parts: Parts,
    how: Learning,
    *,
    seed: int,
    progress: Callable[[int, int], None],
) -> Learnt:
    """Find θ of the lowest `objective` on the training part; `base` already runs through `mixture`.

    The start is the first evaluation. The steps of the result count evaluations, generation by generation; a training
    loss is the lowest objective so far. The same seed gives the same result.

    Args:
        how: with a `search`.
        progress: called as (evaluations done, evaluations in all).

    Raises:
        Refused: the loss at the start is not finite.
    """
    assert how.search is not None
    space, start = how.search, mixture.theta.detach().clone()
    strategy = _strategy(start, space, seed)
    best, at = start, 0
    [lowest] = objective(base, mixture, parts.training, start[None], how.l1)
    if not math.isfinite(lowest):
        raise Refused(f"the loss is {lowest} at the start", hint="leave out adapters of extreme norm")
    loss, each = losses(base, parts.validation)
    curve, before, done = [Point(step=0, training=None, validation=loss)], each, 1
    while done < space.evaluations:
        progress(done, space.evaluations)
        tried = strategy.ask()[: space.evaluations - done]
        thetas = torch.tensor(np.array(tried), dtype=start.dtype, device=start.device)
        found = objective(base, mixture, parts.training, thetas, how.l1)
        if len(tried) == strategy.popsize:
            strategy.tell(tried, found)
        first = min(range(len(found)), key=found.__getitem__)
        done += len(tried)
        if found[first] < lowest:
            lowest, best, at = found[first], thetas[first], done
            with mixture.trying(best[None]):
                loss, each = losses(base, parts.validation)
        curve.append(Point(step=done, training=lowest, validation=loss))
    progress(done, space.evaluations)
    with torch.no_grad():
        mixture.theta.copy_(best)
    return Learnt(
        curve=tuple(curve),
        trace=(),
        steps=0,
        speed=0.0,
        best_step=at,
        loss_before=curve[0].validation,
        loss_after=loss,
        each_before=tuple(before),
        each_after=tuple(each),
    )


@torch.no_grad()
def objective(base: BaseModel, mixture: Mixture, examples: Sequence[Encoded], thetas: Tensor, l1: float) -> list[float]:
    """Mean loss of the examples plus `l1` · penalty of each θ, (K, size); infinity where it is not finite.

    The K are tried in one batch, if the mixture allows that.
    """
    found = []
    for group in torch.split(thetas, len(thetas) if mixture.tries_together else 1):
        with mixture.trying(group):
            sums = torch.zeros(len(group), dtype=torch.float64)
            for rows in passes([len(item.ids) for item in examples], copies=len(group)):
                part = [examples[row] for row in rows]
                totals = base.completion_losses(part * len(group)).view(len(group), len(part)).double().cpu()
                sums += (totals / torch.tensor([item.tokens for item in part])).sum(dim=1)
        values = sums / len(examples) + l1 * mixture.penalties(group).double().cpu()
        found += [value if math.isfinite(value) else math.inf for value in values.tolist()]
    return found


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
