"""What joint tuning costs against plain training, measured side by side in one run.

    python benchmarks/joint_vs_plain.py --data-root DIR

On `mnist-overfit` (MLP 784-784-10, 623,290 weights and as many decays, batch 32, T = 50) three
things take turns, so that a change of the machine's speed meets all of them alike:

- plain: 50 steps of a hand-written PyTorch loop with the same fused Adam, no regulariser at all;
- joint: one `JointOptimizer.step`, that is the same 50 steps with a decay per weight, one
  hypergradient (K = 3) and one update of all 623,290 hyperparameters, with automatic α
  (λ_max from the last step's series) and with a given α.

It prints medians and the ratio of each pair. Without MNIST, the embedded digits serve, enlarged.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional as F

from ift_tune import JointOptimizer, MetaConfig, Neumann, tasks
from ift_tune.base.errors import DataNotFoundError
from ift_tune.problem.problem import BilevelProblem

T = 50


def make_problem(data_root: str | None, seed: int) -> BilevelProblem:
    task = tasks.get("mnist-overfit", data_root=data_root)
    try:
        return task.make_problem(task.default_config, "cpu", seed)
    except DataNotFoundError:
        task = tasks.get("mnist-overfit", embedded=True)
        return task.make_problem(task.default_config, "cpu", seed)


def joint_step(data_root: str | None, inverse: Neumann) -> Callable[[], object]:
    config: MetaConfig = replace(tasks.TASKS["mnist-overfit"].default_config, inverse=inverse)
    return JointOptimizer(make_problem(data_root, 0), config).step


def plain_steps(data_root: str | None) -> Callable[[], object]:
    problem = make_problem(data_root, 0)
    model, loader = problem.model, problem.splits.train
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        done = 0
        while done < T:
            for inputs, targets, _ in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done += 1

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data-root")
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    contestants = {
        "plain": plain_steps(options.data_root),
        "joint, alpha auto": joint_step(options.data_root, Neumann(terms=3)),
        "joint, alpha given": joint_step(options.data_root, Neumann(terms=3, alpha=0.02)),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(options.repeats + 2):
        for name, action in contestants.items():
            started = time.perf_counter()
            action()
            if repeat >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - started)
    print(
        f"{torch.get_num_threads()} threads, {options.repeats} interleaved repeats, T = {T}, K = 3"
    )
    for name, found in times.items():
        ratios = [t / p for t, p in zip(found, times["plain"], strict=True)]
        print(
            f"{name:20} median {statistics.median(found):.4f} s   "
            f"ratio to plain {statistics.median(ratios):.2f} "
            f"(quartiles {' to '.join(f'{q:.2f}' for q in statistics.quantiles(ratios)[::2])})"
        )


if __name__ == "__main__":
    main()
