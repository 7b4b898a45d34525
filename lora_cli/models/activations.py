"""The activations that modules of a base model take in, at chosen tokens."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_cli.errors import Refused
from lora_cli.models.base_model import BaseModel, by_length
from lora_cli.models.encode import Encoded


@torch.no_grad()
def activations(
    base: BaseModel,
    modules: Sequence[str],
    examples: Sequence[Encoded],
    places: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> dict[str, Tensor]:
    """Each module's activations at some tokens of each example: (tokens, in) on the CPU, in the base's precision.

    Args:
        places: per example the indices of its tokens; rows come in the order of examples and places.

    Raises:
        Refused: a module does not see every token, as an expert of a mixture does not.
    """
    starts = [0, *itertools.accumulate(len(some) for some in places)]
    found: dict[str, Tensor] = {}
    for rows in by_length([len(item.ids) for item in examples], batch_size):
        goes = torch.tensor([place for row in rows for place in range(starts[row], starts[row + 1])])
        sampled = _of_batch(base, modules, [examples[row] for row in rows], [places[row] for row in rows])
        for name, x in sampled.items():
            found.setdefault(name, x.new_empty(starts[-1], x.shape[1]))[goes] = x
    return found


def _of_batch(
    base: BaseModel, modules: Sequence[str], batch: Sequence[Encoded], places: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    tokens = base.filled(batch).to(base.device)
    flat = torch.tensor([row * tokens.shape[1] + place for row, some in enumerate(places) for place in some])
    sampled: dict[str, Tensor] = {}

    def sampler(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def sample(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            if len(x) == tokens.numel():
                sampled[name] = x[flat.to(x.device)].cpu()

        return sample

    hooks = [base.model.get_submodule(name).register_forward_pre_hook(sampler(name)) for name in modules]
    # Logits can need the most memory: run the head only if one of the modules is in it.
    below = f"{base.model.base_model_prefix}."
    model = base.model.base_model if all(name.startswith(below) for name in modules) else base.model
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name in modules if name not in sampled]:
        raise Refused(
            f"{base.name}: {missing[0]} does not see every token, so its activations cannot be sampled",
            hint="leave it out with --scope",
        )
    return sampled
