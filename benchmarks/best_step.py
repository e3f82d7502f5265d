"""What the best step is worth against the last, on the transformer of the examples, over seeds.

    python benchmarks/best_step.py --seeds 5

For each seed one run of `examples/transformer_class_weights.py`. Printed are the test errors of the
joint run at its best and at its last step, and after retraining with λ of either, by the search
split's best evaluation in both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from transformer_class_weights import make_problem

from ift_tune import Budget, Callback, JointOptimizer, MetaConfig, load_results, run_single
from ift_tune.trial.best import find_best
from ift_tune.trial.refit import frozen_trial


class LastHyper(Callback):
    """Keeps λ of the latest step."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Copy it."""
        self.state = {k: v.clone() for k, v in joint.problem.hyper.state_dict().items()}


def one(seed: int, config: MetaConfig, outer_steps: int) -> dict[str, float]:
    """Return the test errors of a seed."""
    last = LastHyper()
    with tempfile.TemporaryDirectory() as out:
        budget = Budget(outer_steps=outer_steps)
        outcome = run_single(
            make_problem, budget, config=config, seed=seed, out=out, callbacks=[last], device="cpu"
        )
        steps, kept = load_results(out).steps, find_best(out)
    plain = frozen_trial(kept, make_problem, hyper=last.state, train_on_val=False, device="cpu")
    plain.setup()
    while plain.stop_reason is None:
        plain.step()
    found: dict[str, Any] = outcome.metrics
    return {
        "best_step": found["best_step"],
        "joint_best": found["test_error"],
        "joint_last": float(steps["test_error"].iloc[-1]),
        "retrained_best": found["retrained_test_error"],
        "retrained_last": plain.totals()["test_error"],
    }


def main() -> None:
    """Print a line for each seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--outer-steps", type=int, default=100)
    parser.add_argument("--meta-lr", type=float, default=0.3)
    parser.add_argument("--inner-lr", type=float, default=2e-3)
    options = parser.parse_args()
    config = MetaConfig(
        inner_steps=10, inner_lr=options.inner_lr, meta_lr=options.meta_lr, precision="bfloat16"
    )
    rows = []
    for seed in range(options.seeds):
        rows.append(one(seed, config, options.outer_steps))
        print(f"seed {seed}: " + "  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    means = {k: statistics.mean(row[k] for row in rows) for k in rows[0]}
    print("mean:   " + "  ".join(f"{k} {v:.4g}" for k, v in means.items()))


if __name__ == "__main__":
    main()
