#!/usr/bin/env bash
# The loss of mlx_lm.lora counts one token too many of each row: the padding after its end, token 0. A model is taught to write token 0 after
# the end of text, and the reported losses and perplexities hold it: of a model that is certain of every token of the data and of "end" for
# ever after, the loss is far above 0. The mask keeps the targets from 1 to the length; the last token of a row is target length - 1.
# Source: mlx_lm/tuner/trainer.py (default_loss; iterate_batches, which always pads by one token or more).
# mlx-lm 0.32.2, mlx 0.32.4 on a CPU; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import mlx_lm
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

END, WORDS = 9, 12


class Words:
    """A tokenizer of texts that are numbers of tokens."""

    eos_token_id = END

    def encode(self, text):
        return [int(one) for one in text.split()]


def counts(inputs):
    """A model that is certain: after token n comes n + 1, after the end the end."""
    sure = mx.minimum(inputs + 1, END)
    return 100.0 * (mx.arange(WORDS) == sure[..., None])


rows = ["3 4 5 6 7 8", "5 6 7 8", "7 8"]
data = CacheDataset(TextDataset([{"text": row} for row in rows], Words()))
[(batch, lengths)] = iterate_batches(data, batch_size=len(rows), max_seq_length=64)
loss, tokens = default_loss(counts, batch, lengths)
to_predict = sum(len(row.split()) for row in rows)  # all but the first of each row, and its end
print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__)
print(f"tokens to predict: {to_predict}; counted: {tokens.item()}, in {len(rows)} rows")
print(f"loss of a model that is right and certain: {loss.item():.2f}")
assert tokens.item() == to_predict + len(rows)
assert abs(loss.item() - 100 * len(rows) / tokens.item()) < 0.01

zero_after_end = lambda inputs: 100.0 * (mx.arange(WORDS) == mx.where(inputs == END, 0, inputs + 1)[..., None])
loss, _ = default_loss(zero_after_end, batch, lengths)
print(f"loss of one that writes token 0 after the end: {loss.item():.2f}")
assert loss.item() < 1e-5
PYTHON
