"""What one command costs."""

import os
import subprocess
import time
from pathlib import Path


def timed(*command: str, cwd: Path) -> tuple[float, float, int, str]:
    """Seconds, CPU seconds, peak resident bytes and stderr of one command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, told
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, told
