"""LoraHub: one weight per adapter, found without gradients."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning, Search
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("search")
def lorahub(
    adapters: int,
    *,
    evaluations: Annotated[int, Knob("Weights that the search may try.", low=1)] = 40,
    bound: Annotated[float, Knob("The largest size of a weight.", above=0)] = 1.5,
    l1: Annotated[float, Knob("Weight of an L1 penalty on the coefficients.", low=0)] = 0.05,
    objective: Annotated[
        str, Knob("A metric of the training examples, exact, choice or nll; or a command that prints a number.")
    ] = "nll",
    better: Annotated[
        Literal["metric", "higher", "lower"],
        Knob("Which numbers of a command are better; a metric has its own direction."),
    ] = "metric",
    max_new_tokens: Annotated[int, Knob("Longest output for --objective exact.", low=1)] = 30,
    normalise: Annotated[
        Literal["none", "tokens", "characters"],
        Knob("For --objective choice: the units of an option's length, by which its log-likelihood is divided."),
    ] = "none",
) -> Learning:
    """One weight per adapter, by a search without gradients.

    Minimises L + l1 · mean_i |w_i| over w ∈ [−bound, bound]^N by CMA-ES. It starts at w = 0, which is the first
    evaluation, so that the result is never worse than the base by this objective, with deviations of bound/3. All
    weights of a generation are tried in one batch.

    objective: L is `nll`, the mean loss of the training examples, or another metric of them (docs/metrics.md), negated
    if a higher value is better; or the number that a command prints about the adapter in the folder `{}`, see
    docs/fitting.md. A search over `exact` needs examples of which the base or some mixture gets a few right: where all
    weights score alike, it walks at random.

    The combination is Σ w_i ΔW_i of the updates. LoraHub's code sums A and B apart, which needs equal shapes and adds
    cross terms w_i w_j B_i A_j, and searches with NGOpt of Nevergrad. The examples held out choose nothing: they only
    measure the result. The paper evaluates 100 times, its code 40.

    Source: LoraHub, Huang et al. 2023, arXiv 2307.13269; CMA-ES, Hansen 2016, arXiv 1604.00772.
    """
    # With one part for the whole model the penalty is l1 · Σ|θ|.
    return Learning(
        parameters=along(adapters, "adapter", "linear", "zero"),
        l1=l1 / adapters,
        search=Search(
            evaluations=evaluations,
            bound=bound,
            objective=objective,
            better=better,
            max_new_tokens=max_new_tokens,
            normalise=normalise,
        ),
    )
