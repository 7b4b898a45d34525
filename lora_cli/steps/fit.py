"""Learn how much of each adapter a task wants: the adaptive merge of arXiv 2602.12323 and its random-weight control."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_cli.adapters.reader import OpenAdapter
from lora_cli.base_model import BaseModel
from lora_cli.errors import NothingMatched, UsageError
from lora_cli.mixture import Mixture, Shape
from lora_cli.records import Coefficients, Example, Progress, silent
from lora_cli.steps.descent import Learnt, Recipe, learn
from lora_cli.task import split


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """Coefficients and how they were found. `n_train` and `n_validation` count the two parts of the data."""

    coefficients: Coefficients
    learnt: Learnt
    n_train: int
    n_validation: int


def fit(
    base: BaseModel,
    adapters: Sequence[OpenAdapter],
    examples: Sequence[Example],
    *,
    shape: Shape | None = None,
    l1: float = 0.0,
    recipe: Recipe | None = None,
    fraction: float = 0.2,
    target: OpenAdapter | None = None,
    reinit: bool = False,
    task_sha256: str = "",
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> FitResult:
    """Fit one coefficient per adapter and module (or as `shape` says) on 80 % of the examples, by loss on the rest.

    Args:
        shape: granularity, activation and start of the coefficients; default per module, leaky ReLU, zero.
        l1: weight of the mean over groups of Σ|θ|.
        recipe: default 100 steps of 8 examples at a learning rate of 0.05.
        fraction: share of the examples held out to choose the best step.
        target: an adapter trained on the task itself; it joins in front of the others.
        reinit: the control: noise of the same spread in place of every adapter's factors, the target's excepted.
        checkpoint: see `learn`.

    Raises:
        NothingMatched: no adapters. Refused: an adapter does not fit, or the loss is not finite.
        DataError: the examples cannot be split, or one is too long. UsageError: settings out of range.
    """
    shape, recipe = shape or Shape(), recipe or Recipe()
    if l1 < 0:
        raise UsageError(f"--l1 must not be negative, not {l1}")
    if not adapters and target is None:
        raise NothingMatched("no adapters to fit", hint="choose some with 'lora select' or name them")
    together = [*([] if target is None else [target]), *adapters]
    training, validation = split(examples, fraction=fraction, seed=recipe.seed)
    kept = 0 if target is None else 1
    mixture = Mixture(base, together, shape, seed=recipe.seed, reinit=reinit, kept=kept)
    key = json.dumps(
        [base.name, str(base.dtype), mixture.adapters, asdict(shape), l1, asdict(recipe), fraction, kept, reinit]
        + [asdict(example) for example in examples]
    )
    with mixture.worn(base):
        learnt = learn(
            base,
            [mixture.theta],
            [base.encode(example) for example in training],
            [base.encode(example) for example in validation],
            recipe,
            penalty=(lambda: l1 * mixture.penalty()) if l1 else None,
            checkpoint=checkpoint,
            key=hashlib.sha256(key.encode()).hexdigest(),
            what="fit control" if reinit else "fit",
            progress=progress,
        )
    coefficients = Coefficients(
        adapters=mixture.adapters,
        values=mixture.values(),
        granularity=shape.granularity,
        activation=shape.activation,
        task_sha256=task_sha256,
        base=base.name,
    )
    return FitResult(coefficients=coefficients, learnt=learnt, n_train=len(training), n_validation=len(validation))
