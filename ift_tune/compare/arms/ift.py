"""IFT: hyperparameters follow their hypergradients while the weights are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ift_tune.compare.arms.base import Arm, ArmSpace, Style, TrialKind

if TYPE_CHECKING:
    from ift_tune.compare.comparison import Comparison, SearchState
    from ift_tune.joint.callbacks import Callback
    from ift_tune.trial.trial import Trial


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
        from ift_tune.trial.baseline import BaselineRetraining
        from ift_tune.trial.selection import BestEvaluation
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
            callbacks=callbacks,
            selection=BestEvaluation(
                retraining=BaselineRetraining(comparison.training_steps),
                incumbent=search_state.best,
            ),
        )


ARMS = (
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
