"""Where the trials of an Optuna study come from, and an objective for any study."""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
import torch
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from ift_tune.base.arguments import require_instance
from ift_tune.base.direction import Direction, direction_of
from ift_tune.base.environment import environment
from ift_tune.base.errors import Interrupted, RunExistsError, UsageError
from ift_tune.base.identity import FACTORY, require_same
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.flat import USER
from ift_tune.search.analysis import direction_of_study, featured
from ift_tune.search.retry import RUN_DIRECTORY, take_over
from ift_tune.search.space import MetaSpace, Space
from ift_tune.trial.best import keep_best
from ift_tune.trial.record import plain_json
from ift_tune.trial.runner import Interrupt, TrialPlan, run_trial
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory, Trial


class TrialSource(abc.ABC):
    """Where the trials of a study come from. Picklable: it travels to other processes."""

    @property
    @abc.abstractmethod
    def space(self) -> Space | None:
        """What its points are drawn from; None if there is nothing to draw."""

    @property
    @abc.abstractmethod
    def direction(self) -> Direction:
        """In which the value of its trials is better."""

    @abc.abstractmethod
    def trial(self, point: Mapping[str, Any], number: int) -> Trial:
        """Return the trial of a number at a point, not yet set up."""

    @abc.abstractmethod
    def on(self, device: str) -> TrialSource:
        """Return the same source with its trials on a device."""

    @abc.abstractmethod
    def exhausted(self) -> bool:
        """Return whether no further trial may begin, however many the study has asked for."""


@dataclass(frozen=True)
class SearchPlan(TrialSource):
    """Trials of one length, each at a point of a space.

    Attributes:
        trials: What they have in common.
        space: What varies; None if every key of `MetaConfig` may, or nothing does.

    Raises:
        UsageError: If the corners of the space are no valid configurations.
    """

    trials: TrialPlan
    space: Space | None = None

    def __post_init__(self) -> None:
        if self.space is not None:
            require_instance(
                "space", self.space, Space, 'a space such as MetaSpace({"terms": Int(0, 20)})'
            )
            self.space.check(self.trials.config)

    @property
    def direction(self) -> Direction:
        """Of the trials' metric."""
        return self.trials.direction

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
        return {
            **self.trials.settings(),
            "space": None if self.space is None else self.space.to_json(),
        }


class SourceObjective:
    """An Optuna objective over the trials of a source; see `IFTObjective`."""

    def __init__(
        self,
        source: TrialSource,
        *,
        run: RunDirectory | None = None,
        facts: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        interrupt: Interrupt | None = None,
    ) -> None:
        """Take what is common to all trials.

        Args:
            source: Makes the trials, with the callbacks' hooks of the optimisation.
            run: Where tables, checkpoints and found hyperparameters go; nothing is written without.
            facts: Further constant columns of the tables.
            callbacks: Their hooks of the search are called.
            interrupt: Looked at between outer steps.
        """
        self._source, self._run = source, run
        self._facts, self._callbacks, self._interrupt = dict(facts or {}), callbacks, interrupt

    def __call__(self, trial: BaseTrial) -> float:
        """Run the trial; see `IFTObjective.__call__`."""
        if self._run is not None and isinstance(trial, optuna.Trial):
            take_over(self._run, trial)
        reported = _reported(trial, self._source.direction)
        space = self._source.space
        point = {} if space is None else space.suggest(trial)

        def should_prune(value: float, step: int) -> bool:
            if step not in reported:
                trial.report(value, step)
            elif step < max(reported):
                return False  # a resumed trial went on here the first time
            return trial.should_prune()

        outcome = run_trial(
            self._source.trial(point, trial.number),
            trial.number,
            record=None if self._run is None else self._run.trial(trial.number),
            facts=self._facts | {"trial": trial.number},
            should_prune=should_prune,
            callbacks=self._callbacks,
            interrupt=self._interrupt,
        )
        if outcome.stop_reason is StopReason.INTERRUPTED:
            raise Interrupted(f"trial {trial.number} was interrupted and saved")
        note_outcome(trial, outcome)
        if self._run is not None:
            keep_best(self._run, trial.number)
        if outcome.stop_reason is not StopReason.DONE or outcome.value is None:
            raise optuna.TrialPruned(f"trial {trial.number} ended: {outcome.stop_reason.value}")
        return outcome.value


