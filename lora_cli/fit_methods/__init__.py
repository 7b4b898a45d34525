"""One file is one preset: a named point of the family of fits, with the knobs that may be turned from there."""

from dataclasses import dataclass
from typing import Literal

from lora_cli.models.mixture import Parameters

Measure = Literal["loss", "entropy"]
Kept = Literal["best", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search without gradients: at most `evaluations` of the objective, for θ within ±`bound`.

    objective: the name of a metric, with `max_new_tokens` and `normalise` for those that take them; or a command.
    better: of a command, whether a "higher" or a "lower" number is better; of a metric "metric".
    """

    evaluations: int
    bound: float
    objective: str
    better: str
    max_new_tokens: int
    normalise: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Learning:
    """A point of the family: the parameters of the mixture, and how they are found.

    measure: what is minimised, a mean over examples: "loss" of their completions, or "entropy" of the next token after
        their prompts.
    l1: the weight of the penalty on θ, see `Mixture.penalty`. With `l1_per_example` it is added once for each example
        of a step, else once.
    kept: the parameters that a descent ends with: those of the "best" step by validation, or the "last" step's.
    search: the search that finds θ; None for gradient descent.
    """

    parameters: Parameters
    measure: Measure = "loss"
    l1: float = 0.0
    l1_per_example: bool = False
    kept: Kept = "best"
    search: Search | None = None

    def told(self, step: int) -> str:
        """The step whose parameters are kept, in words."""
        if self.search is not None:
            return f"best by evaluation {step}"
        return f"best at step {step}" if self.kept == "best" else f"as of step {step}"
