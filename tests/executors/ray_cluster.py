"""A Ray cluster on this machine, in a process of its own: `python -m tests.executors.ray_cluster NODE…`.

Each NODE is a machine with one core, whose workers cannot open files below a path that ends in NODE ("-" for any). The
address is the first line on stdout; the cluster ends with stdin.
"""

import sys
from pathlib import Path

HOOK = """\
import os, sys

hidden = os.environ["LORA_TESTS_HIDDEN"]

def hide(event, arguments):
    if event == "open" and hidden in str(arguments[0]):
        raise FileNotFoundError(2, "No such file or directory", str(arguments[0]))

sys.addaudithook(hide)
"""


def main() -> None:
    """Start the cluster, and end it with stdin."""
    from ray.cluster_utils import Cluster

    nodes, hooks = sys.argv[2:], Path(sys.argv[1])
    (hooks / "sitecustomize.py").write_text(HOOK)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for hidden in nodes:
        hiding = {"PYTHONPATH": str(hooks), "LORA_TESTS_HIDDEN": hidden}
        cluster.add_node(num_cpus=1, env_vars={} if hidden == "-" else hiding)
    sys.stdout.write(f"cluster {cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
