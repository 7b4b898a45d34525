#!/usr/bin/env bash
# llama.cpp's convert_lora_to_gguf.py swaps the two factors of every module of a GPT-2 adapter: it transposes what it takes for a weight of
# Conv1D, (in, out), but PEFT keeps lora_A as (r, in) and lora_B as (out, r) there too. The exit code is 0. Square modules get the
# transposed update; of the others lora_a has as many columns as the module has outputs, which llama.cpp refuses to load.
# Source: llama.cpp, conversion/gpt2.py (modify_tensors) and convert_lora_to_gguf.py (LoraTorchTensor.transpose).
# llama-cpp-python 0.3.36, whose source distribution holds the converter, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" transformers==5.24.0 safetensors==0.8.0 numpy
"$work/venv/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$work" llama-cpp-python==0.3.36
tar xzf "$work"/llama_cpp_python-0.3.36.tar.gz -C "$work" --strip-components=3 --wildcards '*/vendor/llama.cpp/*.py'
cat >"$work/show.py" <<'PYTHON'
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, "gguf-py")
import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file

base = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 104, "n_embd": 32, "n_layer": 1, "n_head": 4}
adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
for folder, name, config in (("base", "config.json", base), ("adapter", "adapter_config.json", adapter)):
    Path(folder).mkdir()
    Path(folder, name).write_text(json.dumps(config))
draw = np.random.default_rng(0)
shapes = {"c_attn": (96, 32), "c_proj": (32, 32)}
factors = {
    f"base_model.model.transformer.h.0.attn.{module}.lora_{side}.weight": draw.standard_normal(shape).astype("float32")
    for module, (out, into) in shapes.items()
    for side, shape in (("A", (2, into)), ("B", (out, 2)))
}
save_file(factors, "adapter/adapter_model.safetensors")
words = ["convert_lora_to_gguf.py", "--base", "base", "--outfile", "adapter.gguf", "adapter"]
done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
print("exit code of the converter:", done.returncode)
assert done.returncode == 0, done.stderr
written = {one.name: one.data for one in GGUFReader("adapter.gguf").tensors}
for module, theirs in (("c_attn", "attn_qkv"), ("c_proj", "attn_output")):
    a, b = (factors[f"base_model.model.transformer.h.0.attn.{module}.lora_{side}.weight"] for side in "AB")
    found_a, found_b = (written[f"blk.0.{theirs}.weight.lora_{side}"] for side in "ab")
    print(f"{module}: lora_A {a.shape}, lora_B {b.shape}; in GGUF lora_a {found_a.shape}, lora_b {found_b.shape}")
    assert np.array_equal(found_a, b.T)
    assert np.array_equal(found_b, a.T)
update, applied = b @ a, found_b @ found_a
error = np.linalg.norm(applied - update) / np.linalg.norm(update)
print(f"c_proj, as llama.cpp applies it: relative error {error:.2f}; it is the transposed update: {np.allclose(applied, update.T)}")
assert error > 1
PYTHON
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" show.py
