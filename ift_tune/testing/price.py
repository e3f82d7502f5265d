"""What a problem costs: one inner step, one outer step, their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from ift_tune.implicit.vectors import count
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.live_bytes import LiveBytes as LiveBytes  # this was their home once
from ift_tune.joint.live_bytes import Peak as Peak
from ift_tune.joint.live_bytes import measured_peak as measured_peak

Result = TypeVar("Result")

_REPEATS = 15


@dataclass(frozen=True)
class Price:
    """Median wall times in seconds, on this machine, at this problem's batch sizes.

    Attributes:
        weights: P.
        hypers: H.
        inner_step: One weight update.
        outer_step: One outer step without its inner steps: a whole hypergradient and its update.
        inner_steps: T, of the configuration.
        product: One product with the Hessian, about: a part of the outer step.
    """

    weights: int
    hypers: int
    inner_step: float
    outer_step: float
    inner_steps: int
    product: float

    def __str__(self) -> str:
        """Return a line."""
        whole = self.inner_steps * self.inner_step + self.outer_step
        return (
            f"inner step {1e3 * self.inner_step:.2f} ms, hypergradient "
            f"{1e3 * self.outer_step:.2f} ms; {self.inner_steps} inner steps with one outer step "
            f"cost {whole / (self.inner_steps * self.inner_step):.2f} times plain training"
        )


def measure_price(joint: JointOptimizer, config: MetaConfig, *, patience: float = 1.0) -> Price:
    """Time inner and outer steps of a problem.

    Args:
        joint: With one inner step an outer step; it is taken a few steps further.
        config: Whose inner steps the price is put together for.
        patience: Seconds after which neither is repeated any more.
    """
    problem = joint.problem
    inner = statistics.median(_repeated(lambda: joint.train_weights(1), patience, joint.device))
    before = joint.cost.hvps
    times = _repeated(joint.step, patience, joint.device)
    outer = max(statistics.median(times) - inner, 0.0)
    products = (joint.cost.hvps - before) / len(times)
    return Price(
        weights=count(problem.weights()),
        hypers=count(problem.hypers()),
        inner_step=inner,
        outer_step=outer,
        inner_steps=config.inner_steps,
        # Beside the products of the solve: the mixed one, and two gradients.
        product=outer / (products + 2.0),
    )


def _repeated(action: Callable[[], object], patience: float, device: torch.device) -> list[float]:
    """Return the wall times of an action that is repeated, at most `_REPEATS` times."""
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < patience:
        times.append(timed(action, device)[1])
    return times


def timed(action: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return what an action returns, and its wall time in seconds."""
    _wait(device)  # a GPU works on while Python goes on: what was asked for before is not counted
    started = time.perf_counter()
    result = action()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
