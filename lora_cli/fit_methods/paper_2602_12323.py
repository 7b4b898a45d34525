"""The adaptive method as its paper's own code runs it."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("gradient", lr=5e-2)
def paper_2602_12323(
    adapters: int,
    *,
    granularity: Annotated[
        Literal["adapter", "layer", "sublayer", "module", "rank"],
        Knob("The parts of the model with a coefficient of their own."),
    ] = "module",
    activation: Annotated[
        Literal["leaky_relu", "linear", "softmax", "sigmoid", "square"],
        Knob("The function from learnt parameters to coefficients."),
    ] = "leaky_relu",
    init: Annotated[
        Literal["zero", "average", "sqrt", "uniform", "normal"], Knob("Start: 0, 1/N, 1/sqrt N, or random.")
    ] = "zero",
    l1: Annotated[float, Knob("Weight of an L1 penalty on the coefficients.", low=0)] = 0.0,
    checkpoint: Annotated[
        Literal["best", "last"], Knob("The step whose coefficients are kept: the best by validation, or the last.")
    ] = "last",
) -> Learning:
    """As the paper's own code runs it, the last step kept.

    Three things differ from `adaptive`.

    checkpoint: the last step's coefficients are the result. The code means to restore the best step and, with the
    versions that it pins, restores nothing.

    l1: the penalty is added once for each example of a step, because passes of one example each add it: with batches
    of 8 a weight of 0.01 counts as 0.08. It also counts the θ of adapters that are absent from a part.

    activation: in a `softmax` adapters that are absent from a part take their share of it, so that the others'
    coefficients there sum to less than 1.

    Five things of that code are not repeated. θ stays in fp32; the code keeps it in the base's precision. A validation
    loss is the mean over examples of each one's mean per token, not the mean over batches of four. The examples held
    out are drawn by a hash of their ids. No prompt gets the text that slipped into one of its templates. A step goes on
    into the next round of the examples; the code's last step of a round takes what is left, 2 of 10 after 8. The base
    is bf16 in the paper: `--dtype bf16`.

    Source: arXiv 2602.12323 and its code.
    """
    return Learning(
        parameters=along(adapters, granularity, activation, init, absent=True),
        l1=l1,
        l1_per_example=True,
        kept=checkpoint,
    )
