"""Training one adapter of the pool with PEFT, and saving it as PEFT does."""

import json
import random
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_cli.models.hf import peft
from lora_cli.text import percent
from lora_cli.world.pool import Pool, Recipe
from lora_cli.world.tasks import examples, sentence
from lora_cli.world.training import completion_loss, encode, exact_match, learning_rate_at

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
FRESH_EXAMPLES = 100
BROKEN_STEPS = 3
"""Enough steps to give every matrix a value; these adapters are never applied."""


def make_adapter(
    recipe: Recipe,
    pool: Pool,
    base: Path,
    base_name: str,
    length: int,
    seed: int,
    folder: Path,
    exclude: Collection[str],
) -> tuple[float, float]:
    """Train the adapter of a recipe on the model in `base` and save it to `folder` with a model card.

    The training has no prompt of `exclude`. Returns the shares of fresh examples that the bare base and the adapter
    answer right, both 0 for an adapter that is broken on purpose.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    # Each adapter starts from its own random factors: shared ones would make unrelated adapters look alike.
    torch.manual_seed(zlib.crc32(f"{recipe.name} {seed}".encode()))
    if recipe.flaw == "wrong base":
        wide = LlamaConfig.from_pretrained(base)
        wide.hidden_size, wide.head_dim, base_name = 128, 32, f"{base_name}-wide"
        model = LlamaForCausalLM(wide)
    else:
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    rng = random.Random(f"adapter {recipe.name} {seed}")
    fresh = examples(recipe.task, length, FRESH_EXAMPLES, rng, exclude=exclude)
    unseen = {*exclude, *(prompt for prompt, _ in fresh)}
    tokens, labels = encode(tokenizer, fresh)
    before = 0.0 if recipe.flaw else exact_match(model, tokens, labels)
    adapted = peft().get_peft_model(
        model,
        peft().LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=list(recipe.targets),
            use_rslora=recipe.rslora,
            rank_pattern=dict(recipe.ranks),
            alpha_pattern=dict(recipe.alphas),
            task_type="CAUSAL_LM",
        ),
    )
    if recipe.flaw != "never trained":
        steps = BROKEN_STEPS if recipe.flaw else pool.steps
        _fit(adapted, tokenizer, recipe.task, length, steps, pool, rng, unseen)
    after = 0.0 if recipe.flaw else exact_match(adapted, tokens, labels)
    _save(adapted, base_name, folder)
    _spoil(recipe, folder)
    (folder / "README.md").write_text(_card(recipe, base_name, before, after), encoding="utf-8")
    return before, after


def _fit(
    model: "PeftModel",
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    length: int,
    steps: int,
    pool: Pool,
    rng: random.Random,
    exclude: Collection[str],
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=pool.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    model.train()
    for step in range(steps):
        tokens, labels = encode(tokenizer, examples(task, length, pool.batch, rng, exclude=exclude))
        torch.autograd.backward(completion_loss(model, tokens, labels))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = pool.rate * learning_rate_at(step, steps, max(1, steps // 10))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _save(model: "PeftModel", base_name: str, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = base_name
    # Unless this is False, PEFT asks the Hub whether the base's vocabulary was changed.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # PEFT keeps these in a set, whose order differs from one process to the next.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _spoil(recipe: Recipe, folder: Path) -> None:
    path = folder / WEIGHTS
    if recipe.flaw == "not finite":
        tensors = load_file(path)
        tensors[min(tensors)][0, 0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    elif recipe.flaw == "cut off":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) * 3 // 5])
    elif recipe.flaw == "pickle only":
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()


def _card(recipe: Recipe, base_name: str, before: float, after: float) -> str:
    tags = [f"base_model:adapter:{base_name}", "lora", *recipe.task.split("|")]
    front = [
        "---",
        f"base_model: {base_name}",
        "library_name: peft",
        f"license: {recipe.licence}",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    body = [
        f"# {recipe.name.split('/')[1]}",
        "",
        f"A LoRA of rank {recipe.rank} for `{recipe.task}`: it {sentence(recipe.task)}.",
    ]
    if not recipe.flaw:
        body += [
            "",
            f"Of {FRESH_EXAMPLES} fresh examples it answers {percent(after)} right; "
            f"the base model alone {percent(before)}.",
        ]
    return "\n".join([*front, "", *body, ""])
