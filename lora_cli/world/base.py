"""The world's base model: a tiny Llama, trained here from random weights on a mixture of string operations."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_cli.world.layout import Size
from lora_cli.world.tasks import STRING_LENGTH, example
from lora_cli.world.tokenizer import make_tokenizer
from lora_cli.world.training import completion_loss, encode, learning_rate_at

PERMUTATIONS = ("copy", "reverse", "rotate-one", "rotate-two", "swap", "sort")
SHIFTS = ("shift-one", "shift-two", "shift-three", "shift-four", "shift-five")
EXTRACTIONS = ("evens", "odds", "max", "min", "first", "last")
CHAINS = tuple((first, then) for first in PERMUTATIONS for then in SHIFTS)
HELD_OUT = tuple(
    f"{first}|{then}" for first, then in CHAINS if (SHIFTS.index(then) + 1 + 2 * PERMUTATIONS.index(first)) % 3 == 0
)
"""Chains that the base is never trained on, although it is trained on their parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRecipe:
    """The shape of a base and its training.

    `mixture` has groups of (weight, tasks); the tasks of one group are equally likely.
    """

    hidden: int
    layers: int
    inner: int
    init: float
    steps: int
    batch: int
    adam_rate: float
    muon_rate: float
    mixture: tuple[tuple[float, tuple[str, ...]], ...]


RECIPES: dict[Size, BaseRecipe] = {
    "small": BaseRecipe(
        hidden=96,
        layers=3,
        inner=256,
        init=0.1,
        steps=500,
        batch=64,
        adam_rate=3e-3,
        muon_rate=0.02,
        mixture=(
            (0.35, PERMUTATIONS),
            (0.10, SHIFTS),
            (0.40, tuple(f"{a}|{b}" for a, b in CHAINS if f"{a}|{b}" not in HELD_OUT)),
            (0.15, EXTRACTIONS),
        ),
    ),
    "test": BaseRecipe(
        hidden=64,
        layers=2,
        inner=128,
        init=0.12,
        steps=170,
        batch=32,
        adam_rate=4e-3,
        muon_rate=0.03,
        mixture=((0.7, ("copy", "reverse", "rotate-one", "swap")), (0.3, ("evens", "odds", "first", "last"))),
    ),
}


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for weight matrices (K. Jordan and others, 2024).

    Every five steps of Newton-Schulz run on all matrices of one shape at once, in fp32: on a CPU without bf16
    arithmetic this is faster than torch.optim.Muon, and the result is the same with and without it.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.05) -> None:
        super().__init__([{"params": list(matrices), "lr": lr}], {})
        self.momentum, self.decay = momentum, decay

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix from its gradient."""
        del closure
        rate = self.param_groups[0]["lr"]
        alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for matrix in self.param_groups[0]["params"]:
            alike[tuple(sorted(matrix.shape))].append(matrix)
        for matrices in alike.values():
            updates = []
            for matrix in matrices:
                assert matrix.grad is not None
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - self.momentum)
                update = matrix.grad.lerp(average, self.momentum)
                updates.append(update.T if matrix.shape[0] > matrix.shape[1] else update)
            for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                rows, columns = matrix.shape
                matrix.mul_(1 - rate * self.decay)
                matrix.add_(update.T if rows > columns else update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrices with orthonormal rows, by a quintic Newton-Schulz iteration: (n, rows ≤ columns)."""
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, rows, rows)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def train_base(size: Size, seed: int, folder: Path, report: Callable[[int, int], None]) -> None:
    """Train the base of a world and save model, tokenizer and generation settings to `folder`.

    `report(step, steps)` is called every ten steps.
    """
    recipe = RECIPES[size]
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.inner,
            num_hidden_layers=recipe.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            # A small rope_theta and a large initial range: with Llama's, so small a model does not learn to copy.
            rope_parameters={"rope_type": "default", "rope_theta": 30.0},
            initializer_range=recipe.init,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype="float32",
        )
    )
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=16,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _fit(model, tokenizer, recipe, STRING_LENGTH[size], random.Random(f"base {seed}"), report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    recipe: BaseRecipe,
    length: int,
    rng: random.Random,
    report: Callable[[int, int], None],
) -> None:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (Muon(matrices, lr=recipe.muon_rate), recipe.muon_rate),
        (
            torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            recipe.adam_rate,
        ),
    ]
    weights = [weight for weight, _ in recipe.mixture]
    groups = [tasks for _, tasks in recipe.mixture]
    model.train()
    for step in range(recipe.steps):
        chosen = (rng.choice(group) for group in rng.choices(groups, weights, k=recipe.batch))
        tokens, labels = encode(tokenizer, [example(task, length, rng) for task in chosen])
        torch.autograd.backward(completion_loss(model, tokens, labels))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * learning_rate_at(step, recipe.steps, recipe.steps // 10)
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 9:
            report(step + 1, recipe.steps)
    model.eval()
