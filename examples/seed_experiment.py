"""The experiment the method is known for: 623,290 weight decays overfit 50 validation images.

    python examples/seed_experiment.py --data-root DIR               # one seed, about 40 seconds
    python examples/seed_experiment.py --data-root DIR --seeds 5 --out results/mnist-overfit

An MLP 784-784-10 learns from 50 MNIST images, with a weight decay for every single weight, and the
decays learn from 50 others by implicit differentiation (Lorraine, Vicol, Duvenaud 2020, figure 4).
Validation error falls to zero, test error does not: with as many hyperparameters as weights, a
validation set is training data. DIR holds MNIST/raw as torchvision lays it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import ift_tune
from ift_tune.report import draw_curves
from ift_tune.trial.session import run_single


def main() -> None:
    """Run the seeds, draw the figure, print when each reached zero validation error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--alpha", type=float, help="Neumann's step; default: from the curvature")
    parser.add_argument("--out", type=Path, default=Path("runs/seed-experiment"))
    options = parser.parse_args()

    task = ift_tune.tasks.get("mnist-overfit", data_root=options.data_root)
    config = task.default_config.updated({"alpha": options.alpha})
    budget = ift_tune.Budget(outer_steps=options.outer_steps, eval_every=5)
    tables = []
    for seed in range(options.seeds):
        out = options.out / f"seed{seed}"
        run_single(task.make_problem, budget, out=out, task=task.name, config=config, seed=seed)
        trials, steps = ift_tune.load_results(out)
        solved = steps.loc[steps["val_error"] == 0, "step"]
        print(
            f"seed {seed}: validation error 0 of 50 "
            f"{f'first at outer step {solved.iloc[0]}' if len(solved) else 'never'}; at the end "
            f"validation error {trials.val_error[0]:.2f}, test error {trials.test_error[0]:.3f}, "
            f"retrained with the decays frozen {trials.retrained_test_error[0]:.3f}"
        )
        tables.append(steps)
    figure = options.out / "error.png"
    draw_curves(pd.concat(tables), figure, title="A weight decay for each of 623,290 weights")
    print(f"figure: {figure}")


if __name__ == "__main__":
    main()
