"""What a task declares: a problem, its data and splits, its target, and a budget that suits it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ift_tune.config import Budget, MetaConfig
from ift_tune.problem import BilevelProblem
from ift_tune.tasks import data
from ift_tune.tasks.data import Images

Build: TypeAlias = Callable[[Images, torch.device, int], BilevelProblem]
"""``build(images, device, seed)``: the problem with its initial weights, splits and λ."""


@dataclass(frozen=True)
class Target:
    """When a task counts as solved: a metric at or below a value.

    Attributes:
        metric: A column of the tables.
        value: The value to reach or go below.
        reason: Where the value comes from.
    """

    metric: str
    value: float
    reason: str


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights P, of hyperparameters H, and of examples in each split."""

    weights: int
    hypers: int
    train: int
    val: int
    search: int
    test: int


@dataclass(frozen=True)
class Task:
    """A ready problem. Frozen and picklable, so `make_problem` travels to other processes.

    Attributes:
        name: What the command line calls it.
        summary: One line.
        data: The data set it reads.
        build: Builds the problem.
        sizes: P, H and the splits.
        target: When it is solved.
        default_config: Meta-hyperparameters that work.
        budget: A length of trial that suits it.
        data_root: Where the data set lies; None reads the environment.
        download: Whether it may be fetched.
    """

    name: str
    summary: str
    data: str
    build: Build
    sizes: Sizes
    target: Target
    default_config: MetaConfig
    budget: Budget
    data_root: str | os.PathLike[str] | None = None
    download: bool = False

    def make_problem(
        self, config: MetaConfig, device: torch.device | str, seed: int
    ) -> BilevelProblem:
        """Build the problem: a problem factory, see `search.Trial`.

        Args:
            config: The trial's meta-hyperparameters; the built-in tasks do not depend on them.
            device: Where weights, hyperparameters and data go.
            seed: Of the splits, the initial weights and the order of batches.

        Raises:
            DataNotFoundError: If the data set is not found.
        """
        images = data.load(self.data, root=self.data_root, download=self.download)
        device = torch.device(device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.build(images, device, seed)

    def describe(self) -> str:
        """Return what the task is, in a few lines."""
        s = self.sizes
        return (
            f"{self.name}: {self.summary}\n"
            f"  data {self.data}; {s.weights:,} weights, {s.hypers:,} hyperparameters; "
            f"{s.train:,} train, {s.val:,} val, {s.search:,} search, {s.test:,} test examples\n"
            f"  target: {self.target.metric} <= {self.target.value:g} ({self.target.reason})"
        )
