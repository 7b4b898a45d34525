#!/usr/bin/env bash
# On a CPU, bitsandbytes gives back other values than it stored in 4 bits where a row is no multiple of the block of 64 numbers: the
# kernel counts blocks by row, storing counts them over the whole tensor. There is no warning; errors are as large as the weights.
# Source: bitsandbytes.functional.dequantize_4bit, backends/cpu/ops.py.
# bitsandbytes 0.50.2, torch 2.13.0 on a CPU with AVX512; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14" "bitsandbytes==0.50.2"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

torch.manual_seed(0)
found = {}
for columns in (64, 128, 96, 160):
    weight = torch.randn(64, columns)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    stored = (state.code[codes] * state.absmax.repeat_interleave(64)).view(weight.shape)
    found[columns] = float((dequantize_4bit(packed, state) - stored).abs().max())
    print(f"{columns} columns: stored within {float((stored - weight).abs().max()):.2f}, read back {found[columns]:.2f} from what is stored")
assert max(found[64], found[128]) < 1e-5 < 0.5 < min(found[96], found[160])
PYTHON
