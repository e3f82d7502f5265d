"""What an arm is: a way to choose hyperparameters under a budget."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ift_tune.compare.comparison import Comparison, SearchState
from ift_tune.compare.plain import BaselineTrial, baseline_budget, turned
from ift_tune.compare.scored import ScoredTrial
from ift_tune.compare.trials import SelectedTrial
from ift_tune.hyper import CoarseParameter, HyperKind
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget
from ift_tune.search.space import Distribution, Float, Int, MetaSpace, Space

INNER_LR = "inner_lr"
ONE = 1
ENDLESS = 10**9  # trials: the budget ends the search


@dataclass(frozen=True)
class Search:
    """How an arm searches, in words that the outer search understands.

    Attributes:
        space: What its trials are drawn from; None if there is nothing to draw.
        first: The first trial's point; None if it is drawn too.
        sampler: Its name, see `sampling.sampler_factory`; or the grid's values by name.
        pruner: Its name, see `sampling.make_pruner`.
        n_trials: Most trials.
    """

    space: Space | None = None
    first: Mapping[str, Any] | None = None
    sampler: str | Mapping[str, tuple[float, ...]] = "random"
    pruner: str = "none"
    n_trials: int = ENDLESS


class Arm(abc.ABC):
    """A way to choose hyperparameters. A new one is a file here and a line in `ARMS`.

    Attributes:
        name: In the tables and on the command line.
        summary: One line for the report.
    """

    name: str
    summary: str

    @abc.abstractmethod
    def search(self, comparison: Comparison, hyper: object) -> Search:
        """Return how it searches.

        Args:
            comparison: The task and its settings.
            hyper: The task's hyperparameter module, as initialised.
        """

    @abc.abstractmethod
    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
    ) -> ScoredTrial:
        """Return the trial at a point, within what is left of the budget."""


@dataclass(frozen=True)
class JointArm(Arm):
    """IFT: hyperparameters follow their hypergradients while the weights are trained.

    Attributes:
        name: See `Arm`.
        summary: See `Arm`.
        sampler: Of the outer search over the meta-hyperparameters; None: the task's defaults, in
            one trial that takes the whole budget.
    """

    name: str
    summary: str
    sampler: str | None = None

    def search(self, comparison: Comparison, hyper: object) -> Search:
        """Search around the task's defaults, which are the first point."""
        if self.sampler is None:
            return Search(n_trials=ONE)
        config = comparison.config
        varied: dict[str, Distribution] = {
            "meta_lr": Float(config.meta_lr / 10.0, config.meta_lr * 10.0, log=True),
            "inner_steps": Int(
                max(1, config.inner_steps // 3), max(3, config.inner_steps * 3), log=True
            ),
        }
        first: dict[str, Any] = {"meta_lr": config.meta_lr, "inner_steps": config.inner_steps}
        inverse = config.inverse
        if isinstance(inverse, Neumann):
            varied["terms"] = Int(0, max(20, inverse.terms))
            first["terms"] = inverse.terms
            if isinstance(inverse.alpha, int | float):
                varied["alpha"] = Float(inverse.alpha / 10.0, inverse.alpha * 10.0, log=True)
                first["alpha"] = inverse.alpha
            else:
                scale = 1.0 if inverse.alpha_scale is None else inverse.alpha_scale
                varied["alpha_scale"] = Float(min(0.1, scale), max(1.5, scale), log=True)
                first["alpha_scale"] = scale
        return Search(MetaSpace(varied), first, self.sampler)

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
    ) -> ScoredTrial:
        """Return an IFT trial."""
        whole = (
            comparison.trial_budget
            if self.sampler
            else replace(comparison.budget, eval_every=comparison.trial_budget.eval_every)
        )
        return SelectedTrial(
            comparison.problem_factory,
            comparison.config.updated(point),
            within(whole, comparison, search_state),
            training_steps=comparison.training_steps,
            incumbent=search_state.best,
            seed=seed,
            device=device,
            metric=comparison.metric,
        )


@dataclass(frozen=True)
class BaselineArm(Arm):
    """A black-box search over plain trainings: the knobs of the task, and the inner learning rate.

    Attributes:
        name: See `Arm`.
        summary: See `Arm`.
        sampler: Of the search; ``"grid"`` for a grid; None: one training, nothing is searched.
        pruner: Of the search.
        train_on_val: Whether trainings use the validation split as training data.
        grid_sizes: Values of each knob and of the learning rate, where the sampler is a grid.
    """

    name: str
    summary: str
    sampler: str | None = None
    pruner: str = "none"
    train_on_val: bool = False
    grid_sizes: tuple[int, int] = (7, 3)

    def search(self, comparison: Comparison, hyper: object) -> Search:
        """Search knobs and learning rate; the first point comes closest to the task's defaults."""
        if self.sampler is None:
            return Search(n_trials=ONE)
        lr = comparison.config.inner_lr
        knobs = (hyper.coarse_space() if isinstance(hyper, HyperKind) else {}) | {
            INNER_LR: CoarseParameter(lr / 10.0, lr * 10.0, lr)
        }
        space = Space({k: Float(knob.low, knob.high, log=True) for k, knob in knobs.items()})
        if self.sampler == "grid":
            return Search(space, None, self._grid(knobs), self.pruner)
        return Search(space, {k: k_.start for k, k_ in knobs.items()}, self.sampler, self.pruner)

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
    ) -> ScoredTrial:
        """Return a plain training."""
        knobs = {k: float(v) for k, v in point.items() if k != INNER_LR}
        changes = {INNER_LR: point[INNER_LR]} if INNER_LR in point else {}
        return BaselineTrial(
            comparison.problem_factory,
            comparison.config.updated(changes),
            within(baseline_budget(comparison.training_steps), comparison, search_state),
            training_steps=comparison.training_steps,
            prepare=turned(knobs) if knobs else None,
            point=knobs,
            train_on_val=self.train_on_val,
            seed=seed,
            device=device,
            metric=comparison.metric,
        )

    def _grid(self, knobs: Mapping[str, CoarseParameter]) -> dict[str, tuple[float, ...]]:
        of_knobs, of_lr = self.grid_sizes
        return {
            name: (knob.start,)
            if knob.secondary
            else spread(knob, of_lr if name == INNER_LR else of_knobs)
            for name, knob in knobs.items()
        }


def spread(knob: CoarseParameter, size: int) -> tuple[float, ...]:
    """Return values that cut a knob's range into `size` parts of equal ratio, at their middles."""
    ratio = knob.high / knob.low
    return tuple(knob.low * ratio ** ((i + 0.5) / size) for i in range(size))


def within(length: Budget, comparison: Comparison, search_state: SearchState) -> Budget:
    """Return the length of a trial, cut to what is left for the search."""
    left = max(comparison.limit - search_state.spent, 1e-9)
    if comparison.budget.gradient_equivalents is not None:
        own = length.gradient_equivalents
        return replace(length, gradient_equivalents=left if own is None else min(own, left))
    return replace(length, seconds=left if length.seconds is None else min(length.seconds, left))
