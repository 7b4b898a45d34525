#!/usr/bin/env bash
# An adapter of Qwen2.5-VL from the days of transformers 4 (model.layers.…) changes nothing under transformers 5, where the
# layers are called model.language_model.layers.…: PEFT warns of missing keys and goes on. The same renaming of Gemma-3's
# multimodal model it does carry out, since it looks renamings up by model type and Qwen2.5-VL's are registered by class.
# Source: transformers/conversion_mapping.py; peft/utils/transformers_weight_conversion.py.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0 safetensors==0.8.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import json
import tempfile
import warnings

import peft
import torch
import transformers
from safetensors.torch import save_file
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}


def factors(shapes, prefix="base_model.model."):
    torch.manual_seed(1)
    made = {}
    for name, (rows, columns) in shapes.items():
        made[f"{prefix}{name}.lora_A.weight"] = torch.randn(2, columns)
        made[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, 2)
    return made


def effect(architecture, config, tensors, **settings):
    """The largest change of a logit by an adapter of these tensors, and what PEFT warns of."""
    torch.manual_seed(0)
    base = getattr(transformers, architecture)(config).eval()
    ids = torch.arange(3, 11)[None]
    folder = tempfile.mkdtemp()
    save_file(tensors, f"{folder}/adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json", "w") as file:
        json.dump({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base", **settings}, file)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.PeftModel.from_pretrained(base, folder)
        return (adapted(input_ids=ids).logits - before).abs().max().item(), [str(one.message) for one in caught]


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
gemma = transformers.Gemma3Config(
    text_config=TEXT | {"vocab_size": 300, "head_dim": 8}, mm_tokens_per_image=4, image_token_index=290,
    vision_config=VISION | {"image_size": 28, "patch_size": 14},
)
qwen = transformers.Qwen2_5_VLConfig(
    text_config=TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32},
)
shapes = {"layers.0.self_attn.q_proj": (32, 32)}


def named(prefix):
    return factors({prefix + name: shape for name, shape in shapes.items()})


kind = {"gemma": "Gemma3ForConditionalGeneration", "qwen": "Qwen2_5_VLForConditionalGeneration"}
old_gemma, _ = effect(kind["gemma"], gemma, named("language_model.model."), target_modules=["q_proj"])
old_qwen, _ = effect(kind["qwen"], qwen, named("model."), target_modules=["q_proj"])
new_qwen, _ = effect(kind["qwen"], qwen, named("model.language_model."), target_modules=["q_proj"])
print(f"largest change of a logit: Gemma-3 by its old names {old_gemma:.3f}")
print(f"Qwen2.5-VL by its old names {old_qwen:.3f}, by its new ones {new_qwen:.3f}")
assert old_gemma > 0.01 and new_qwen > 0.01
assert old_qwen == 0
PYTHON
