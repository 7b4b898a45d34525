#!/usr/bin/env bash
# In a multiple-choice task of lm-evaluation-harness a doc_to_target that renders to digits is the index of a choice, counted from 0, even
# where the choices are numbers and the answer is one of them: with choices 1 to 4 the answer "2" means the third choice, 3. A model that
# always chooses right gets 0 %, one that always adds one gets 100 %. `doc_to_target: answer` in place of "{{answer}}" means the text.
# Source: ConfigurableTask.doc_to_target in lm_eval/api/task.py (isdigit, then ast.literal_eval).
# lm_eval 0.4.13, datasets 5.2.0; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lm_eval==0.4.13 datasets==5.2.0 pyarrow==26.0.1
cd "$work"
export HF_HOME="$work/home" HF_HUB_OFFLINE=1 HF_EVALUATE_OFFLINE=1
"$work/venv/bin/python" - 2>"$work/said" <<'PYTHON' || { cat "$work/said"; exit 1; }
import json
from pathlib import Path

import datasets
import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

SUMS = {"1+1": 2, "1+2": 3, "0+1": 1}


class Sure(LM):
    """A model that is certain of the sum, or of the number after it."""

    def __init__(self, more):
        super().__init__()
        self.more = more

    def loglikelihood(self, requests):
        return [(0.0 if int(one.args[1]) == SUMS[one.doc["sum"]] + self.more else -9.0, True) for one in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    generate_until = loglikelihood_rolling


def accuracy(target, more):
    rows = [{"sum": text, "answer": str(value)} for text, value in SUMS.items()]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "sums.jsonl"}}, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{sum}} =", "doc_to_choice": ["1", "2", "3", "4"],
        "doc_to_target": target, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    manager = TaskManager(include_defaults=False)
    return lm_eval.simple_evaluate(Sure(more), tasks=[task], task_manager=manager, bootstrap_iters=0)["results"]["sums"]["acc,none"]


print("lm_eval", lm_eval.__version__, "datasets", datasets.__version__)
found = {(target, more): accuracy(target, more) for target in ("{{answer}}", "answer") for more in (0, 1)}
for (target, more), value in found.items():
    print(f"doc_to_target: {target:10} a model that says the sum{' plus one' if more else ''}: acc {value:.0%}")
assert found == {("{{answer}}", 0): 0.0, ("{{answer}}", 1): 1.0, ("answer", 0): 1.0, ("answer", 1): 0.0}
PYTHON
