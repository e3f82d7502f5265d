"""The outer search with Optuna: an objective for any study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import BaseTrial

from ift_tune.base.errors import UsageError
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.plan import TrialPlan
from ift_tune.search.space import MetaSpace
from ift_tune.trial.runner import Interrupt, Interrupted, run_trial
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory, Trial

FEATURED = (
    "search_error",
    "search_loss",
    "test_error",
    "test_loss",
    "retrained_test_error",
    "retrained_test_loss",
    "gradient_equivalents",
    "hvps",
    "wall_seconds",
)


class PlannedObjective:
    """An Optuna objective over the trials of a plan; see `IFTObjective`."""

    def __init__(
        self,
        plan: TrialPlan,
        *,
        run: RunDirectory | None = None,
        facts: dict[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        interrupt: Interrupt | None = None,
    ) -> None:
        """Take what is common to all trials.

        Args:
            plan: Makes the trials.
            run: Where tables, checkpoints and found hyperparameters go; nothing is written without.
            facts: Further constant columns of the tables.
            callbacks: Their hooks of the search are called; the plan has those of the optimisation.
            interrupt: Looked at between outer steps.
        """
        self.plan, self.run = plan, run
        self._facts, self._callbacks, self._interrupt = facts or {}, callbacks, interrupt

    def __call__(self, trial: BaseTrial) -> float:
        """Run the trial.

        Returns:
            The trial's value after the last outer step.

        Raises:
            optuna.TrialPruned: If the pruner stopped it, or it diverged, was not finite, or ran
                out of memory: then it has no value, and samplers count it as a bad point.
            Interrupted: If the user asked to stop; the trial is saved.
            UsageError: If the study maximises or has several objectives.
        """
        reported = _reported(trial)
        point = {} if self.plan.space is None else self.plan.space.suggest(trial)

        def should_prune(value: float, step: int) -> bool:
            if step not in reported:
                trial.report(value, step)
            elif step < max(reported):
                return False  # a resumed trial went on here the first time
            return trial.should_prune()

        outcome = run_trial(
            self.make(point, trial.number),
            trial.number,
            record=None if self.run is None else self.run.trial(trial.number),
            facts=self._facts | {"trial": trial.number},
            should_prune=should_prune,
            callbacks=self._callbacks,
            interrupt=self._interrupt,
        )
        if outcome.stop_reason is StopReason.INTERRUPTED:
            raise Interrupted(f"trial {trial.number} was interrupted and saved")
        note_outcome(trial, outcome)
        if outcome.stop_reason is not StopReason.DONE or outcome.value is None:
            raise optuna.TrialPruned(f"trial {trial.number} ended: {outcome.stop_reason.value}")
        return outcome.value

    def make(self, point: dict[str, Any], number: int) -> Trial:
        """Return the trial of this number at a point."""
        return self.plan.trial(point)


class IFTObjective(PlannedObjective):
    """An Optuna objective: one inner IFT optimisation at suggested meta-hyperparameters.

    Works in any study that minimises one value: ``study.optimize(IFTObjective(...), n_trials=20)``
    with any sampler, pruner and storage, or with ask and tell. It reports every evaluation, prunes
    when the study's pruner says so or when the trial diverges, and sets small user attributes
    (`stop_reason`, test metrics, cost).
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        space: MetaSpace,
        budget: Budget,
        *,
        config: MetaConfig | None = None,
        seed: int = 0,
        device: str = "auto",
        metric: str | None = None,
        run: RunDirectory | None = None,
        facts: dict[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        interrupt: Interrupt | None = None,
    ) -> None:
        """Take what is common to all trials.

        Args:
            problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
            space: What varies.
            budget: Length of each trial.
            config: What does not vary. Default: ``MetaConfig()``.
            seed: Of every trial's problem: all trials see the same splits and initial weights.
            device: Where trials run.
            metric: The search metric to minimise; see `Trial`.
            run: Where tables, checkpoints and found hyperparameters go; nothing is written without.
            facts: Further constant columns of the tables.
            callbacks: Hooks into the trials and the search.
            interrupt: Looked at between outer steps.

        Raises:
            UsageError: If the corners of the space are no valid configurations.
        """
        config = MetaConfig() if config is None else config
        plan = TrialPlan(problem_factory, space, budget, config, seed, device, metric, callbacks)
        super().__init__(plan, run=run, facts=facts, callbacks=callbacks, interrupt=interrupt)


def note_outcome(trial: BaseTrial, outcome: Outcome) -> None:
    """Set the user attributes that tell how a trial ended and what it measured."""
    trial.set_user_attr("stop_reason", outcome.stop_reason.value)
    trial.set_user_attr("metric", outcome.metric)
    for name in FEATURED:
        if name in outcome.metrics:
            trial.set_user_attr(name, outcome.metrics[name])


def check_directions(study: optuna.Study) -> None:
    """Raise a `UsageError` unless the study minimises one value."""
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise UsageError(
            "search metrics are losses and errors, one of which is minimised: create the study "
            "with direction='minimize'"
        )


def _reported(trial: BaseTrial) -> dict[int, float]:
    """Return what the trial has reported already, empty for one that is not of a study."""
    if not isinstance(trial, optuna.Trial):
        return {}
    check_directions(trial.study)
    return trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
