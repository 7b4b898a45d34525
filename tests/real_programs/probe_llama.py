"""Logits of llama.cpp for token ids, bare and with each adapter: argv is base, cache (f16, f32), ids, OUT, files."""

import json
import sys

import numpy as np
from llama_cpp import Llama

base, cache, ids, out, *files = sys.argv[1:]
tokens = json.loads(ids)
found = []
for file in (None, *files):
    kind = {"f32": 0, "f16": 1}[cache]
    model = Llama(
        base,
        lora_path=file,
        n_ctx=256,
        logits_all=True,
        verbose=False,
        n_threads=1,
        type_k=kind,
        type_v=kind,
        flash_attn=False,
    )
    model.eval(tokens)
    found.append(np.array(model.scores[: len(tokens)]))
np.save(out, np.stack(found))
