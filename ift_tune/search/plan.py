"""Where the trials of a study come from."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ift_tune.base.arguments import require_instance
from ift_tune.base.direction import Direction
from ift_tune.base.errors import UsageError
from ift_tune.base.objectives import Objectives
from ift_tune.joint.flat import USER
from ift_tune.search.fidelity import OUTER_STEPS, most, require_fidelity
from ift_tune.search.space import Space
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.trial import Trial


class TrialSource(abc.ABC):
    """Where the trials of a study come from. Picklable: it travels to other processes."""

    @property
    @abc.abstractmethod
    def space(self) -> Space | None:
        """What its points are drawn from; None if there is nothing to draw."""

    @property
    @abc.abstractmethod
    def objectives(self) -> Objectives:
        """What its trials are judged by."""

    @property
    def direction(self) -> Direction:
        """In which the metric that decides within a trial is better."""
        return self.objectives.direction

    @abc.abstractmethod
    def trial(self, point: Mapping[str, Any], number: int) -> Trial:
        """Return the trial of a number at a point, not yet set up."""

    @abc.abstractmethod
    def on(self, device: str) -> TrialSource:
        """Return the same source with its trials on a device."""

    @abc.abstractmethod
    def exhausted(self) -> bool:
        """Return whether no further trial may begin, however many the study has asked for."""

    @property
    def fidelity(self) -> str:
        """What counts a trial's progress when it is compared with others; see `FIDELITIES`."""
        return OUTER_STEPS

    @property
    def longest(self) -> int | None:
        """How much of the fidelity a trial uses at most; None if nobody knows before."""
        return None


@dataclass(frozen=True)
class SearchPlan(TrialSource):
    """Trials of one length, each at a point of a space.

    Attributes:
        trials: What they have in common.
        space: What varies; None if every key of `MetaConfig` may, or nothing does.
        fidelity: One of `FIDELITIES`: by what a trial's progress is counted, for whoever compares
            it with others before its end.

    Raises:
        UsageError: If the corners of the space are no valid configurations, or there is no such
            fidelity.
    """

    trials: TrialPlan
    space: Space | None = None
    fidelity: str = OUTER_STEPS

    def __post_init__(self) -> None:
        require_fidelity(self.fidelity)
        if self.space is not None:
            require_instance(
                "space", self.space, Space, 'a space such as MetaSpace({"terms": Int(0, 20)})'
            )
            self.space.check(self.trials.config)

    @property
    def longest(self) -> int | None:
        """What the budget allows; None if it is in another unit."""
        budget = self.trials.budget
        if self.fidelity == OUTER_STEPS:
            return budget.outer_steps
        try:
            return (
                None
                if self.space is None
                else most(self.fidelity, budget, self.trials.config, self.space)
            )
        except UsageError:  # for Ray's schedulers, which need a bound
            return None

    @property
    def objectives(self) -> Objectives:
        """The trials'."""
        return self.trials.objectives

    def trial(self, point: Mapping[str, Any], number: int) -> Trial:
        """Return the trial at a point; keys of the space that do not apply are left out."""
        return self.at(point)

    def check(self, device: torch.device) -> None:
        """Build the problem once, for nothing, with the user's own keys of the space at their ends.

        Raises:
            UsageError: If the problem is not right.
        """
        first = {} if self.space is None else self.space.first()
        self.trials.check(device, {k: v for k, v in first.items() if k.startswith(USER)})

    def at(self, point: Mapping[str, Any], device: str | torch.device | None = None) -> Trial:
        """Return the trial at a point, whatever its number.

        Args:
            point: Flat `MetaConfig` keys; those of the space that do not apply are left out.
            device: Where it runs; default: the plan's.

        Raises:
            UsageError: If a key or value is wrong.
        """
        applicable = point if self.space is None else self.space.applicable(point)
        return self.trials.trial(applicable, device)

    def on(self, device: str) -> SearchPlan:
        """Return the same plan with its trials on a device."""
        return replace(self, trials=replace(self.trials, device=device))

    def exhausted(self) -> bool:
        """Return False: the number of trials is the only limit."""
        return False

    def settings(self) -> dict[str, Any]:
        """Return as plain values what decides the numbers, but for the device."""
        found = {
            **self.trials.settings(),
            "space": None if self.space is None else self.space.to_json(),
        }
        # What earlier versions had is not written down, so that their runs go on.
        return found if self.fidelity == OUTER_STEPS else found | {"fidelity": self.fidelity}
