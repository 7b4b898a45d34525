#!/usr/bin/env bash
# generate(do_sample=False) is not greedy where the base's generation_config.json sets a repetition_penalty, as those of many chat models do:
# the penalty holds without sampling, and a new GenerationConfig(do_sample=False) handed to generate is filled up from the base's, penalty
# and all. What comes is not the most likely text; harnesses that generate with do_sample=False, lm_eval's hf model among them, score that.
# Only repetition_penalty=1.0, named in the call or in the new configuration, gives the argmax of each step.
# Source: transformers/generation/utils.py (_prepare_generation_config, _get_logits_processor).
# transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

PROMPT, NEW = list(range(3, 11)), 12
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
made = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None))
made.generation_config.repetition_penalty = 1.8
made.save_pretrained("base")
model = LlamaForCausalLM.from_pretrained("base").eval()


@torch.no_grad()
def most_likely():
    """The tokens of the highest logits, one after the other."""
    ids = [*PROMPT]
    for _ in range(NEW):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def generated(**settings):
    written = model.generate(torch.tensor([PROMPT]), attention_mask=torch.ones(1, len(PROMPT)), **settings)
    return written[0, len(PROMPT) :].tolist()


print("transformers", transformers.__version__, "torch", torch.__version__)
usual = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
found = {
    "argmax of each step": most_likely(),
    "do_sample=False": generated(**usual),
    "GenerationConfig(do_sample=False)": generated(generation_config=GenerationConfig(**usual)),
    "GenerationConfig(…, repetition_penalty=1.0)": generated(generation_config=GenerationConfig(**usual, repetition_penalty=1.0)),
}
for name, tokens in found.items():
    print(f"{name:44} {tokens}")
likely, called, configured, without = found.values()
assert called == configured != likely == without
PYTHON
