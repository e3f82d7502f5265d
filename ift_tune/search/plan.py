"""What all trials of a search have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ift_tune.base.errors import UsageError
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.space import Space
from ift_tune.trial.trial import ProblemFactory, Trial


@dataclass(frozen=True)
class TrialPlan:
    """Turns a point of the space into a `Trial`. It is picklable when its factory is.

    Attributes:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        space: What varies; None if every key of `MetaConfig` may, or nothing does.
        budget: Length of each trial.
        config: What does not vary.
        seed: Of every trial's problem: all trials see the same splits and initial weights.
        device: Where trials run.
        metric: The search metric to minimise; see `Trial`.
        callbacks: Those of the given ones that override a hook of the optimisation: each trial's
            process has them.

    Raises:
        UsageError: If the factory cannot be called, or the corners of the space are no valid
            configurations.
    """

    problem_factory: ProblemFactory
    space: Space | None
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
        if self.space is not None:
            self.space.check(self.config)

    def trial(self, point: Mapping[str, Any], device: str | torch.device | None = None) -> Trial:
        """Return the trial at a point, not yet set up.

        Args:
            point: Flat `MetaConfig` keys; those of the space that do not apply are left out.
            device: Where it runs; default: the plan's.

        Raises:
            UsageError: If a key or value is wrong.
        """
        return Trial(
            self.problem_factory,
            self.config.updated(point if self.space is None else self.space.applicable(point)),
            self.budget,
            seed=self.seed,
            device=self.device if device is None else device,
            metric=self.metric,
            callbacks=self.callbacks,
        )

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the factory and the device."""
        return {
            "seed": self.seed,
            "space": None if self.space is None else self.space.to_json(),
            "config": self.config.to_flat(),
            "budget": asdict(self.budget),
            "metric": self.metric,
        }
