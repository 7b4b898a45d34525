#!/usr/bin/env bash
# save_file writes metadata of several keys in another order from process to process, so the same adapter saved twice has two hashes: content
# addressing, lock files and "did anything change" see a change where there is none. With one key, as PEFT writes ("format"), the bytes
# repeat; trainers that keep their settings in the file write dozens.
# Source: safetensors, src/tensor.rs (Metadata holds a HashMap, whose order is drawn anew in each process).
# safetensors 0.8.0, numpy 2.4.6; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import hashlib
import subprocess
import sys

import numpy
import safetensors
from safetensors.numpy import load, save

CODE = """
import sys
import numpy
from safetensors.numpy import save
keys = ("format", "rank", "alpha", "base", "seed")[: int(sys.argv[1])]
sys.stdout.buffer.write(save({"a": numpy.zeros(4, "f4"), "b": numpy.ones(4, "f4")}, metadata={key: "1" for key in keys}))
"""


def files(keys):
    """What eight processes write of the same tensors and the same metadata of so many keys."""
    return [subprocess.run([sys.executable, "-c", CODE, str(keys)], capture_output=True, check=True).stdout for _ in range(8)]


print("safetensors", safetensors.__version__, "numpy", numpy.__version__)
one, several = files(1), files(5)
for keys, found in ((1, one), (5, several)):
    hashes = {hashlib.sha256(file).hexdigest()[:8] for file in found}
    print(f"{keys} keys of metadata: {len({*found})} different files of 8, hashes {' '.join(sorted(hashes))}")
assert len({*one}) == 1 < len({*several})
assert len({len(file) for file in several}) == 1
assert all(numpy.array_equal(load(file)["b"], numpy.ones(4)) for file in several)
PYTHON
