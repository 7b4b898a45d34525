#!/usr/bin/env bash
# The eval_loss of transformers' Trainer depends on per_device_eval_batch_size: it is the mean over rows of the mean over the tokens of the
# batch that a row happened to be in. The training loss is a mean over all tokens. So eval_loss and the perplexity made of it differ between
# two runs of one model on one data set, and with the order of the rows, though padding is masked; here by a third.
# Source: Trainer.evaluation_loop and prediction_step in transformers/trainer.py (losses are repeated per row and averaged).
# transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" transformers==5.24.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import tempfile

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)).eval()
hard = torch.randint(1, 64, (40,)).tolist()
easy = model.generate(torch.tensor([[5]]), max_new_tokens=3, do_sample=False, pad_token_id=0)[0].tolist()
rows = [{"ids": ids} for ids in (hard, easy, easy, easy, hard, easy, easy, easy)]


def padded(batch):
    """A batch, its padding masked."""
    width = max(len(row["ids"]) for row in batch)
    filled = lambda of, pad: torch.tensor([of(row["ids"]) + [pad] * (width - len(row["ids"])) for row in batch])
    return {"input_ids": filled(list, 0), "labels": filled(list, -100), "attention_mask": filled(lambda ids: [1] * len(ids), 0)}


def eval_loss(size):
    settings = TrainingArguments(
        tempfile.mkdtemp(), per_device_eval_batch_size=size, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    trainer = Trainer(model, settings, eval_dataset=rows, data_collator=padded)
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate()["eval_loss"]


@torch.no_grad()
def by_token():
    losses = [model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in (torch.tensor([row["ids"]]) for row in rows)]
    return float(sum(losses) / sum(len(row["ids"]) - 1 for row in rows))


print("transformers", transformers.__version__, "torch", torch.__version__)
found = {size: eval_loss(size) for size in (1, 2, 8)}
for size, loss in found.items():
    print(f"batches of {size}: eval_loss {loss:.3f}")
print(f"mean over all tokens: {by_token():.3f}")
assert abs(found[8] - by_token()) < 1e-3
assert found[1] < 0.9 * found[2] < 0.8 * found[8]
PYTHON
