#!/usr/bin/env bash
# On a CPU, torch's fused attention gives zeros for queries that are NaN, where there are few keys. With more keys it gives NaN, and
# the plain implementation (SDPBackend.MATH) gives NaN always. A model whose activations have become NaN then has finite logits on
# short prompts: a check of the logits misses it. The border is one vector of floats: 16 keys with AVX-512, float32 and bfloat16
# alike.
# Source: torch.nn.functional.scaled_dot_product_attention, the flash kernel for CPUs.
# torch 2.13.0 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch>=2.13,<2.14"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attention


def share_of_nan(keys, dtype, backend=None):
    """The share of NaN in the attention of 2 heads to so many finite keys, if every query is NaN."""
    q, k, v = (torch.ones(1, 2, keys, 8, dtype=dtype) for _ in range(3))
    q = q * float("nan")
    if backend is None:
        return float(attention(q, k, v, is_causal=True).isnan().double().mean())
    with sdpa_kernel(backend):
        return float(attention(q, k, v, is_causal=True).isnan().double().mean())


print(torch.__version__, torch.backends.cpu.get_cpu_capability())
for dtype in (torch.float32, torch.bfloat16):
    few, many = share_of_nan(4, dtype), share_of_nan(64, dtype)
    plain = share_of_nan(4, dtype, SDPBackend.MATH)
    print(f"{dtype}: NaN in the result of NaN queries: 4 keys {few:.0%}, 64 keys {many:.0%}, 4 keys without fusing {plain:.0%}")
    assert (few, many, plain) == (0.0, 1.0, 1.0)
PYTHON
