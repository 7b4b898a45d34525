"""SpectR: for each token a softmax over adapters, by the length of what each would add."""

from typing import Annotated

from lora_cli.algebra.routing import Routing, length_of_output
from lora_cli.methods import Knob, method


@method("routing")
def spectr(
    adapters: int,
    *,
    temperature: Annotated[
        float, Knob("Divides the scores of a token: the higher, the more even its shares.", above=0)
    ] = 1.0,
    top_k: Annotated[
        int, Knob("Adapters that a token may use in a module, those of the highest scores; 0 for all.", low=0)
    ] = 0,
) -> Routing:
    """A router by the whole spectrum of each adapter, without learning.

    For each token x and module, y = W₀x + Σ_i g_i ΔW_i x with g = softmax(‖ΔW_i x‖ / T) over the adapters that have
    the module. ‖ΔW_i x‖ = ‖S_i V_iᵀ x‖: the projections on all right singular vectors V_i, times the singular values
    S_i. So the scale of an adapter counts, which it does not in `arrow`. No data is needed. The result is a router and
    no LoRA. PEFT has no router of this kind: `lora eval` applies it.

    An adapter that lacks the module, or whose update there is zero, has no share of it.

    Source: SpectR, Fleshman and Van Durme 2025, arXiv 2504.03454.
    """
    return Routing(score=length_of_output, temperature=temperature, top_k=top_k)
