"""Fits written anew: dense float64 weights, a loop over adapters, AdamW by hand. No code is shared with the product."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Plain:
    """One adapter: raw factors (B, A) by module, and alpha/rank."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float


@dataclass
class Line:
    """One example: its token ids, and the place of its first learnt token."""

    ids: list[int]
    start: int


@dataclass
class Fit:
    """Adapters on a model, with one θ per module and adapter, whether the adapter has the module or not."""

    model: Any
    pool: Sequence[Plain]
    modules: Sequence[str]
    phi: str
    start: float
    absent: bool = False
    l1: float = 0.0
    entropy: bool = False
    theta: dict[str, list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.theta = {
            module: [torch.tensor(self.start, dtype=torch.float64, requires_grad=True) for _ in self.pool]
            for module in self.modules
        }

    def here(self, module: str) -> list[int]:
        return [i for i, one in enumerate(self.pool) if self.absent or module in one.factors]

    def c(self, module: str, i: int) -> Tensor:
        theta = self.theta[module]
        if self.phi == "softmax":
            return theta[i].exp() / sum(theta[k].exp() for k in self.here(module))
        return theta[i] if self.phi == "linear" or theta[i] > 0 else 0.01 * theta[i]

    def dense(self) -> dict[str, Tensor]:
        return {
            module: sum(
                self.c(module, i) * one.scale * (one.factors[module][0] @ one.factors[module][1])
                for i, one in enumerate(self.pool)
                if module in one.factors
            )
            for module in self.modules
        }

    def weights(self) -> dict[str, Tensor]:
        found = dict(self.model.state_dict())
        for module, update in self.dense().items():
            found[f"{module}.weight"] = found[f"{module}.weight"] + update
        return found

    def measured(self, lines: Sequence[Line]) -> list[tuple[Tensor, int]]:
        """Of each line the sum over its learnt tokens, and their number. All lines are of one length."""
        [end] = {line.start if self.entropy else len(line.ids) for line in lines}
        ids = torch.tensor([line.ids[:end] for line in lines])
        logits = torch.func.functional_call(self.model, self.weights(), kwargs={"input_ids": ids}).logits
        if self.entropy:
            p = logits[:, -1].softmax(dim=1)
            return [(-(row * row.log()).sum(), 1) for row in p]
        found = []
        for line, logs in zip(lines, logits.log_softmax(dim=2), strict=True):
            places = range(line.start, end)
            found.append((-sum(logs[place - 1, line.ids[place]] for place in places), len(places)))
        return found

    def objective(self, lines: Sequence[Line]) -> Tensor:
        """What a step of all lines minimises."""
        parts = self.measured(lines)
        absolute = sum(abs(self.theta[module][i]) for module in self.modules for i in self.here(module))
        return sum(total for total, _ in parts) / sum(n for _, n in parts) + self.l1 * absolute / len(self.modules)

    def validation(self, lines: Sequence[Line]) -> float:
        with torch.no_grad():
            return math.fsum(float(total) / n for total, n in self.measured(lines)) / len(lines)


def descend(
    fit: Fit,
    learnt: Sequence[Tensor],
    training: Sequence[Line],
    validation: Sequence[Line],
    *,
    lr: float,
    steps: int,
    every: int,
    last: bool = False,
) -> list[tuple[int, float]]:
    """AdamW on all `training` lines at once; `learnt` ends at its best or last values. Returns (step, loss) points."""
    first = [torch.zeros_like(one) for one in learnt]
    second = [torch.zeros_like(one) for one in learnt]
    points = [(0, fit.validation(validation))]
    best = [one.detach().clone() for one in learnt]
    warm = math.ceil(steps / 10)
    for step in range(steps):
        slopes = torch.autograd.grad(fit.objective(training), learnt, allow_unused=True)
        slopes = [torch.zeros_like(one) if slope is None else slope for one, slope in zip(learnt, slopes, strict=True)]
        size = math.sqrt(sum(float((slope**2).sum()) for slope in slopes))
        shrink = min(1.0, 1.0 / (size + 1e-6))
        rate = lr * step / warm if step < warm else lr * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
        with torch.no_grad():
            for one, slope, m, v in zip(learnt, slopes, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * shrink * slope)
                v.mul_(0.999).add_(0.001 * (shrink * slope) ** 2)
                grown = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                one -= rate * m / (1 - 0.9 ** (step + 1)) / grown
        if (step + 1) % every == 0:
            points.append((step + 1, fit.validation(validation)))
            if last or points[-1][1] < min(loss for _, loss in points[:-1]):
                best = [one.detach().clone() for one in learnt]
    with torch.no_grad():
        for one, kept in zip(learnt, best, strict=True):
            one.copy_(kept)
    return points


def hub_objective(fit: Fit, weights: Sequence[float], lines: Sequence[Line], l1: float) -> float:
    """LoraHub's objective of one weight per adapter: mean over lines of each one's mean loss, and l1 · mean |w|."""
    for module in fit.modules:
        for i, weight in enumerate(weights):
            fit.theta[module][i].data.fill_(weight)
    return fit.validation(lines) + l1 * sum(map(abs, weights)) / len(weights)
