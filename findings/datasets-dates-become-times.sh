#!/usr/bin/env bash
# load_dataset("json") takes a column of texts that all look like dates for times: the answer "2024-01-31" becomes a datetime, which a template
# prints as "2024-01-31 00:00:00", and a time with an offset is moved to UTC and loses the offset. Whether it does hangs on all other rows:
# one "unknown" among them, and every date stays the text that it was. So exact match scores the right answer 0 in one file and 1 in another.
# Source: pyarrow.json.read_json, which infers the type of texts; datasets/packaged_modules/json/json.py, which keeps what it infers.
# datasets 5.2.0, pyarrow 26.0.1, jinja2 3.1.6; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 jinja2==3.1.6
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import datasets
import pyarrow
from jinja2 import Template

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)


def loaded(*answers):
    """The answers as a data set holds them, of a file with these answers."""
    file = Path(f"{len([*Path().glob('*.jsonl')])}.jsonl")
    file.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    return datasets.load_dataset("json", data_files=str(file), split="train")


dates = ("2024-01-31", "2024-12-01")
alone, beside = loaded(*dates), loaded(*dates, "unknown")
printed = {name: Template("{{answer}}").render(data[0]) for name, data in (("alone", alone), ("beside", beside))}
print("dates alone:          ", alone.features["answer"], "printed as", repr(printed["alone"]))
print("one other text beside:", beside.features["answer"], "printed as", repr(printed["beside"]))
assert printed == {"alone": "2024-01-31 00:00:00", "beside": "2024-01-31"}
moved = loaded("2024-01-31T23:30:00-05:00")[0]["answer"]
print("2024-01-31T23:30:00-05:00 becomes", repr(moved))
assert str(moved) == "2024-02-01 04:30:00"
PYTHON
