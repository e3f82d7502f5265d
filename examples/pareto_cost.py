"""A Pareto search of the digits: error against cost, over width, terms and inner steps."""

import argparse

import torch
from sklearn.datasets import load_digits

import ift_tune
from ift_tune import Budget, ClassificationProblem, Int, JointOptimizer, MetaConfig, MetaSpace


class Work(ift_tune.Callback):
    """Adds the cost in millions of weights visited: a gradient of a wide model is dearer."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Add the column ``work``."""
        weights = sum(weight.numel() for weight in joint.problem.weights())
        metrics["work"] = joint.cost.gradient_equivalents * weights / 1e6


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the problem of one trial, with ``config.user["width"]`` hidden units.

    Args:
        config: The settings of the trial.
        device: Where it runs.
        seed: Of the splits.
    """
    pixels, labels = load_digits(return_X_y=True)
    splits = ift_tune.Splits.from_arrays(
        pixels / 16, labels, sizes=(0.2, 0.2, 0.3, 0.3), seed=seed, batch_size=64, device=device
    )
    width = int(config.user["width"])
    layers = torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, 10)
    model = torch.nn.Sequential(*layers).to(device)
    return ClassificationProblem(model, ift_tune.WeightDecay(model, transform="exp"), splits)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/pareto_cost")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--outer-steps", type=int, default=10)
    args = parser.parse_args()
    ranges = {"user.width": Int(4, 64, log=True), "terms": Int(0, 10), "inner_steps": Int(1, 20)}
    result = ift_tune.run_study(
        make_problem,
        MetaSpace(ranges),
        Budget(outer_steps=args.outer_steps, retrain=False),
        config=MetaConfig(inner_lr=0.01, meta_lr=0.05),
        n_trials=args.trials,
        metric=["search_error", "work"],
        out=args.out,
        callbacks=[Work()],
    )
    print(result.front.to_string(index=False))
