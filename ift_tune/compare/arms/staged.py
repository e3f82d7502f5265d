"""Arms whose first trial finds what the others train with: IFT's λ, or which examples to drop."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ift_tune.base.status import COARSE_PREFIX
from ift_tune.compare.arms.base import INNER_LR, VAL_WEIGHT, Arm, ArmSpace, Style, TrialKind
from ift_tune.compare.arms.standard import BaselineTrials

if TYPE_CHECKING:
    import torch

    from ift_tune.compare.comparison import Comparison, SearchState
    from ift_tune.joint.callbacks import Callback
    from ift_tune.joint.config import MetaConfig
    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.trial.trial import ProblemFactory, Trial

_DROPPED = "dropped"
_LEAST_DROPPED, _MOST_DROPPED, _DROPPED_AT_FIRST = 0.02, 0.8, 0.3
_PENALTY_WEIGHT = "penalty_weight"
_PENALTIES = (4.0, 16.0)  # times that of λ; tried first after 1, see `FrozenTrials`
_MULTIPLE = 4.0  # λ has set the training examples' weights: 1 is about right


@dataclass(frozen=True)
class FrozenTrials(TrialKind):
    """An IFT trial, and then plain trainings on both splits with the λ that it has found.

    A search varies the weight of a validation example, the strength of λ's penalty as a whole and
    the inner learning rate. The weights of an IFT run are far from their minimum, which is a
    regulariser of its own, and decays that are learned beside it are weak ones for a training from
    scratch: so stronger ones are tried early. The IFT trial is no candidate: its weights have
    followed λ's whole path.

    Attributes:
        share: The part of the budget that the IFT trial may spend.
    """

    groundwork: ClassVar[int] = 1
    share: float = 0.5

    @property
    def train_on_val(self) -> bool:
        """True: of the trials that count."""
        return True

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return the weight of a validation example, the penalty's, and the inner learning rate."""
        from ift_tune.hyper import HyperKind
        from ift_tune.search.space import Float, Space

        lr = comparison.config.inner_lr
        varied = {
            VAL_WEIGHT: Float(1.0 / _MULTIPLE, _MULTIPLE, log=True),
            INNER_LR: Float(lr / 10.0, lr * 10.0, log=True),
        }
        start = {VAL_WEIGHT: 1.0, INNER_LR: lr}
        if not isinstance(hyper, HyperKind) or hyper.penalty() is None:
            return ArmSpace(Space(varied), start)
        most = max(_PENALTIES)
        varied[_PENALTY_WEIGHT] = Float(1.0 / most, most, log=True)
        start[_PENALTY_WEIGHT] = 1.0
        further = [start | {_PENALTY_WEIGHT: times} for times in _PENALTIES]
        return ArmSpace(Space(varied), start, further=further)

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
        """Return the IFT trial, or a training with its λ."""
        from ift_tune.compare.comparison import baseline_trial
        from ift_tune.trial.selection import Groundwork
        from ift_tune.trial.training import BaselineTraining
        from ift_tune.trial.trial import Trial

        if search_state.trials < self.groundwork:
            length = comparison.part(self.share, eval_every=comparison.trial_budget.eval_every)
            return Trial(
                comparison.problem_factory,
                comparison.config,
                comparison.within(length, search_state),
                seed=seed,
                device=device,
                metric=comparison.metric,
                mode=comparison.direction.value,
                callbacks=callbacks,
                selection=Groundwork(),
            )
        given = {name: float(value) for name, value in point.items() if name != INNER_LR}
        training = BaselineTraining.of_frozen(
            comparison.training_steps,
            val_weight=given.get(VAL_WEIGHT, 1.0),
            penalty_weight=given.get(_PENALTY_WEIGHT, 1.0),
            given={f"{COARSE_PREFIX}{name}": value for name, value in given.items()},
        )
        return baseline_trial(
            KeptHyper(comparison.problem_factory, search_state.kept),
            comparison.config.updated({k: v for k, v in point.items() if k == INNER_LR}),
            training,
            budget=comparison.within(training.length, search_state),
            seed=seed,
            device=device,
            metric=comparison.metric,
            mode=comparison.direction.value,
        )


