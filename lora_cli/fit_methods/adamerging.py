"""AdaMerging: linear coefficients from a task's examples or from its prompts alone."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("gradient", lr=5e-2)
def adamerging(
    adapters: int,
    *,
    objective: Annotated[
        Literal["loss", "entropy"],
        Knob("What is minimised: the loss, or the entropy of the first token after prompts without answers."),
    ] = "loss",
    granularity: Annotated[
        Literal["adapter", "layer", "sublayer", "module"],
        Knob("The parts of the model with a coefficient of their own."),
    ] = "module",
    checkpoint: Annotated[
        Literal["best", "last"], Knob("The step whose coefficients are kept: the best by validation, or the last.")
    ] = "best",
) -> Learning:
    """Linear coefficients from 1/√N, by the loss or by the entropy on prompts alone.

    c = θ, one per adapter and part, from 1/√N: the point that arXiv 2602.12323 calls AdaMerging, which learns from
    examples with answers.

    objective: `loss` is that of the completions. `entropy` needs no answers: it is the mean over prompts x of
    H = −Σ_v p(v|x) ln p(v|x) in nats, where p is the distribution of the first token after the generation prompt over
    the whole vocabulary. Completions in the file are not read, and a line may lack them. The held-out prompts choose
    the step by the same entropy. A model can be sure and wrong: a low entropy is no proof of good answers.

    Source: AdaMerging, Yang et al. 2024, arXiv 2310.02575, which minimises the entropy of class predictions on
    unlabelled test inputs, per task or layer, from 0.3 by Adam at 1e-3; arXiv 2602.12323 for the supervised form.
    """
    return Learning(
        parameters=along(adapters, granularity, "linear", "sqrt"),
        measure="entropy" if objective == "entropy" else "loss",
        kept=checkpoint,
    )
