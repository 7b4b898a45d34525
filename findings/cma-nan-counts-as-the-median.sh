#!/usr/bin/env bash
# CMAEvolutionStrategy.tell gives a candidate whose value is NaN the median of the others' values. So a candidate that could not be
# evaluated ranks before the worse half of those that could, and can enter the mean of the next generation; with verbose=-9, the usual
# way to keep the library quiet, without a word of it. A candidate of value inf is left out. Merged weights that overflow give just such NaNs.
# Source: CMAEvolutionStrategy.tell in cma/evolution_strategy.py, which warns at higher verbosity.
# cma 4.5.0, numpy 2.4.6; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet cma==4.5.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON' 2> "$work/said"
import math

import cma
import numpy as np

FAILED = (0, 1, 2, 3)


def mean_after(value):
    """The mean after one generation of eight candidates, of which four have this value."""
    search = cma.CMAEvolutionStrategy([0.0] * 4, 0.5, {"seed": 1, "popsize": 8, "verbose": -9})
    drawn = search.ask()
    search.tell(drawn, [value if index in FAILED else float(index) for index in range(8)])
    return search.mean


nan = mean_after(math.nan)
inf = mean_after(math.inf)
worst = mean_after(1e300)
middle = mean_after(5.5)  # the median of 4, 5, 6 and 7
print("mean with NaN:   ", nan.round(4))
print("with the median: ", middle.round(4))
print("mean with inf:   ", inf.round(4))
assert np.array_equal(nan, middle)
assert np.array_equal(inf, worst)
assert not np.allclose(nan, inf)
PYTHON
cat "$work/said"
! grep -qi "nan\|median" "$work/said"
