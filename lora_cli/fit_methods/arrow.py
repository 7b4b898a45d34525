"""Arrow: for each token a softmax over adapters, by the strongest direction of each."""

from typing import Annotated

from lora_cli.algebra.routing import Routing, along_the_strongest
from lora_cli.methods import Knob, method


@method("routing")
def arrow(
    adapters: int,
    *,
    temperature: Annotated[
        float, Knob("Divides the scores of a token: the higher, the more even its shares.", above=0)
    ] = 1.0,
    top_k: Annotated[
        int, Knob("Adapters that a token may use in a module, those of the highest scores; 0 for all.", low=0)
    ] = 0,
) -> Routing:
    """A router by the strongest direction of each adapter, without learning.

    For each token x and module, y = W₀x + Σ_i g_i ΔW_i x with g = softmax(|v_i · x| / T) over the adapters that have
    the module, where v_i is the strongest right singular vector of ΔW_i. No data is needed. The result is a router and
    no LoRA: the shares differ from token to token, so no single update equals it.

    top_k: with K the softmax is over the K highest scores. Arrow's own code keeps 4, PEFT's ArrowConfig 3.

    An adapter that lacks the module, or whose update there is zero, has no share of it; in Arrow's own code, and for
    zeros in PEFT, it takes the share of a score of 0. v_i comes from a singular value decomposition; PEFT makes 15
    power iterations, which stop short of it where the two strongest directions are alike in strength. There v_i itself
    says little.

    Source: Arrow, Ostapenko et al. 2024, arXiv 2405.11157.
    """
    return Routing(score=along_the_strongest, temperature=temperature, top_k=top_k)
