#!/usr/bin/env bash
# lm-evaluation-harness reads an answer whose template renders to "[…]" as a Python list and compares the output with each of its entries:
# the right output "[1, 2]" gets no exact match, and of "['a', 'b']" the output "a" alone gets one. Answers that Python cannot read, such
# as "[a, b]", stay texts, in the same task. `doc_to_target: answer` in place of "{{answer}}" keeps all of them.
# Source: ConfigurableTask.doc_to_target and process_results in lm_eval/api/task.py.
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


class Says(LM):
    """A model that says what it is told to say."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def generate_until(self, requests):
        return [self.text for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def matches(answer, output, target="{{answer}}"):
    """The exact match of this output with this answer."""
    Path("one.jsonl").write_text(json.dumps({"question": "?", "answer": answer}) + "\n")
    task = {
        "task": "one", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "one.jsonl"}}, "test_split": "test",
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": target, "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(Says(output), tasks=[task], task_manager=manager, bootstrap_iters=0)
    value = float(found["results"]["one"]["exact_match,none"])
    print(f"answer {answer!r:12} output {output!r:12} doc_to_target {target:10} exact_match {value:.0f}")
    return value


print("lm_eval", lm_eval.__version__, "datasets", datasets.__version__)
assert matches("[1, 2]", "[1, 2]") == 0
assert matches("['a', 'b']", "['a', 'b']") == 0
assert matches("['a', 'b']", "a") == 1
assert matches("[a, b]", "[a, b]") == 1
assert matches("[1, 2]", "[1, 2]", "answer") == 1
PYTHON
