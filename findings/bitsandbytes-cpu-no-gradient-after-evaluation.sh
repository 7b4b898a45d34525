#!/usr/bin/env bash
# On a CPU with AVX512-BF16 a Linear4bit in eval mode rearranges its weight for good in its first pass without gradients: scales
# become bf16, products bf16, and from then on no gradient flows back through the layer (torch warns once). Inputs that are no multiple
# of 64 end in an error of shapes. Setting support_avx512bf16_for_cpu = False on each layer keeps it as it was quantised.
# Source: bitsandbytes.nn.Linear4bit.forward, functional._convert_weight_packed_for_cpu.
# bitsandbytes 0.50.2, torch 2.13.0 on an EPYC with AVX512-BF16; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" "bitsandbytes==0.50.2"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes as bnb
import torch

torch.manual_seed(0)
layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer.load_state_dict({"weight": torch.randn(64, 64)})
layer = layer.to("cpu").eval()
if not layer.support_avx512bf16_for_cpu:
    print("this CPU has no AVX512-BF16: nothing to see")
    raise SystemExit
x = torch.randn(3, 64, requires_grad=True)


def gradient():
    x.grad = None
    layer(x).square().sum().backward()
    return x.grad


before, output = gradient(), layer(x).detach()
with torch.no_grad():
    layer(x.detach())
print("gradient before:", before is not None, "after a pass without gradients:", gradient() is not None)
print(f"output changed by {float((layer(x) - output).abs().max() / output.abs().max()):.1%} of its largest value")
assert before is not None
assert gradient() is None
PYTHON
