"""IFT's arms, and the black-box arms that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ift_tune.base.status import COARSE_PREFIX
from ift_tune.compare.arms.base import (
    INNER_LR,
    VAL_WEIGHT,
    Arm,
    ArmSpace,
    Grid,
    Style,
    TrialKind,
)

if TYPE_CHECKING:
    import torch

    from ift_tune.compare.comparison import Comparison, SearchState
    from ift_tune.joint.callbacks import Callback
    from ift_tune.joint.config import MetaConfig
    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.trial.trial import ProblemFactory, Trial


_MULTIPLE = 16.0  # most of a validation example's weight, and its inverse the least


@dataclass(frozen=True)
class BaselineTrials(TrialKind):
    """Plain trainings: a search varies the task's coarse space and the inner learning rate.

    Where they use both splits, it varies the weight of a validation example too.

    Attributes:
        train_on_val: See `TrialKind`.
        train_on_train: Whether the weights are trained on the training examples.
    """

    train_on_val: bool = False
    train_on_train: bool = True

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return the coarse space of the task's hyperparameters, and the inner learning rate."""
        # Imported when a search begins: reports read this file without PyTorch.
        from ift_tune.hyper import CoarseParameter, HyperKind
        from ift_tune.search.space import Float, Space

        lr = comparison.config.inner_lr
        varied = (hyper.coarse_space() if isinstance(hyper, HyperKind) else {}) | {
            INNER_LR: CoarseParameter(lr / 10.0, lr * 10.0, lr)
        }
        if self.train_on_val and self.train_on_train:
            varied[VAL_WEIGHT] = CoarseParameter(1.0 / _MULTIPLE, _MULTIPLE, 1.0)
        return ArmSpace(
            Space({name: Float(p.low, p.high, log=True) for name, p in varied.items()}),
            {name: p.start for name, p in varied.items()},
            frozenset(name for name, p in varied.items() if p.secondary),
        )

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> Trial:
        """Return a plain training."""
        factory = self.problem_factory(comparison)
        return self.training(comparison, factory, point, search_state, seed=seed, device=device)

    def problem_factory(self, comparison: Comparison) -> ProblemFactory:
        """Return what makes the problem of each training, its λ apart."""
        return comparison.problem_factory

    def training(
        self,
        comparison: Comparison,
        problem_factory: ProblemFactory,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        given: Mapping[str, float] | None = None,
        prior_passes: int = 0,
        keep_model: bool = False,
    ) -> Trial:
        """Return a plain training of a problem that may differ from the comparison's.

        Args:
            comparison: See `trial`, and so for the arguments that are not here.
            problem_factory: Makes the problem.
            point: Likewise.
            search_state: Likewise.
            seed: Likewise.
            device: Likewise.
            given: What else it was given.
            prior_passes: See `BaselineTraining`.
            keep_model: See `BestEvaluation`.
        """
        from ift_tune.compare.comparison import baseline_trial
        from ift_tune.trial.training import BaselineTraining

        searched = {name: float(v) for name, v in point.items() if name != INNER_LR}
        coarse = {name: value for name, value in searched.items() if name != VAL_WEIGHT}
        training = BaselineTraining(
            comparison.training_steps,
            train_on_val=self.train_on_val,
            given={f"{COARSE_PREFIX}{k}": v for k, v in searched.items()} | dict(given or {}),
            val_weight=searched.get(VAL_WEIGHT, 1.0) if self.train_on_train else math.inf,
            prior_passes=prior_passes,
        )
        return baseline_trial(
            CoarselySet(problem_factory, coarse) if coarse else problem_factory,
            comparison.config.updated({k: v for k, v in point.items() if k == INNER_LR}),
            training,
            budget=comparison.within(training.length, search_state),
            seed=seed,
            device=device,
            metric=comparison.metric,
            mode=comparison.direction.value,
            keep_model=keep_model,
        )


