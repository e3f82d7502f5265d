"""An objective of IFT trials, for any Optuna study."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import BaseTrial, FrozenTrial

from ift_tune.base.direction import Direction
from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.errors import Interrupted, RunExistsError
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.objectives import Names, Objectives, paired
from ift_tune.base.status import StopReason
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.fidelity import OUTER_STEPS, require_comparable, used
from ift_tune.search.identity import join_study
from ift_tune.search.outcomes import check_directions, note_outcome, require_constraints
from ift_tune.search.plan import SearchPlan, TrialSource
from ift_tune.search.retry import RUN_DIRECTORY, take_over
from ift_tune.search.shared_study import name_metrics
from ift_tune.search.space import MetaSpace
from ift_tune.search.storage_faults import using_storage
from ift_tune.trial.best import keep_best
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.runner import halves_of_trial
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import Half, ProblemFactory, Trial, finished


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

    def __call__(self, trial: BaseTrial) -> float | tuple[float, ...]:
        """Run the trial; see `IFTObjective.__call__`."""
        return finished(self.halves(trial))

    def halves(
        self, trial: BaseTrial, on_made: Callable[[Trial], object] = lambda _: None
    ) -> Generator[Half, None, float | tuple[float, ...]]:
        """Run the trial likewise, by the halves of its steps.

        Args:
            trial: Optuna's.
            on_made: Called with what runs, before its first step.
        """
        if self._run is not None and isinstance(trial, optuna.Trial):
            take_over(self._run, trial)
        objectives = self._source.objectives
        last = max(_reported(trial, objectives), default=-1)
        space = self._source.space
        point = {} if space is None else space.suggest(trial)
        made = self._source.trial(point, trial.number)

        def should_prune(value: float, step: int) -> bool:
            nonlocal last
            if objectives.several:
                return False  # Optuna neither takes a report there nor prunes
            at = int(used(made, self._source.fidelity))
            if at < last:
                return False  # a resumed trial went on here the first time
            with using_storage():
                if at > last:
                    trial.report(value, at)
                    last = at
                return trial.should_prune()

        on_made(made)
        outcome = yield from halves_of_trial(
            made,
            trial.number,
            record=None if self._run is None else self._run.trial(trial.number),
            facts=self._facts | {"trial": trial.number},
            should_prune=should_prune,
            callbacks=self._callbacks,
            interrupt=self._interrupt,
        )
        if outcome.stop_reason is StopReason.INTERRUPTED:
            raise Interrupted(f"trial {trial.number} was interrupted and saved")
        with using_storage():
            note_outcome(trial, outcome, objectives)
        values: tuple[float, ...] = ()
        if outcome.stop_reason is StopReason.DONE and outcome.value is not None:
            values = objectives.values(outcome.value, outcome.metrics)
        if self._run is not None:
            keep_best(self._run, trial.number)
        if not values:
            raise optuna.TrialPruned(f"trial {trial.number} ended: {outcome.ending}")
        return values if objectives.several else values[0]


class IFTObjective:
    """An Optuna objective: one inner IFT optimisation at suggested meta-hyperparameters.

    Works in any study, whichever way it looks:
    ``study.optimize(IFTObjective(...), n_trials=20)`` with any sampler, pruner and storage, or with
    ask and tell. It reports every evaluation, prunes
    when the study's pruner says so or when the trial diverges, and sets small user attributes
    (`stop_reason`, test metrics, cost). With several metrics it returns a value for each, for a
    study with as many ``directions``, in which Optuna prunes nothing.

    The study keeps what it was begun with, and a `run` belongs
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
        metric: Names = None,
        mode: Names = None,
        constraints: Sequence[str] = (),
        fidelity: str = OUTER_STEPS,
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
            metric: The search metric that decides, see `Trial`; or a list of which the first
                decides within a trial, and the others are read off the trial at its end, as
                ``["search_error", "gradient_equivalents"]``.
            mode: ``"min"`` for a study that minimises, ``"max"`` for one that maximises; see
                `Trial`. Default: ``"max"`` if the study was created to maximise. For several
                metrics, one for each.
            constraints: Such as ``"alpha_lambda_max<=2"``, on what a trial has measured at its end;
                noted on the trial by ``trial.set_constraint``.
            fidelity: By what a pruner counts a trial's progress; see `run_study`.
            run: Where tables, checkpoints and found hyperparameters go; nothing is written without.
            facts: Further constant columns of the tables.
            callbacks: Hooks into the trials and the search; see `Callback`.
            interrupt: Looked at between outer steps.

        Raises:
            UsageError: If the corners of the space are no valid configurations, or metric, mode and
                constraints do not go together.
        """
        config = MetaConfig() if config is None else config
        self._stated = paired(metric, mode)
        self._checked = False
        # Which way a study looks may be said by the study itself, which comes with its trials.
        modes = [way or Direction.MIN.value for _, way in self._stated]
        trials = TrialPlan(
            problem_factory,
            budget,
            config,
            seed,
            device,
            metric,
            modes,
            callbacks,
            constraints,
        )
        require_constraints(trials.objectives)
        self._plan = SearchPlan(trials, space, fidelity)
        self._run, self._facts = run, dict(facts or {})
        self._callbacks, self._interrupt = callbacks, interrupt

    def __call__(self, trial: BaseTrial) -> float | tuple[float, ...]:
        """Run the trial.

        Returns:
            The trial's best value; of several metrics, one for each.

        Raises:
            optuna.TrialPruned: If the pruner stopped it, or it diverged, was not finite, or ran
                out of memory: then it has no value, and samplers count it as a bad point.
            Interrupted: If the user asked to stop; the trial is saved.
            UsageError: If the study's direction is not that of `mode`, the metric's name asks for a
                mode and neither gives one, the study has another number of objectives, trials do
                not measure a metric, or study or `run` were begun with other settings.
            RunExistsError: If `run` holds a trial of this number already, of another study.
        """
        modes = _stated_by_study(trial, self._stated)
        plan = replace(self._plan, trials=replace(self._plan.trials, mode=modes))
        identity = {"task": self._facts.get("task", "custom"), **plan.settings()}
        if isinstance(trial, optuna.Trial):
            check_directions(trial.study, plan.objectives)
            require_comparable(trial.study.pruner, plan.fidelity)
        if plan.objectives.read_at_the_end and not self._checked:
            plan.check(resolve_device(plan.trials.device))  # their lack would show at the end only
            self._checked = True
        if isinstance(trial, optuna.Trial):
            join_study(trial.study, identity)
            if plan.objectives.several:
                name_metrics(trial.study, plan.objectives.names)
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


def _stated_by_study(trial: BaseTrial, stated: Sequence[tuple[Any, Any]]) -> list[str | None]:
    """Return the modes of metrics; where none is given, a study that maximises says "max".

    To minimise is Optuna's default, and says nothing. Of an error or a loss, nothing is asked.
    """
    modes = [mode for _, mode in stated]
    if not isinstance(trial, optuna.Trial) or len(trial.study.directions) != len(modes):
        return modes
    ways = trial.study.directions
    return [
        Direction.MAX.value
        if mode is None and metric is not None and way is optuna.study.StudyDirection.MAXIMIZE
        else mode
        for (metric, mode), way in zip(stated, ways, strict=True)
    ]


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


def _reported(trial: BaseTrial, objectives: Objectives) -> dict[int, float]:
    """Return what the trial has reported already, empty for one that is not of a study."""
    if not isinstance(trial, optuna.Trial):
        return {}
    check_directions(trial.study, objectives)
    return trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values
