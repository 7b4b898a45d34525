#!/usr/bin/env bash
# mlx writes "__metadata__": null into a safetensors file that it is given no metadata for, as mlx_lm.lora does for every adapter. The
# format says that the value is a map of texts; the safetensors library takes the null and reports no metadata. A reader that holds to
# the format's text refuses every adapter of mlx-lm.
# Source: mlx/io/safetensors.cpp (save_safetensors); mlx_lm/tuner/trainer.py, which passes no metadata.
# mlx 0.32.4, safetensors 0.8.0; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" "safetensors==0.8.0" numpy
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import sys

import mlx.core as mx
from safetensors import safe_open

file = f"{sys.argv[1]}/a.safetensors"
mx.save_safetensors(file, {"x": mx.zeros((2, 3))})
data = open(file, "rb").read()
header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
print("header:", header)
assert header["__metadata__"] is None
with safe_open(file, "numpy") as opened:
    print("safetensors:", [*opened.keys()], opened.metadata())
    assert [*opened.keys()] == ["x"]
    assert opened.metadata() is None
PYTHON
