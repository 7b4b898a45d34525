#!/usr/bin/env bash
# create_arrow_model checks and routes linear layers only: updates of embeddings are loaded, and left out without a word.
# With a top_k above the number of adapters (3 is the default of ArrowConfig), and with adapters of some layers only, the
# model is made, and the first token fails. Of flat spectra 15 power iterations do not find the strongest direction.
# Source: peft/tuners/lora/arrow.py (check_loaded_lora_compatibility_arrow, ensure_adapters_target_linear_layers_only,
# ArrowLoraLinearLayer). peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import peft
import torch
import transformers
from peft.tuners.lora.arrow import ArrowLoraLinearLayer

SETTINGS = dict(
    vocab_size=104, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)
IDS = torch.arange(3, 12)[None]


def base():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS)).eval()


def folder(name, seed, **settings):
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, **settings))
    model.save_pretrained(name)
    return name


def logits(paths, top_k):
    model = peft.create_arrow_model(base(), paths, peft.ArrowConfig(top_k=top_k)).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


both = [folder(f"both{seed}", seed, target_modules=["embed_tokens", "q_proj"]) for seed in (1, 2)]
for name in both:
    weights = peft.utils.load_peft_weights(name, device="cpu")
    print(name, "holds", sum("lora_embedding" in key for key in weights), "tensors of an embedding")
alone = peft.PeftModel.from_pretrained(base(), both[0]).eval()
routed = peft.create_arrow_model(base(), both[:1], peft.ArrowConfig(top_k=1)).eval()
with torch.no_grad():
    difference = (alone(input_ids=IDS).logits - routed(input_ids=IDS).logits).abs().max().item()
    for name, parameter in alone.named_parameters():
        if "lora_embedding_B" in name:
            parameter.zero_()
    without = (alone(input_ids=IDS).logits - routed(input_ids=IDS).logits).abs().max().item()
print(f"a router over one adapter differs from it by {difference:.3f}, and by {without:.1e} without its embedding")
assert difference > 0.01 > 100 * without

every = [folder(f"every{seed}", seed, target_modules=["q_proj"]) for seed in (1, 2)]
some = [folder(f"some{seed}", seed, target_modules=["q_proj"], layers_to_transform=[1]) for seed in (1, 2)]
for paths, top_k in ((every, 3), (some, 2)):
    try:
        logits(paths, top_k)
    except RuntimeError as error:
        print(f"{paths[0]} and {paths[1]}, top_k {top_k}: {error}")
    else:
        raise AssertionError("it ran")

torch.manual_seed(0)
a, b = torch.randn(16, 1024), torch.randn(1024, 16)
config = peft.ArrowConfig()
config.task_adapter_names, config.gks_adapter_names = [], []
layer = ArrowLoraLinearLayer(1024, config)
found = layer.top_right_singular_vec_from_BA(a, b)
cosine = (torch.linalg.svd(b @ a)[2][0] @ found).abs().item()
print(f"cosine of the prototype with the strongest direction of a random update of rank 16: {cosine:.2f}")
assert cosine < 0.99
PYTHON
