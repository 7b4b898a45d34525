#!/usr/bin/env bash
# A column of texts in a file of JSON Lines with one number among them is loaded as Json by datasets 5, and each text that can be read as
# JSON is replaced by what it says: "007" becomes 7, "1.50" becomes 1.5, "true" True, "null" None and "[1, 2]" a list. Texts such as "abc"
# stay. Without the one number all of them stay texts. No warning: the answers that a model is trained on or compared with are others.
# Source: datasets/features/features.py (Json.encode_example and cast_storage, which leave a text that is JSON as it is, unquoted).
# datasets 5.2.0, pyarrow 26.0.1; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$work"
HF_HOME="$work/home" HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W error::UserWarning - <<'PYTHON'
import json
from pathlib import Path

import datasets
import pyarrow

datasets.disable_progress_bars()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
TEXTS = ["007", "1.50", "true", "null", "[1, 2]", "abc"]


def loaded(answers):
    """The answers as a data set holds them, of a file with these answers."""
    file = Path(f"{len(answers)}.jsonl")
    file.write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in answers))
    data = datasets.load_dataset("json", data_files=str(file), split="train")
    print(data.features["answer"], data["answer"][:])
    return data["answer"][:]


assert loaded(TEXTS) == TEXTS
assert loaded([*TEXTS, 3]) == [7, 1.5, True, None, [1, 2], "abc", 3]
PYTHON