@dataclass(frozen=True)
class KeptHyper:
    """A problem factory that sets λ to what a trial has found.

    Attributes:
        problem_factory: Makes the problem.
        kept: The file with λ; it is read when a problem is made.
    """

    problem_factory: ProblemFactory
    kept: Path | None

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem."""
        from ift_tune.trial.found import FoundProblem

        return FoundProblem(self.problem_factory, _read(self.kept)["hyper"])(config, device, seed)


@dataclass(frozen=True)
class RankedTrials(TrialKind):
    """A plain training, and then others without the examples whose loss is highest in it.

    The first is stopped early by the search split, before it has learned wrong labels by heart, and
    its best evaluation has the say. The others vary how many are dropped, the task's coarse space
    and the inner learning rate.
    """

    groundwork: ClassVar[int] = 1

    def refusal(self, hyper: object) -> str | None:
        """Return None if λ has a weight for each training example, which can be 0."""
        from ift_tune.hyper import ExampleWeights, kinds_in

        if not kinds_in(hyper, ExampleWeights):
            return "λ of the task has no ExampleWeights, by which training examples are dropped"
        return None

    @property
    def train_on_val(self) -> bool:
        """False."""
        return False

    def space(self, comparison: Comparison, hyper: object) -> ArmSpace:
        """Return the share that is dropped beside what plain trainings vary."""
        from ift_tune.search.space import Float, Space

        plain = BaselineTrials().space(comparison, hyper)
        dropped = Float(_LEAST_DROPPED, _MOST_DROPPED)
        return ArmSpace(
            Space({_DROPPED: dropped, **plain.space.distributions}),
            {_DROPPED: _DROPPED_AT_FIRST, **plain.start},
            plain.secondary,
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
        """Return the training on all examples, or one without some of them."""
        first = search_state.trials < self.groundwork
        dropped = 0.0 if first else float(point.get(_DROPPED, _DROPPED_AT_FIRST))
        factory = comparison.problem_factory
        return BaselineTrials().training(
            comparison,
            factory if first else WithoutHighest(factory, search_state.kept, dropped),
            {name: value for name, value in point.items() if name != _DROPPED},
            search_state,
            given={f"{COARSE_PREFIX}{_DROPPED}": dropped},
            prior_passes=0 if first else 1,  # by which the examples are ranked
            keep_model=first,
            seed=seed,
            device=device,
        )


@dataclass(frozen=True)
class WithoutHighest:
    """A problem factory that gives the training examples of the highest losses no weight.

    Attributes:
        problem_factory: Makes the problem.
        kept: The file with the model that has the losses; it is read when a problem is made.
        dropped: The share of the training examples.
    """

    problem_factory: ProblemFactory
    kept: Path | None
    dropped: float

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem.

        Raises:
            UsageError: If λ has no weight for each training example.
        """
        from ift_tune.base.errors import UsageError
        from ift_tune.hyper import ExampleWeights, kinds_in
        from ift_tune.hyper.loss_weights import example_losses
        from ift_tune.problem.factory import build_problem
        from ift_tune.trial.found import state_of
        from ift_tune.trial.training import PRIOR_SECONDS

        problem = build_problem(self.problem_factory, config, device, seed)
        kinds = kinds_in(problem.hyper, ExampleWeights)
        if not kinds:
            raise UsageError("λ must have ExampleWeights, by which examples are dropped, got none")
        weights, started = kinds[0], time.perf_counter()
        initial = state_of(problem.model)
        problem.model.load_state_dict(_read(self.kept)["model"])
        # What the pass has not met is no suspect, and trains nothing either way.
        losses = example_losses(problem, weights).nan_to_num(nan=-math.inf)
        highest = losses.argsort(descending=True, stable=True)
        problem.model.load_state_dict(initial)
        weights.leave_out(highest[: round(self.dropped * len(highest))])
        setattr(problem, PRIOR_SECONDS, time.perf_counter() - started)
        return problem


def _read(kept: Path | None) -> dict[str, Any]:
    from ift_tune.base.checkpoints import load_checkpoint
    from ift_tune.base.errors import UsageError

    if kept is None:
        raise UsageError("the search must have kept its first trial's model and λ, got none")
    return load_checkpoint(kept)


ARMS = (
    Arm(
        "ift+val",
        label="IFT, refitted",
        phrase="IFT refitted on training and validation examples",
        summary="IFT on half of the budget; then λ is frozen, and the validation examples are "
        "trained on too, their weight and that of the penalty searched",
        style=Style("#c4451c", (9, 1.2), "h"),
        trials=FrozenTrials(),
        sampler="qmc",
    ),
    Arm(
        "loss-ranking",
        label="loss ranking",
        phrase="random search that drops the examples of highest loss",
        summary="random search; a first training, stopped early, ranks the training examples by "
        "their loss, and the highest are dropped",
        style=Style("#6d7f1e", (2, 2, 2, 1), "d"),
        trials=RankedTrials(),
        sampler="random",
    ),
)
