"""LoRA Soups' CAT: linear coefficients that start at the average."""

from typing import Annotated, Literal

from lora_cli.fit_methods import Learning
from lora_cli.fit_methods._axes import along
from lora_cli.methods import Knob, method


@method("gradient", lr=5e-2)
def cat(
    adapters: int,
    *,
    checkpoint: Annotated[
        Literal["best", "last"], Knob("The step whose coefficients are kept: the best by validation, or the last.")
    ] = "best",
) -> Learning:
    """Linear coefficients per module from 1/N, as in LoRA Soups.

    c = θ, one per adapter and module, from 1/N. LoRA Soups trains at 3e-4 for three epochs (`--lr 3e-4 --steps S`),
    which hardly leaves the average on a few examples; rate and steps here are those of the family.

    Source: LoRA Soups, Prabhakar et al. 2024, arXiv 2410.13025.
    """
    return Learning(parameters=along(adapters, "module", "linear", "average"), kept=checkpoint)