@dataclass(frozen=True)
class CoarselySet:
    """A problem factory that sets the hyperparameters of what another makes.

    Attributes:
        problem_factory: The other.
        values: Of the coarse space.
    """

    problem_factory: ProblemFactory
    values: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem; hyperparameters that are no `HyperKind` stay as they are."""
        from ift_tune.hyper import HyperKind
        from ift_tune.problem.factory import build_problem

        problem = build_problem(self.problem_factory, config, device, seed)
        if isinstance(problem.hyper, HyperKind):
            problem.hyper.set_coarse(self.values)
        return problem


_BLACKBOX_ARMS = (
    Arm(
        "random",
        label="random search",
        phrase="random search",
        summary="random search",
        style=Style("#3f7fc4", (3, 1.2), "^"),
        trials=BaselineTrials(),
        sampler="random",
    ),
    # What IFT must beat to be worth it: the same examples, used in the simplest way.
    Arm(
        "random+val",
        label="random + validation",
        phrase="random search that trains on the validation examples too",
        summary="random search; its trainings use the validation examples as further training "
        "data, with a weight that is searched",
        style=Style("#46a3b8", (1.5, 1, 4, 1), ">"),
        trials=BaselineTrials(train_on_val=True),
        sampler="random",
    ),
    # And if λ learns more from them than training does, the training examples must be worth it.
    Arm(
        "val",
        label="validation alone",
        phrase="random search that trains on the validation examples alone",
        summary="random search; its trainings use the validation examples and no others",
        style=Style("#7d6bb0", (4, 1, 1, 1, 1, 1), "H"),
        trials=BaselineTrials(train_on_val=True, train_on_train=False),
        sampler="random",
    ),
    Arm(
        "tpe",
        label="TPE",
        phrase="TPE",
        summary="tree-structured Parzen estimator",
        style=Style("#1f9a8a", (5, 1.2, 1, 1.2), "D"),
        trials=BaselineTrials(),
        sampler="tpe",
    ),
    Arm(
        "gp",
        label="Gaussian process",
        phrase="the Gaussian process",
        summary="Gaussian process with log expected improvement",
        style=Style("#8a6fd1", (1, 1), "v"),
        trials=BaselineTrials(),
        sampler="gp",
    ),
    Arm(
        "cmaes",
        label="CMA-ES",
        phrase="CMA-ES",
        summary="CMA-ES, an evolution strategy",
        style=Style("#b8901a", (7, 1.2, 1, 1.2, 1, 1.2), "P"),
        trials=BaselineTrials(),
        sampler="cmaes",
    ),
    Arm(
        "grid",
        label="grid search",
        phrase="grid search",
        summary="a grid of decays and inner learning rates, in random order",
        style=Style("#5f8f2f", (2, 1, 5, 1), "X"),
        trials=BaselineTrials(),
        sampler=Grid(size=7, inner_lrs=3),
    ),
    Arm(
        "asha",
        label="successive halving",
        phrase="successive halving",
        summary="random search with asynchronous successive halving",
        style=Style("#2f9e57", (4, 2.4), "<"),
        trials=BaselineTrials(),
        sampler="random",
        pruner="asha",
    ),
    Arm(
        "none",
        label="no search",
        phrase="no search",
        summary="no search: one training with hyperparameters as the task has them",
        style=Style("#86888c", (1, 2.2), "*"),
        trials=BaselineTrials(),
    ),
)


@dataclass(frozen=True)
class JointTrials(TrialKind):
    """IFT trials, scored by their best evaluation; its λ is retrained from scratch.

    Attributes:
        whole_budget: Whether a trial takes all that is left, in place of the usual length.
    """

    whole_budget: bool = False

    @property
    def train_on_val(self) -> bool:
        """False: from the validation examples λ learns, and the weights do not."""
        return False

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return the meta-hyperparameters around the task's defaults."""
        # Imported when a search begins: reports read this file without PyTorch.
        from ift_tune.implicit.inverse import Neumann
        from ift_tune.search.space import Distribution, Float, Int, MetaSpace

        config = comparison.config
        varied: dict[str, Distribution] = {
            "meta_lr": Float(config.meta_lr / 10.0, config.meta_lr * 10.0, log=True),
            "inner_steps": Int(
                max(1, config.inner_steps // 3), max(3, config.inner_steps * 3), log=True
            ),
        }
        start: dict[str, Any] = {"meta_lr": config.meta_lr, "inner_steps": config.inner_steps}
        inverse = config.inverse
        if isinstance(inverse, Neumann):
            varied["terms"] = Int(0, max(20, inverse.terms))
            start["terms"] = inverse.terms
            if isinstance(inverse.alpha, int | float):
                varied["alpha"] = Float(inverse.alpha / 10.0, inverse.alpha * 10.0, log=True)
                start["alpha"] = inverse.alpha
            else:
                scale = 1.0 if inverse.alpha_scale is None else inverse.alpha_scale
                varied["alpha_scale"] = Float(min(0.1, scale), max(1.5, scale), log=True)
                start["alpha_scale"] = scale
        return ArmSpace(MetaSpace(varied), start)

    def trial(
        self,
        comparison: Comparison,
        point: Mapping[str, Any],
        search_state: SearchState,
        *,
        seed: int,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> Trial:
        """Return an IFT trial; only what is better than the search so far is retrained."""
        from ift_tune.compare.comparison import BaselineRetraining
        from ift_tune.trial.scored import BestEvaluation
        from ift_tune.trial.trial import Trial

        length = comparison.trial_budget
        if self.whole_budget:
            length = replace(comparison.budget, eval_every=length.eval_every)
        return Trial(
            comparison.problem_factory,
            comparison.config.updated(point),
            comparison.within(length, search_state),
            seed=seed,
            device=device,
            metric=comparison.metric,
            mode=comparison.direction.value,
            callbacks=callbacks,
            selection=BestEvaluation(
                retraining=BaselineRetraining(comparison.training_steps),
                incumbent=search_state.best,
            ),
        )


_IFT_ARMS = (
    Arm(
        "ift",
        label="IFT",
        phrase="IFT",
        summary="IFT with the task's defaults, in one run that takes the whole budget",
        style=Style("#e4572e", (), "o"),
        trials=JointTrials(whole_budget=True),
    ),
    Arm(
        "ift+tpe",
        label="IFT + TPE",
        phrase="IFT with an outer search by TPE",
        summary="IFT, its meta-hyperparameters searched by TPE; every trial is charged",
        style=Style("#c2408f", (6, 1.5), "s"),
        trials=JointTrials(),
        sampler="tpe",
    ),
)

ARMS = (*_IFT_ARMS, *_BLACKBOX_ARMS)
