"""What a search makes better: a metric of the training examples on the loaded base, or the number of a command."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora_cli.fit_methods import Search
from lora_cli.formats.kinds import CONFIG_NAME, WEIGHTS_NAME
from lora_cli.formats.reader import open_adapter
from lora_cli.formats.store import AdapterFiles, folder_ref
from lora_cli.methods import Method
from lora_cli.metrics import METRICS
from lora_cli.models.answering import Asked, answers
from lora_cli.models.base_model import BaseModel
from lora_cli.models.encode import Encoded
from lora_cli.models.kept import can_keep
from lora_cli.models.mixture import Mixture
from lora_cli.recipes import EvalOptions
from lora_cli.records import Example
from lora_cli.steps.evaluate.groups import MOST_TOGETHER, Judging
from lora_cli.steps.fit.command import Command


class Objective(Protocol):
    """What is made better, by the values of θ. `at_once` is the number of candidates that one call takes best."""

    @property
    def at_once(self) -> int: ...

    def values(self, thetas: Tensor) -> list[float]:
        """The value of each θ, (K, size), by the training examples or by the command."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a search made better, and how far.

    `training` are the values of the start and of the best θ; `before` and `after` those of each example held out, ()
    for a command, which has data of its own. `of_folder` judges an adapter in a folder in the same way: its value, and
    those of the examples held out.
    """

    name: str
    better: str
    training: tuple[float, float]
    before: tuple[float, ...]
    after: tuple[float, ...]
    of_folder: "Judge" = field(repr=False, compare=False)


Judge = Callable[[Path], tuple[float, tuple[float, ...]]]


def direction(how: Search) -> str:
    """Whether a "higher" or a "lower" value of the objective is better."""
    return METRICS.get(how.objective).better if how.objective in METRICS.methods else how.better


def options_of(how: Search) -> EvalOptions:
    """How a metric is taken in a search."""
    knobs = {"normalise": how.normalise} if "normalise" in METRICS.get(how.objective).knobs else {}
    return EvalOptions(metric=how.objective, max_new_tokens=how.max_new_tokens, **knobs)


class ByLikelihood:
    """A metric of likelihoods: all candidates read the examples together, what these begin with once per candidate."""

    def __init__(self, base: BaseModel, mixture: Mixture, examples: Sequence[Encoded], metric: Method) -> None:
        self._base, self._mixture, self._examples = base, mixture, examples
        self._judge: Callable[[Sequence[float]], Sequence[float]] = METRICS.load(metric.name)
        self.at_once = MOST_TOGETHER if mixture.tries_together else 1

    def values(self, thetas: Tensor) -> list[float]:
        """The mean value of the examples by each θ."""
        copies, found = len(thetas), [[0.0] * len(self._examples) for _ in thetas]
        asked = [Asked(owner, example) for example in self._examples for owner in range(copies)]
        with self._mixture.trying(thetas):
            together = self._mixture if copies > 1 else None
            for ended in answers(self._base, asked, together, most=0, limit=None):
                for place, told in ended:
                    found[place % copies][place // copies] = told.log_likelihood
        return [_mean(self._judge(own)) for own in found]


class ByAnswers:
    """A metric of outputs or choices: all candidates are asked together, each block of rows with its own θ."""

    def __init__(self, base: BaseModel, mixture: Mixture, judging: Judging) -> None:
        self._mixture, self._judging = mixture, judging
        together = mixture.tries_together and (not judging.most or can_keep(base))
        self.at_once = MOST_TOGETHER if together else 1

    def values(self, thetas: Tensor) -> list[float]:
        """The mean value of the examples by each θ."""
        with self._mixture.trying(thetas):
            return [_mean(own) for own in self._judging.values(len(thetas), self._mixture)]


class ByCommand:
    """The number that a command prints about the folder of each candidate.

    write: makes the folder of the mixture's current coefficients, which does not exist before.
    beside: the state of the search; None for folders in the usual place of temporary files.
    """

    at_once = 1

    def __init__(self, mixture: Mixture, command: Command, write: Callable[[Path], None], beside: Path | None) -> None:
        self._mixture, self._command, self._write, self._beside = mixture, command, write, beside

    def values(self, thetas: Tensor) -> list[float]:
        """The number of each θ. Refused if the command gives none."""
        return [self._number(theta) for theta in thetas]

    def _number(self, theta: Tensor) -> float:
        with torch.no_grad():
            self._mixture.theta.copy_(theta)
        place, prefix = None, "lora-candidate-"
        if self._beside is not None:  # from where the end of the fit sweeps what a killed one left
            place, prefix = self._beside.parent, f"{self._beside.stem}-"
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place) as made:
            folder = Path(made, "adapter")
            self._write(folder)
            return self._command.number(folder)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


class Held:
    """A metric of the examples held out, with what is applied to the base now."""

    def __init__(self, base: BaseModel, examples: Sequence[Example], options: EvalOptions) -> None:
        self._base, self._judging = base, Judging.of(base, examples, options)

    def each(self) -> tuple[float, ...]:
        """The value of each example."""
        [values] = self._judging.values(1, None)
        return tuple(values)

    def of_folder(self, folder: Path) -> tuple[float, tuple[float, ...]]:
        """The mean value and that of each example, by the adapter in a folder."""
        files = AdapterFiles(folder_ref(folder), folder / CONFIG_NAME, folder / WEIGHTS_NAME)
        adapter = open_adapter(files, self._base.skeleton)
        with self._base.applied({module: adapter.read(module) for module in adapter.modules}):
            each = self.each()
        return _mean(each), each


class Outside:
    """A command, which judges folders alone and has data of its own."""

    def __init__(self, command: Command) -> None:
        self._command = command

    def each(self) -> tuple[float, ...]:
        """Nothing: a command gives one number."""
        return ()

    def of_folder(self, folder: Path) -> tuple[float, tuple[float, ...]]:
        """The number of the adapter in a folder."""
        return self._command.number(folder), ()
