#!/usr/bin/env bash
# The "linear" sum of adapters with a rank_pattern works in memory, but what save_pretrained writes of it cannot be loaded: its factors keep
# the ranks of the pattern, and its configuration has one rank and no pattern. "cat" of the same adapters makes one rank of them and loads.
# Source: LoraModel.add_weighted_adapter and its _generalized_task_arithmetic_weighted_adapter in peft/tuners/lora/model.py.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore "$work/venv/bin/python" - <<'PYTHON'
import json
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model


def base():
    """Two linear layers, always the same."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12))


def summed(combination):
    """The configuration that is saved for a sum, and what loading the folder gives: "" or the error."""
    config = LoraConfig(r=4, target_modules=["0", "1"], rank_pattern={"0": 2}, init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name="one")
    model.add_adapter("two", config)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type=combination)
    model.set_adapter("sum")
    model(torch.ones(1, 12))
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder, selected_adapters=["sum"])
    with open(f"{folder}/sum/adapter_config.json") as file:
        saved = json.load(file)
    try:
        PeftModel.from_pretrained(base(), f"{folder}/sum")
    except RuntimeError as error:
        return saved, str(error)
    return saved, ""


for combination in ("linear", "cat"):
    saved, error = summed(combination)
    print(combination, "r:", saved["r"], "rank_pattern:", saved["rank_pattern"], "loads:", error.splitlines()[1:2] or "yes")
    assert saved["rank_pattern"] == {}
    assert ("size mismatch" in error) == (combination == "linear")
PYTHON