class IFTObjective:
    """An Optuna objective: one inner IFT optimisation at suggested meta-hyperparameters.

    Works in any study of one value, whichever way it looks:
    ``study.optimize(IFTObjective(...), n_trials=20)`` with any sampler, pruner and storage, or with
    ask and tell. It reports every evaluation, prunes
    when the study's pruner says so or when the trial diverges, and sets small user attributes
    (`stop_reason`, test metrics, cost). The study keeps what it was begun with, and a `run` belongs
    to one study: another metric, budget or space is refused. A trial that Optuna retries, as the
    heartbeat of its process was missed, goes on from the checkpoint in `run`. With ``n_jobs``
    threads, trials take their steps by turns, each with the values that it has by itself;
    `run_study` has processes.

    Example:
        >>> import optuna
        >>> from ift_tune import Budget, Float, IFTObjective, MetaSpace, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1)})
        >>> objective = IFTObjective(problem, space, Budget(outer_steps=3), device="cpu")
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        >>> study.optimize(objective, n_trials=2)
        >>> [trial.user_attrs["stop_reason"] for trial in study.trials]
        ['done', 'done']
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
        mode: str | None = None,
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
            metric: The search metric that decides; see `Trial`.
            mode: ``"min"`` for a study that minimises, ``"max"`` for one that maximises; see
                `Trial`. Default: ``"max"`` if the study was created to maximise.
            run: Where tables, checkpoints and found hyperparameters go; nothing is written without.
            facts: Further constant columns of the tables.
            callbacks: Hooks into the trials and the search; see `Callback`.
            interrupt: Looked at between outer steps.

        Raises:
            UsageError: If the corners of the space are no valid configurations, or metric and mode
                do not go together.
        """
        config = MetaConfig() if config is None else config
        self._mode = mode
        # Which way a study looks may be said by the study itself, which comes with its trials.
        mode = mode or Direction.MIN.value
        trials = TrialPlan(problem_factory, budget, config, seed, device, metric, mode, callbacks)
        self._plan = SearchPlan(trials, space)
        self._run, self._facts = run, dict(facts or {})
        self._callbacks, self._interrupt = callbacks, interrupt

    def __call__(self, trial: BaseTrial) -> float:
        """Run the trial.

        Returns:
            The trial's value after the last outer step.

        Raises:
            optuna.TrialPruned: If the pruner stopped it, or it diverged, was not finite, or ran
                out of memory: then it has no value, and samplers count it as a bad point.
            Interrupted: If the user asked to stop; the trial is saved.
            UsageError: If the study's direction is not that of `mode`, the metric's name asks for a
                mode and neither gives one, the study has several objectives, the problem does not
                measure the metric, or study or `run` were begun with other settings.
            RunExistsError: If `run` holds a trial of this number already, of another study.
        """
        trials = self._plan.trials
        stated = self._mode
        if stated is None and trials.metric is not None:  # of an error or a loss, nothing is asked
            stated = _stated_by_study(trial)
        mode = direction_of(trials.metric, stated).value
        plan = replace(self._plan, trials=replace(trials, mode=mode))
        identity = {"task": self._facts.get("task", "custom"), **plan.settings()}
        if isinstance(trial, optuna.Trial):
            check_directions(trial.study, plan.direction)
            join_study(trial.study, identity)
        if self._run is not None:
            _take_folder(self._run, trial)
            named = {"arm": self._facts.get("arm"), "backend": "optuna"}
            self._run.begin({**identity, **named}, environment())
        objective = SourceObjective(
            plan,
            run=self._run,
            facts=self._facts,
            callbacks=self._callbacks,
            interrupt=self._interrupt,
        )
        return objective(trial)


