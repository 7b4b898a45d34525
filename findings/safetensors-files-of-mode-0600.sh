#!/usr/bin/env bash
# save_file gives every file the mode 0600, whatever the umask, and takes the place of a file that others could read: it
# writes a private file beside the path and renames it there. So a server that runs as another user cannot open an adapter
# that a trainer saved, while adapter_config.json beside it is readable; a link at the path is replaced, not followed.
# Source: safetensors.torch.save_file and safetensors.numpy.save_file, as called by save_pretrained of PEFT and transformers.
# safetensors 0.8.0, numpy 2.4.6, Python 3.11; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$work"
umask 022
"$work/venv/bin/python" - <<'PYTHON'
import os
import stat
from pathlib import Path

import numpy
from safetensors.numpy import save, save_file

tensors = {"a": numpy.zeros(4, dtype=numpy.float32)}
mode = lambda path: oct(stat.S_IMODE(os.stat(path).st_mode))
Path("by-hand.safetensors").write_bytes(save(tensors))
save_file(tensors, "new.safetensors")
print("written by hand:", mode("by-hand.safetensors"), "by save_file:", mode("new.safetensors"))
assert mode("by-hand.safetensors") == "0o644"
assert mode("new.safetensors") == "0o600"

Path("shared.safetensors").write_bytes(b"")
Path("shared.safetensors").chmod(0o664)
save_file(tensors, "shared.safetensors")
print("over a file of mode 0664:", mode("shared.safetensors"))
assert mode("shared.safetensors") == "0o600"

Path("target.safetensors").write_bytes(b"as it was")
Path("link.safetensors").symlink_to("target.safetensors")
save_file(tensors, "link.safetensors")
print("over a link: still a link:", Path("link.safetensors").is_symlink())
assert not Path("link.safetensors").is_symlink()
assert Path("target.safetensors").read_bytes() == b"as it was"
PYTHON
