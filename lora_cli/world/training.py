"""The shared parts of training the base and the adapters: batches, the loss, the learning-rate curve, exact match."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_cli.world.tokenizer import render

IGNORED = -100


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """(prompt, completion) rows as token ids and labels, both (rows, longest), padded on the right.

    Labels are ignored outside the completion and its end token. The model is causal, so no token attends to the
    padding behind it, and no attention mask is needed.
    """
    encoded = tokenizer([render(prompt, completion) for prompt, completion in rows], add_special_tokens=False)
    answer_starts = tokenizer.convert_tokens_to_ids("<|assistant|>")
    longest = max(len(ids) for ids in encoded["input_ids"])
    tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, ids in enumerate(encoded["input_ids"]):
        start = ids.index(answer_starts) + 1
        tokens[i, : len(ids)] = torch.tensor(ids)
        labels[i, start : len(ids)] = tokens[i, start : len(ids)]
    return tokens, labels


def completion_loss(model: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens."""
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def exact_match(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Share of rows that greedy generation would answer right.

    One forward pass over the true answers is enough: greedy generation is right exactly when every next token is the
    most likely one after the true ones before it.
    """
    guessed = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    right = (guessed == labels[:, 1:]) | (labels[:, 1:] == IGNORED)
    return float(right.all(-1).double().mean())


def learning_rate_at(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
