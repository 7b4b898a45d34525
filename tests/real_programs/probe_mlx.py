"""Logits of mlx-lm for token ids, bare and with each adapter: argv is the base's folder, ids, OUT, folders."""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

base, ids, out, *folders = sys.argv[1:]
found = []
for folder in (None, *folders):
    model = load_model(Path(base))[0]
    if folder is not None:
        model = load_adapters(model, folder)
    model.eval()
    found.append(np.array(model(mx.array([json.loads(ids)]))[0]))
np.save(out, np.stack(found))