def _stated_by_study(trial: BaseTrial) -> str | None:
    """Return the mode that a trial's study states: to maximise. To minimise is Optuna's default."""
    maximise = [optuna.study.StudyDirection.MAXIMIZE]
    if isinstance(trial, optuna.Trial) and trial.study.directions == maximise:
        return Direction.MAX.value
    return None


_IDENTITY = "ift_tune"


def join_study(study: optuna.Study, identity: Mapping[str, Any]) -> None:
    """Compare what decides the values of trials with what the study was begun with, or begin it.

    Args:
        study: The study, which keeps its identity as a user attribute.
        identity: Plain values; see `SearchPlan.settings`.

    Raises:
        UsageError: If the study was begun with others: their values would stand in one ranking.
    """
    now = json.loads(plain_json(identity))
    if (begun := study.user_attrs.get(_IDENTITY)) is None:
        study.set_user_attr(_IDENTITY, now)
        begun = study.user_attrs[_IDENTITY]  # another process may have begun it at this moment
    if FACTORY not in now:
        begun = {key: value for key, value in begun.items() if key != FACTORY}
    require_same(
        f"the study {study.study_name!r}",
        begun,
        now,
        mend="join it with the same settings, or choose another study name",
    )


def refuse_foreign_trials(study: optuna.Study) -> None:
    """Raise a `UsageError` if a study that nobody knows has values that may mean anything."""
    if _IDENTITY in study.user_attrs:
        return
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    foreign = [trial.number for trial in finished if "stop_reason" not in trial.user_attrs]
    if foreign:
        raise UsageError(
            f"the study {study.study_name!r} has values of another program, which would stand in "
            f"one ranking with these: choose another study_name, got trial {foreign[0]} without a "
            "stop_reason"
        )


def _take_folder(run: RunDirectory, trial: BaseTrial) -> None:
    """Note whose a trial's folder is.

    Raises:
        RunExistsError: If it holds a trial of another study, or one that is over.
    """
    ours = trial.user_attrs.get(RUN_DIRECTORY) == run.token and not isinstance(trial, FrozenTrial)
    if run.trial(trial.number).facts() and not ours:
        raise RunExistsError(
            f"{run.path} already holds a trial {trial.number}: give each study a RunDirectory of "
            "its own, and none to evaluate a finished trial again"
        )
    trial.set_user_attr(RUN_DIRECTORY, run.token)


def note_outcome(trial: BaseTrial, outcome: Outcome) -> None:
    """Set the user attributes that tell how a trial ended and what it measured."""
    trial.set_user_attr("stop_reason", outcome.stop_reason.value)
    trial.set_user_attr("metric", outcome.metric)
    trial.set_user_attr("mode", outcome.mode)
    for name in featured(outcome.metric):
        if outcome.metrics.get(name) is not None:
            trial.set_user_attr(name, outcome.metrics[name])


def check_directions(study: optuna.Study, direction: Direction) -> None:
    """Raise a `UsageError` unless the study has one value and looks in its direction."""
    if len(study.directions) != 1:
        raise UsageError(
            f"a trial has one value: create the study with direction={direction.optuna!r}, got "
            f"{len(study.directions)} directions"
        )
    if (found := direction_of_study(study)) is not direction:
        raise UsageError(
            f"with mode={direction.value!r} the study has to {direction.optuna}: create it with "
            f"direction={direction.optuna!r}, or give the metric of this study and "
            f"mode={found.value!r}, got a study named {study.study_name!r} that is to "
            f"{found.optuna}"
        )


def _reported(trial: BaseTrial, direction: Direction) -> dict[int, float]:
    """Return what the trial has reported already, empty for one that is not of a study."""
    if not isinstance(trial, optuna.Trial):
        return {}
    check_directions(trial.study, direction)
    return trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
