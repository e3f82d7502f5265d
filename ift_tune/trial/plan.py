"""What all trials of a run have in common: one bundle for every way to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ift_tune.base.errors import UsageError
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.trial.trial import ProblemFactory, Trial


@dataclass(frozen=True)
class TrialPlan:
    """Makes trials that differ in some meta-hyperparameters. Picklable when its factory is.

    Attributes:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        budget: Length of each trial.
        config: What does not vary.
        seed: Of every trial's problem: all trials see the same splits and initial weights.
        device: Where trials run.
        metric: The search metric to minimise; see `Trial`.
        callbacks: Those of the given ones that override a hook of the optimisation: each trial's
            process has them.

    Raises:
        UsageError: If the factory cannot be called, or a callback is none.
    """

    problem_factory: ProblemFactory
    budget: Budget
    config: MetaConfig = field(default_factory=MetaConfig)
    seed: int = 0
    device: str = "auto"
    metric: str | None = None
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        if not callable(self.problem_factory):
            raise UsageError(
                f"problem_factory must be a function (config, device, seed), got "
                f"{self.problem_factory!r}"
            )
        # The others may hold what cannot be pickled, such as a terminal.
        object.__setattr__(self, "callbacks", joint_callbacks(self.callbacks))

    def trial(
        self, changes: Mapping[str, Any] | None = None, device: str | torch.device | None = None
    ) -> Trial:
        """Return a trial, not yet set up.

        Args:
            changes: Flat `MetaConfig` keys in which it differs from `config`.
            device: Where it runs; default: the plan's.

        Raises:
            UsageError: If a key or value is wrong.
        """
        return Trial(
            self.problem_factory,
            self.config.updated(changes or {}),
            self.budget,
            seed=self.seed,
            device=self.device if device is None else device,
            metric=self.metric,
            callbacks=self.callbacks,
        )

    def check(self, device: torch.device) -> None:
        """Build the problem once, for nothing: mistakes and missing data show before anything runs.

        Raises:
            UsageError: If the problem is not right.
        """
        self.problem_factory(self.config, device, self.seed).validate()

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the factory and the device."""
        return {
            "seed": self.seed,
            "config": self.config.to_flat(),
            "budget": asdict(self.budget),
            "metric": self.metric,
        }
