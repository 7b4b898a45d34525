#!/usr/bin/env bash
# Of the keys of alpha_pattern the first that matches a module counts, and save_pretrained writes them sorted by name. So an adapter with
# {"v_proj": 64, "layers.0.self_attn.v_proj": 4} is trained with alpha 64 in layer 0 and loaded with 4: "l" comes before "v". The files
# hold the trained factors, and nothing is said. With a rank_pattern of this order the saved adapter does not load at all.
# Source: peft/utils/other.py (get_pattern_key), peft/config.py (save_pretrained, json.dumps with sort_keys).
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W error::UserWarning -W ignore::FutureWarning - <<'PYTHON'
import tempfile

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}
IDS = torch.arange(3, 11)[None]
GENERAL, SPECIAL = ("v_proj", 64), ("layers.0.self_attn.v_proj", 4)


def base():
    """A small Llama, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def scale(model):
    """The scale of v_proj in layer 0."""
    return model.base_model.model.model.layers[0].self_attn.v_proj.scaling["default"]


def trial(**settings):
    """An adapter in memory, and its folder."""
    made = get_peft_model(base(), LoraConfig(r=4, target_modules=["v_proj"], **settings))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    folder = tempfile.mkdtemp()
    made.save_pretrained(folder)
    return made, folder


print("peft", peft.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
for order in ((SPECIAL, GENERAL), (GENERAL, SPECIAL)):
    made, folder = trial(alpha_pattern=dict(order))
    again = PeftModel.from_pretrained(base(), folder)
    lost = float((logits(again) - logits(made)).norm() / (logits(made) - logits(base())).norm())
    print(f"alpha_pattern {dict(order)}: scale in layer 0 {scale(made):g}, loaded again {scale(again):g}, wrong by {lost:.0%}")
    assert scale(made) == order[0][1] / 4
    assert scale(again) == SPECIAL[1] / 4
    assert (lost > 0.3) == (order[0] == GENERAL)

made, folder = trial(rank_pattern=dict((GENERAL, SPECIAL)))
try:
    PeftModel.from_pretrained(base(), folder)
    said = ""
except RuntimeError as error:
    said = str(error)
print("rank_pattern of this order:", " ".join(said.split())[:200])
assert "size mismatch" in said
PYTHON
