"""Train a new LoRA on a task: the baseline that every fit has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli.base_model import SEVEN_LINEAR, BaseModel
from lora_cli.errors import UsageError
from lora_cli.records import Example, Progress, silent
from lora_cli.steps.descent import Learnt, Recipe, learn
from lora_cli.task import split

TARGET_RECIPE = Recipe(steps=400, lr=3e-4)
"""The paper's target LoRA: 400 steps of 8 examples at 3e-4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a LoRA was trained; its files are in the folder that `train` was given."""

    learnt: Learnt
    parameters: int
    n_train: int
    n_validation: int


def train(
    base: BaseModel,
    examples: Sequence[Example],
    folder: Path,
    *,
    rank: int = 64,
    alpha: float = 16.0,
    dropout: float = 0.1,
    target_modules: str | Sequence[str] = SEVEN_LINEAR,
    recipe: Recipe = TARGET_RECIPE,
    fraction: float = 0.2,
    progress: Progress = silent,
) -> TrainResult:
    """Train a LoRA on 80 % of the examples, keep the best step by loss on the rest, and save it into `folder`.

    `folder` is an empty folder (`outputs.whole_folder` gives one); the two PEFT files go into it.

    Args:
        target_modules: names of modules, or "all-linear": every linear module but the output head.

    Raises:
        UsageError: settings out of range. Refused: modules that this base lacks, or a loss that is not finite.
        DataError: the examples cannot be split, or one is too long.
    """
    if rank < 1 or not 0 <= dropout < 1 or alpha <= 0:
        raise UsageError("a LoRA needs --rank of at least 1, --alpha above 0 and --dropout in [0, 1)")
    training, validation = split(examples, fraction=fraction, seed=recipe.seed)
    with base.new_adapter(
        rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, seed=recipe.seed
    ) as adapter:
        parameters = adapter.parameters
        learnt = learn(
            base,
            parameters,
            [base.encode(example) for example in training],
            [base.encode(example) for example in validation],
            recipe,
            while_training=adapter.dropout,
            what="train",
            progress=progress,
        )
        adapter.save(folder)
    return TrainResult(
        learnt=learnt,
        parameters=sum(parameter.numel() for parameter in parameters),
        n_train=len(training),
        n_validation=len(validation),
    )
