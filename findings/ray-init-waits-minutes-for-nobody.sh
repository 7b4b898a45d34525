#!/usr/bin/env bash
# ray.init waits for many minutes for an address at which nobody listens: the connection is refused at once, but Ray asks
# again, 20 times about 41 seconds each by its source, and prints three warnings each time. No parameter of ray.init limits
# that. A loopback address is replaced by the machine's own before it is asked, so that a server on 127.0.0.1 alone is none.
# Source: ray.init; _private/node.py and NUM_REDIS_GET_RETRIES in _private/ray_constants.py.
# ray 2.60.0, Python 3.11; seen in November 2026: 200 s without an end, then stopped.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ray==2.60.0
cd "$work"
export RAY_USAGE_STATS_ENABLED=0
status=0
timeout 100 "$work/venv/bin/python" -c 'import ray; ray.init(address="127.0.0.1:9")' > log 2>&1 || status=$?
echo "after 100 s: exit code $status, $(grep -c 'Timed out while waiting for GCS' log) tries"
test "$status" -eq 124
test "$(grep -c 'Timed out while waiting for GCS' log)" -ge 2
