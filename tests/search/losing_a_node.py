"""A search over two nodes, one of which is taken away: for a process of its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from processes import rows_in, wait_for
from small_problems import CONFIG, SPACE, make_slow

from ift_tune import Budget
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.work import quiet_optuna

STEPS = 12
N_TRIALS = 4
STORE = 100 * 2**20


def lose_a_node(cluster: Any, node: Any, out: Path) -> None:
    """Take the node away when both of the first two trials are in their middle."""
    while min(rows_in(out / f"trial-0000{k}") for k in (0, 1)) < 4:
        time.sleep(0.01)
    before = {k: rows_in(out / f"trial-0000{k}") for k in (0, 1)}
    cluster.remove_node(node, allow_graceful=False)
    print("rows of the trials when a node was lost:", *before.values(), flush=True)


def main(out: Path) -> None:
    """Search, and lose a node meanwhile."""
    # Not before this process has the variables that Ray reads when it is imported.
    import ray
    from ray.cluster_utils import Cluster

    from ift_tune.search.ray import run_ray

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
        wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 1, "no node was lost")
        assert result.study is not None
        print("states:", *(trial.state.name for trial in result.study.trials))
    finally:
        ray.shutdown()
        cluster.shutdown()
