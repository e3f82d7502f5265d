"""A search over two nodes of which one is taken away: a script, for a cluster takes a process."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster
from slow_problems import make_slow
from small_problems import CONFIG, SPACE

from ift_tune import Budget
from ift_tune.search.ray import run_ray
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.work import quiet_optuna

STEPS = 12
N_TRIALS = 6
STORE = 100 * 2**20


def rows(folder: Path) -> int:
    """Return how many outer steps a trial has in the tables."""
    file = folder / "steps.csv"
    return max(0, file.read_text().count("\n") - 1) if file.exists() else 0


def lose_a_node(cluster: Cluster, node: Node, out: Path) -> None:
    """Take the node away when both of the first two trials are in their middle."""
    while min(rows(out / f"trial-0000{k}") for k in (0, 1)) < 4:
        time.sleep(0.01)
    before = {k: rows(out / f"trial-0000{k}") for k in (0, 1)}
    cluster.remove_node(node, allow_graceful=False)
    print("rows of the trials when a node was lost:", *before.values(), flush=True)


def main(out: Path) -> None:
    """Search, and lose a node meanwhile."""
    quiet_optuna()
    head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        threading.Thread(target=lose_a_node, args=(cluster, node, out), daemon=True).start()
        result = run_ray(
            make_slow,
            SPACE,
            Budget(outer_steps=STEPS),
            n_trials=N_TRIALS,
            out=out,
            task="tiny",
            config=CONFIG,
            sampler=sampler_factory("random"),
        )
        alive = sum(node["Alive"] for node in ray.nodes())
        assert result.study is not None
        print("nodes at the end:", alive)
        print("states:", *(trial.state.name for trial in result.study.trials))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
