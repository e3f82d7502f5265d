"""What a step of a trial does: joint optimisation, or plain training with λ frozen."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ift_tune.base.errors import UsageError, require_integer
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.cost import FORWARD
from ift_tune.joint.flat import USER
from ift_tune.joint.joint import JointOptimizer

EVALUATIONS = 20  # of the search split in a whole baseline training
PRIOR_SECONDS = "prior_seconds"
"""Attribute of a problem: how long its λ took to be set, which is on the trial's clock."""
_INNER = (
    *("seed", "device", "inner_lr", "inner_steps", "inner_optimizer", "inner_momentum"),
    *("inner_schedule", "inner_warmup", "clip_norm", "accumulate", "precision"),
)


class Training(abc.ABC):
    """What a step of a trial does and may cost. Frozen and picklable: it travels with the trial."""

    @abc.abstractmethod
    def config(self, config: MetaConfig) -> MetaConfig:
        """Return the settings of the trial, made from those it is given."""

    @abc.abstractmethod
    def step(self, joint: JointOptimizer) -> dict[str, float]:
        """Take one step, and return its part of the row."""

    def shares(self, joint: JointOptimizer) -> tuple[float, float]:
        """Return what the inner steps minimise; see `JointOptimizer.shares`."""
        return 0.0, 1.0

    @abc.abstractmethod
    def max_step_cost(self, joint: JointOptimizer) -> float:
        """Return the most that the next step can cost, in gradient-equivalents."""

    @abc.abstractmethod
    def total_steps(self, budget: Budget, joint: JointOptimizer) -> int | None:
        """Return the inner steps of a trial that comes to its end; None if only the clock knows."""

    @abc.abstractmethod
    def constants(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constant columns of the tables, made from those of a joint trial."""


@dataclass(frozen=True)
class JointTraining(Training):
    """Inner steps by w, then one outer step by λ: what IFT does."""

    def config(self, config: MetaConfig) -> MetaConfig:
        """Return them as they are."""
        return config

    def step(self, joint: JointOptimizer) -> dict[str, float]:
        """Take `inner_steps` inner steps and one outer step."""
        return joint.step()

    def max_step_cost(self, joint: JointOptimizer) -> float:
        """Return the most that the inner steps and a hypergradient can cost."""
        return joint.max_step_cost()

    def total_steps(self, budget: Budget, joint: JointOptimizer) -> int | None:
        """Return `inner_steps` for each outer step; of a counted budget, for what it affords."""
        steps = budget.outer_steps
        scheduled = joint.config.inner_schedule != "constant"  # which alone asks for the end
        if steps is None and budget.gradient_equivalents is not None and scheduled:
            passes = FORWARD * joint.count_examples("search") / joint.first_batch("train")
            usual = joint.usual_step_cost() + passes / budget.eval_every
            left = budget.gradient_equivalents - max(joint.max_step_cost() - usual, 0.0)
            steps = max(1, int(left / usual))
        return None if steps is None else steps * joint.config.inner_steps

    def constants(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Return them as they are."""
        return dict(constants)


@dataclass(frozen=True)
class BaselineTraining(Training):
    """Plain training: λ stays as the problem's factory has set it.

    A step trains for as long as lies between two of `EVALUATIONS` evaluations.

    Attributes:
        steps: Inner steps of a whole training.
        train_on_val: Whether to train on the validation split too.
        given: Further constant columns of the tables: what λ was set to.
        val_weight: The weight of a validation example where that of a training example is 1;
            infinite: on the validation split alone. See `JointOptimizer.baseline_step`.
        penalty_weight: How many times the strength the penalty has that it has with λ as learned,
            against the sum of the training losses, which those of the validation examples join;
            None: it stays as it is against the mean of all. See there too.
        prior_passes: Passes forward over the training split that were taken to set λ, and are
            charged before the first step.

    Raises:
        UsageError: If there is not even one step, or the weight is not above 0.

    Example:
        >>> from ift_tune.trial.training import BaselineTraining
        >>> BaselineTraining.of_frozen(1000, val_weight=2.0).penalty_weight
        1.0
    """

    steps: int
    train_on_val: bool = False
    given: Mapping[str, float] = field(default_factory=dict)
    val_weight: float = 1.0
    penalty_weight: float | None = None
    prior_passes: int = 0

    def __post_init__(self) -> None:
        require_integer("training_steps", self.steps, 1)
        frozen = self.penalty_weight is not None
        if not self.val_weight > 0.0 or (frozen and math.isinf(self.val_weight)):
            raise UsageError(
                f"val_weight must be a number above 0, got {self.val_weight!r}"
                + (", which leaves nothing of the penalty" if frozen else "")
            )

    @classmethod
    def of_frozen(
        cls,
        steps: int,
        *,
        val_weight: float = 1.0,
        penalty_weight: float = 1.0,
        given: Mapping[str, float] | None = None,
    ) -> BaselineTraining:
        """Return a training on both splits with λ as it was learned from the validation split.

        Args:
            steps: Inner steps of a whole training.
            val_weight: See the class.
            penalty_weight: Likewise.
            given: Likewise.
        """
        return cls(steps, True, given or {}, val_weight, penalty_weight)

    @property
    def interval(self) -> int:
        """The inner steps between two evaluations."""
        return math.ceil(self.steps / EVALUATIONS)

    @property
    def length(self) -> Budget:
        """The length of a whole training."""
        return Budget(outer_steps=math.ceil(self.steps / self.interval))

    def patience(self, outer_steps: int | None, inner_steps: int) -> int | None:
        """Return for how many evaluations to wait, as long as for outer steps of joint training.

        Args:
            outer_steps: The patience of the joint training.
            inner_steps: Of each of its outer steps.
        """
        if outer_steps is None:
            return None
        return math.ceil(outer_steps * inner_steps / self.interval)

    def config(self, config: MetaConfig) -> MetaConfig:
        """Return them with the inner steps between two evaluations."""
        return config.updated({"inner_steps": self.interval})

    def step(self, joint: JointOptimizer) -> dict[str, float]:
        """Take the inner steps up to the next evaluation."""
        if joint.outer_steps == 0 and self.prior_passes:
            joint.cost.add(FORWARD * self.prior_passes, joint.count_examples("train"))
        return joint.baseline_step(**self._minimised)

    def shares(self, joint: JointOptimizer) -> tuple[float, float]:
        """Return those of the validation loss and of the penalty."""
        return joint.shares(**self._minimised)

    @property
    def _minimised(self) -> dict[str, Any]:
        return {
            "train_on_val": self.train_on_val,
            "val_weight": self.val_weight,
            "penalty_weight": self.penalty_weight,
        }

    def max_step_cost(self, joint: JointOptimizer) -> float:
        """Return the most that these inner steps can cost, and what was taken before the first."""
        steps = joint.max_step_cost(
            plain=True, train_on_val=self.train_on_val, val_weight=self.val_weight
        )
        if joint.outer_steps or not self.prior_passes:
            return steps
        examples = joint.count_examples("train") / joint.first_batch("train")
        return steps + FORWARD * self.prior_passes * examples

    def total_steps(self, budget: Budget, joint: JointOptimizer) -> int | None:
        """Return the inner steps of a whole training."""
        return self.steps

    def constants(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inner settings and what was given; those of the outer step mean nothing."""
        kept = {k for k in constants if k in _INNER or k.startswith(USER)}
        inner = {k: v if k in kept else None for k, v in constants.items()}
        return inner | dict(self.given)


class Limits:
    """Tells when the budget of a trial is used up.

    A counted budget is kept by a bound, not by a guess: each inverse says how many products it
    takes at most, so the most expensive step that can come is known before it is taken.
    """

    def __init__(self, budget: Budget, training: Training, joint: JointOptimizer) -> None:
        """Take the limits and what the steps are; the examples of the search split are counted."""
        self._budget, self._training = budget, training
        counted = budget.gradient_equivalents is not None
        self._search_examples = joint.count_examples("search") if counted else 0

    def reached(self, joint: JointOptimizer, seconds: float, *, due: bool) -> bool:
        """Return whether a limit is reached, or one more step could go past the counted one.

        Args:
            joint: What has taken the steps so far.
            seconds: What they took.
            due: Whether the search split is evaluated after the latest of them.
        """
        budget = self._budget
        if budget.outer_steps is not None and joint.outer_steps >= budget.outer_steps:
            return True
        if budget.seconds is not None and seconds >= budget.seconds:
            return True
        return not self.affords_a_step(joint, due=due)

    def affords_a_step(self, joint: JointOptimizer, *, due: bool = False) -> bool:
        """Return whether one more step stays within the counted limit.

        The limit covers the evaluations of the search split, after the latest step if it is `due`,
        and after the next one, which may turn out to be the last.
        """
        limit = self._budget.gradient_equivalents
        if limit is None:
            return True
        evaluation = FORWARD * self._search_examples / joint.first_batch("train")
        spent = joint.cost.gradient_equivalents + evaluation * due
        return spent + self._training.max_step_cost(joint) + evaluation <= limit


def constants(config: MetaConfig, seed: int, device: str | None) -> dict[str, Any]:
    """Return what is the same in all rows of a trial: every setting, unused ones empty."""
    return {
        **dict.fromkeys(MetaConfig.flat_keys()),
        **config.to_flat(),
        "seed": seed,
        "device": device,
        "retrained_test_error": None,
    }
