#!/usr/bin/env bash
# OpenVINO GenAI applies an adapter of a tied lm_head to the embeddings too in AdapterConfig.Mode.MODE_FUSE: it writes the sum into
# the constant that both read. MODE_STATIC and the default, MODE_DYNAMIC, change lm_head alone, as PEFT does.
# Source: openvino.genai, src/cpp/src/lora/adapter.cpp (LoRAFuseTransform::apply, which replaces the weight for all its consumers).
# openvino-genai 2026.4.1.0, optimum-intel 2.2.0, transformers 5.5.4, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 openvino==2026.4.1 \
    optimum-intel==2.2.0 transformers==5.5.4 "torch>=2.13,<2.14"
# The torchvision that optimum-intel brings may be for another kind of torch; text models do not need it.
"$work/venv/bin/pip" uninstall --quiet --yes torchvision
cd "$work"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
"$work/venv/bin/python" - <<'PYTHON'
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
config = LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True)
LlamaForCausalLM(config).save_pretrained("base")
factors = {"A": torch.randn(2, 32), "B": 0.1 * torch.randn(64, 2)}
save_file({f"base_model.model.lm_head.lora_{side}.weight": one for side, one in factors.items()}, "adapter.safetensors")
PYTHON
"$work/venv/bin/optimum-cli" export openvino --model base --task text-generation-with-past --weight-format fp32 converted 2>/dev/null
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import openvino
import openvino_genai as genai
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

IDS = list(range(1, 33))


def expected(*, embeddings_too):
    """Log-probabilities of the tokens of the text, lm_head alone changed or the embeddings with it."""
    model = LlamaForCausalLM.from_pretrained("base", dtype=torch.float32)
    a, b = (load_file("adapter.safetensors")[f"base_model.model.lm_head.lora_{side}.weight"] for side in "AB")
    if not embeddings_too:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with torch.no_grad():
        model.lm_head.weight += b @ a
        found = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    return np.array([found[place, token] for place, token in enumerate(IDS[1:])])


def by_genai(mode):
    config = genai.AdapterConfig(genai.Adapter("adapter.safetensors"), getattr(genai.AdapterConfig.Mode, mode))
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    pipeline = genai.ContinuousBatchingPipeline("converted", scheduler, "CPU", {**exact, "adapters": config})
    settings = genai.GenerationConfig(max_new_tokens=1, echo=True, logprobs=1, ignore_eos=True)
    ids = openvino.Tensor(np.array([IDS], dtype=np.int64))
    pipeline.generate([ids], [settings])  # The dynamic modes set the adapter here, not in add_request.
    asked = pipeline.add_request(1, ids, settings)
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return np.array(asked.read_all()[0].generated_log_probs[1 : len(IDS)])


print("openvino-genai", genai.__version__, "openvino", openvino.__version__)
head, both = expected(embeddings_too=False), expected(embeddings_too=True)
off = {}
for mode in ("MODE_DYNAMIC", "MODE_STATIC", "MODE_FUSE"):
    found = by_genai(mode)
    off[mode] = [np.abs(found - want).max() for want in (head, both)]
    print(f"{mode}: off by {off[mode][0]:.0e} from lm_head alone, by {off[mode][1]:.0e} from lm_head and embeddings")
assert off["MODE_DYNAMIC"][0] < 1e-3
assert off["MODE_STATIC"][0] < 1e-3
assert off["MODE_FUSE"][0] > 0.1
assert off["MODE_FUSE"][1] < 0.1
PYTHON
