"""The memory of a fit by what holds it, from a step of it that is made without data."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from lora_cli.models.base_model import BaseModel
from lora_cli.models.concatenated import Block, added
from lora_cli.models.counted import most_held, without_data
from lora_cli.models.encode import Encoded
from lora_cli.models.four_bit import held
from lora_cli.models.recompute import recomputed
from lora_cli.steps.train.descent import passes

_GAPS = 0.65
"""Memory that glibc keeps and cannot use, per byte that tensors below 32 MiB hold: tests/bench/bench_memory.py."""


def held_by_fit(
    folder: Path,
    dtype: torch.dtype,
    ranks: Mapping[str, int],
    examples: Sequence[Encoded],
    *,
    batch: int,
    recompute: bool,
    four_bit: bool = False,
    heap: bool = False,
) -> dict[str, int] | None:
    """The bytes of the base, of the adapters' factors, of the values that the largest pass holds, and of gaps.

    The largest pass is that of the longest examples. Gaps are memory that the C library keeps for later tensors: 0
    where `heap` is False. None for a model whose pass depends on its data.

    Args:
        folder: of the base; its configuration and its tokenizer are read.
        ranks: the sum of the adapters' ranks in each module.
        examples: those of the task.
        batch: examples per step.
        four_bit: the base's linear layers are held in 4 bits.
        heap: freed memory stays with the process; see `models.heap`.
    """
    try:
        base = without_data(folder, dtype, named=folder.name, four_bit=four_bit)
        factors = {name: rank for name, rank in ranks.items() if name in base.shapes}
        longest = sorted(examples, key=lambda example: -len(example.ids))
        most = most_held(step_of(base, factors, longest[:batch], recompute))
    except Exception:  # each class fails in its own way where it asks for data that are not there
        return None
    numbers = sum(rank * sum(base.shapes[name]) for name, rank in factors.items())
    return {
        "base": held(base.model),
        "adapters": numbers * dtype.itemsize,
        "values": most.all,
        "gaps": round(_GAPS * most.small) if heap and not recompute else 0,
    }


def _same(tensor: Tensor) -> Tensor:
    return tensor


def step_of(
    base: BaseModel, ranks: Mapping[str, int], batch: Sequence[Encoded], recompute: bool
) -> Callable[[], object]:
    """The forward and backward passes of one step, through factors and coefficients without values of their own."""
    terms, weights = {}, {}
    for name, rank in ranks.items():
        out, into = base.shapes[name]
        a, b = (torch.zeros(shape, device=base.device, dtype=base.dtype) for shape in ((rank, into), (out, rank)))
        c = torch.zeros(rank, device=base.device, requires_grad=True)
        terms[name], weights[name] = added(Block(a, b, ()), functools.partial(_same, c), base.model.get_submodule(name))

    def work() -> None:
        with base.attach({}, terms, weights=weights), recomputed(base.model) if recompute else nullcontext():
            for rows in passes([len(example.ids) for example in batch]):
                loss = base.completion_losses([batch[row] for row in rows]).sum()
                loss.backward()  # type: ignore[no-untyped-call]

    return work
