#!/usr/bin/env bash
# add_weighted_adapter makes a sum of rsLoRA adapters √rank times too strong, the rank being that of the result: "cat" of two of rank 4
# is applied 2.83 times, "svd" to rank 10 is 3.16 times, and one adapter alone with weight 1 comes back twice as strong. The result gets
# alpha = rank, which is a scale of 1 without rsLoRA, but keeps use_rslora of its first parent, by which alpha/√rank is √rank.
# With ordinary adapters first and the rsLoRA adapters second the sum is right.
# Source: LoraModel.add_weighted_adapter in peft/tuners/lora/model.py.
# peft 0.21.2, transformers 5.24.0, torch 2.13 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import math

import torch
from peft import LoraConfig, get_peft_model


def strength(combination, *rslora, **options):
    """How many times the sum of adapters of rank 4 is contained in what add_weighted_adapter makes of them, and the relative rest."""
    torch.manual_seed(0)
    configs = [
        LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, use_rslora=one) for one in rslora
    ]
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 10)), configs[0], adapter_name="0")
    for place, config in enumerate(configs[1:], 1):
        model.add_adapter(str(place), config)
    names = [str(place) for place in range(len(configs))]
    model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type=combination, **options)
    layer = model.base_model.model[0]
    wanted = sum(layer.get_delta_weight(name) for name in names)
    found = layer.get_delta_weight("sum")
    times = float((found * wanted).sum() / wanted.square().sum())
    return times, float((found - times * wanted).norm() / found.norm())


found = {
    "cat of two": strength("cat", True, True),
    "svd of two, to rank 10": strength("svd", True, True, svd_rank=10),
    "cat of one": strength("cat", True),
    "cat of two, the first without rsLoRA": strength("cat", False, True),
    "cat of two without rsLoRA": strength("cat", False, False),
}
for name, (times, rest) in found.items():
    print(f"{name}: {times:.4f} times the sum, rest {rest:.0e}")
assert all(rest < 1e-5 for _, rest in found.values())
expected = [math.sqrt(8), math.sqrt(10), math.sqrt(4), 1, 1]
assert all(abs(times - wanted) < 1e-4 for (times, _), wanted in zip(found.values(), expected, strict=True))
PYTHON
