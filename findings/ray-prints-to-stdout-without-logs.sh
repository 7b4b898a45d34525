#!/usr/bin/env bash
# ray.init(log_to_driver=False, logging_level="CRITICAL") keeps the output of workers away, but not the errors of the cluster:
# when a worker dies, Ray prints some lines about it to the driver's stdout, into the program's own output.
# Source: ray.init, "log_to_driver"; listen_error_messages in _private/worker.py prints with is_err False, and asks for neither.
# ray 2.60.0, Python 3.11; seen in November 2026.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet ray==2.60.0
cd "$work"
export RAY_USAGE_STATS_ENABLED=0
"$work/venv/bin/python" - > out 2> err <<'PYTHON'
import os
import time

import ray

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")


@ray.remote(max_restarts=0)
class Worker:
    def die(self):
        os.kill(os.getpid(), 9)


try:
    ray.get(Worker.remote().die.remote())
except ray.exceptions.ActorDiedError:
    pass
time.sleep(5)
PYTHON
head -c 200 out
grep -q "A worker died or was killed" out
