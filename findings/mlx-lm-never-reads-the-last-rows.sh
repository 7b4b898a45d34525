#!/usr/bin/env bash
# mlx_lm.lora never reads the last rows of a file whose number of rows is no multiple of the batch size, in any epoch: of 7 rows and batches
# of 4 it trains on the first 4 and no others, and scores a validation or test set on its first 4. The batches are made once, before they
# are shuffled. They are said to be sorted by length, but what is sorted by is the number of fields of a row, so their order is the file's.
# Source: mlx_lm/tuner/trainer.py (iterate_batches, evaluate), mlx_lm/tuner/datasets.py (CacheDataset.itemlen).
# mlx-lm 0.32.2, mlx 0.32.4 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
from itertools import islice

import mlx.core as mx
import mlx_lm
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import evaluate, iterate_batches


class Words:
    """A tokenizer of texts that are numbers of tokens."""

    eos_token_id = 99

    def encode(self, text):
        return [int(one) for one in text.split()]


class Seen:
    """A model that notes the first token of what it is given."""

    def __init__(self):
        self.rows = set()

    def __call__(self, inputs):
        self.rows |= {*inputs[:, 0].tolist()}
        return mx.zeros((*inputs.shape, 100))

    def eval(self):
        pass


lengths = [5, 4, 40, 3, 2, 6, 30]
rows = [{"text": " ".join([str(number)] * length)} for number, length in enumerate(lengths, 1)]
data = CacheDataset(TextDataset(rows, Words()))
trained = {first for batch, _ in islice(iterate_batches(data, 4, 64, loop=True), 1000) for first in batch[:, 0].tolist()}
model = Seen()
evaluate(model, data, batch_size=4, num_batches=-1)
print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__)
print(f"rows 1 to {len(rows)}, of {lengths} tokens; read by 1000 training steps: {sorted(trained)}; by the evaluation: {sorted(model.rows)}")
assert trained == model.rows == {1, 2, 3, 4}
PYTHON
