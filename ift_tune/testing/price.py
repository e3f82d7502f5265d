"""What a problem costs: one inner step, one outer step, their ratio."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ift_tune.implicit.vectors import count
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.meter import timed


@dataclass(frozen=True)
class Price:
    """Median wall times in seconds, on this machine, at this problem's batch sizes.

    Attributes:
        weights: P.
        hypers: H.
        inner_step: One weight update.
        outer_step: One outer step without its inner steps: a whole hypergradient and its update.
        inner_steps: T, of the configuration.
    """

    weights: int
    hypers: int
    inner_step: float
    outer_step: float
    inner_steps: int

    def __str__(self) -> str:
        """Return two lines."""
        whole = self.inner_steps * self.inner_step + self.outer_step
        return (
            f"{self.weights:,} weights, {self.hypers:,} hyperparameters: differentiable twice\n"
            f"  inner step {1e3 * self.inner_step:.2f} ms, hypergradient "
            f"{1e3 * self.outer_step:.2f} ms; {self.inner_steps} inner steps with one outer step "
            f"cost {whole / (self.inner_steps * self.inner_step):.2f} times plain training"
        )


def measure_price(problem: BilevelProblem, config: MetaConfig, *, repeats: int = 5) -> Price:
    """Time inner and outer steps of a problem; its weights and λ are moved by a few steps.

    Raises:
        DoubleBackwardError: If an operation of the training loss has no second derivative.
    """
    joint = JointOptimizer(problem, replace(config, inner_steps=1))
    joint.step()
    inner = _median(lambda: joint.train_weights(5), repeats, joint.device) / 5
    both = _median(joint.step, repeats, joint.device)
    return Price(
        weights=count(problem.weights()),
        hypers=count(problem.hypers()),
        inner_step=inner,
        outer_step=max(both - inner, 0.0),
        inner_steps=config.inner_steps,
    )


def _median(action: Callable[[], object], repeats: int, device: torch.device) -> float:
    return statistics.median(timed(action, device)[1] for _ in range(repeats))
