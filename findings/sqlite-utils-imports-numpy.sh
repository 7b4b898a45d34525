#!/usr/bin/env bash
# Importing sqlite_utils imports numpy (and pandas) wherever they are installed, though no table is touched: a small
# command-line program that reads one row pays more for numpy than for SQLite. Nothing in the package's metadata says so.
# Source: sqlite_utils/db.py, which tries both imports at the top of the file.
# sqlite-utils 4.2.1, numpy 2.4.6, Python 3.11; seen in November 2026: numpy takes about half of the import's time.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet sqlite-utils==4.2.1
"$work/venv/bin/python" -c "import sys, sqlite_utils; assert 'numpy' not in sys.modules; print('alone: no numpy')"
"$work/venv/bin/pip" install --quiet numpy==2.4.6
"$work/venv/bin/python" -c "import sys, sqlite_utils; assert 'numpy' in sys.modules; print('beside numpy: numpy imported')"
"$work/venv/bin/python" - <<'PYTHON'
import statistics
import subprocess
import sys
import time


def seconds(code):
    def once():
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(7))


hidden = "import sys; sys.modules['numpy'] = None; import sqlite_utils"
plain, without = seconds("import sqlite_utils"), seconds(hidden)
print(f"import sqlite_utils: {plain:.2f} s; with numpy hidden: {without:.2f} s")
assert plain > 1.2 * without
PYTHON
