"""A Ray cluster on this machine: a head without CPUs and two nodes of one each, of which one is lost on request.

Prints the head's address; `kill` on standard input kills a node, its end ends the cluster.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    _say(cluster.address)
    try:
        for line in sys.stdin:
            if line == "kill\n":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                _say("killed")
    finally:
        cluster.shutdown()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
