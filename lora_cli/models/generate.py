"""Greedy continuations of prompts."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_cli.models.base_model import BaseModel, by_length
from lora_cli.models.encode import Opening, until_end
from lora_cli.models.hf import quiet
from lora_cli.records import Prompt

PROMPTS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """The model's text after a prompt: the text, its number of tokens, and its share of the batch's seconds.

    `continues` is False if the text does not begin with the cut end of the prompt; see `Opening`.
    """

    text: str
    tokens: int
    seconds: float
    continues: bool = True


def generate(
    base: BaseModel, prompts: Sequence[Prompt], *, max_new_tokens: int = 30, batch_size: int = PROMPTS_AT_ONCE
) -> list[str]:
    """The greedy continuation of each prompt, in the order of the prompts.

    Raises:
        DataError: a prompt with `max_new_tokens` more is longer than the model takes.
    """
    texts = [""] * len(prompts)
    openings = [base.encoder.opening(prompt) for prompt in prompts]
    lengths = {str(row): len(opening.ids) + max_new_tokens for row, opening in enumerate(openings, start=1)}
    base.encoder.demand_room(lengths, new=max_new_tokens)
    for row, generation in stream(base, openings, max_new_tokens=max_new_tokens, batch_size=batch_size):
        texts[row] = generation.text
    return texts


def stream(
    base: BaseModel, openings: Sequence[Opening], *, max_new_tokens: int = 30, batch_size: int | None = None
) -> Iterator[tuple[int, Generation]]:
    """Greedy continuations as (index of the opening, Generation), batch by batch.

    Openings that end alike share batches, the longest first. The caller has asked for room: `Encoder.demand_room`.
    `batch_size` is None for the usual size.
    """
    lengths = [len(opening.ids) for opening in openings]
    for rows in by_length(lengths, batch_size or PROMPTS_AT_ONCE, [opening.ends for opening in openings]):
        began = time.perf_counter()
        outputs = _greedy(base, [openings[row] for row in rows], max_new_tokens)
        seconds = (time.perf_counter() - began) / len(rows)
        for row, output in zip(rows, outputs, strict=True):
            text, continues = base.encoder.written(openings[row], output)
            yield row, Generation(text, len(output), seconds, continues)


@torch.no_grad()
def _greedy(base: BaseModel, openings: Sequence[Opening], max_new_tokens: int) -> list[list[int]]:
    """The continuation of each opening; all openings have the same ends."""
    prompts, ends = [opening.ids for opening in openings], openings[0].ends
    width = max(len(ids) for ids in prompts)
    # New tokens are appended on the right, so prompts are filled up on the left, masked.
    tokens = torch.tensor([[base.pad] * (width - len(ids)) + [*ids] for ids in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=base.device)
    with quiet():
        written = base.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends),
        )
    return [list(until_end(row, ends)) for row in written[:, width:].tolist()]
