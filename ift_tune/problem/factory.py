"""Calling a user's factory: every call draws the same random numbers for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ift_tune.base.randomness import RandomStream
from ift_tune.problem.problem import BilevelProblem


def build_problem(
    factory: Callable[..., Any], config: object, device: torch.device | str, seed: int
) -> BilevelProblem:
    """Return the problem that a user's factory builds.

    A problem is built anew for every trial, for its retraining and when it is resumed, perhaps by
    another process. Initial weights and splits, which most factories draw from the global
    generators (``nn.Linear``, ``random_split``), must be the same each time, or test examples of
    one call are training examples of another. So PyTorch's, NumPy's and Python's generators are
    seeded with `seed` meanwhile, and are as before afterwards.
    """
    device = torch.device(device)
    with RandomStream(seed, device).aside():
        problem: BilevelProblem = factory(config, device, seed)
    return problem
