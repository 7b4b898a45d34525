"""Log-probabilities of every token after token ids in OpenVINO GenAI, bare and with each adapter.

argv is the base's folder in OpenVINO's form, the mode of AdapterConfig, ids, OUT, folders. The program gives no
logits, but the log-probabilities of a prompt's own tokens: it is asked the ids with each token of the vocabulary after
them. add_request alone takes no adapter in the dynamic modes; a call of generate sets it for what follows.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai

base, mode, ids, out, *folders = sys.argv[1:]
text = json.loads(ids)
vocabulary = json.loads(Path(base, "config.json").read_text())["vocab_size"]
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 1
scheduler.enable_prefix_caching = False
found = []
for folder in (None, *folders):
    more = dict(exact)
    if folder is not None:
        adapter = genai.Adapter(Path(folder, "adapter_model.safetensors"))
        more["adapters"] = genai.AdapterConfig(adapter, getattr(genai.AdapterConfig.Mode, mode))
    pipeline = genai.ContinuousBatchingPipeline(base, scheduler, "CPU", more)
    greedy = genai.GenerationConfig(max_new_tokens=1, echo=True, logprobs=1, ignore_eos=True)
    pipeline.generate([openvino.Tensor(np.array([text], dtype=np.int64))], [greedy])
    asked = [
        pipeline.add_request(token, openvino.Tensor(np.array([[*text, token]], dtype=np.int64)), greedy)
        for token in range(vocabulary)
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    found.append([one.read_all()[0].generated_log_probs[len(text)] for one in asked])
np.save(out, np.array(found))
