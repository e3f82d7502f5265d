"""The outer search with Optuna: an objective for any study, and a study of one's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import optuna
import pandas as pd
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ift_tune.config import Budget, MetaConfig
from ift_tune.environment import environment
from ift_tune.errors import UsageError, nearest
from ift_tune.randomness import derive_seed
from ift_tune.search.runner import Interrupt, Interrupted, Listener, run_trial
from ift_tune.search.space import MetaSpace
from ift_tune.search.trial import ProblemFactory, Trial
from ift_tune.tables import RunDirectory
from ift_tune.types import StopReason

SamplerFactory: TypeAlias = Callable[[int], optuna.samplers.BaseSampler]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_FEATURED = (
    "search_error",
    "search_loss",
    "test_error",
    "test_loss",
    "retrained_test_error",
    "gradient_equivalents",
    "hvps",
    "wall_seconds",
)


class IFTObjective:
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
        listener: Listener | None = None,
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
            listener: Told how trials go.
            interrupt: Looked at between outer steps.

        Raises:
            UsageError: If the corners of the space are no valid configurations.
        """
        self._factory, self._space, self._budget = problem_factory, space, budget
        self._config = MetaConfig() if config is None else config
        space.check(self._config)
        self._seed, self._device, self._metric = seed, device, metric
        self._run, self._facts = run, facts or {}
        self._listener, self._interrupt = listener, interrupt

    def __call__(self, trial: optuna.Trial) -> float:
        """Run the trial.

        Returns:
            The search metric after the last outer step.

        Raises:
            optuna.TrialPruned: If the pruner stopped it, or it diverged, was not finite, or ran
                out of memory: then it has no value, and samplers count it as a bad point.
            Interrupted: If the user asked to stop; the trial is saved.
            UsageError: If the study maximises or has several objectives.
        """
        _check_directions(trial.study)
        config = self._config.updated(self._space.suggest(trial))
        reported = set(_frozen(trial).intermediate_values)

        def should_prune(value: float, step: int) -> bool:
            if step not in reported:  # a resumed trial passes steps it has reported already
                trial.report(value, step)
            return trial.should_prune()

        outcome = run_trial(
            Trial(
                self._factory,
                config,
                self._budget,
                seed=self._seed,
                device=self._device,
                metric=self._metric,
            ),
            trial.number,
            record=None if self._run is None else self._run.trial(trial.number),
            facts=self._facts | {"trial": trial.number},
            should_prune=should_prune,
            listener=self._listener,
            interrupt=self._interrupt,
        )
        if outcome.stop_reason is StopReason.INTERRUPTED:
            raise Interrupted(f"trial {trial.number} was interrupted and saved")
        trial.set_user_attr("stop_reason", outcome.stop_reason.value)
        trial.set_user_attr("metric", outcome.metric)
        for name in _FEATURED:
            if name in outcome.metrics:
                trial.set_user_attr(name, outcome.metrics[name])
        if outcome.stop_reason is not StopReason.DONE or outcome.value is None:
            raise optuna.TrialPruned(f"trial {trial.number} ended: {outcome.stop_reason.value}")
        return outcome.value


class StudyResult(NamedTuple):
    """A study with its tables."""

    study: optuna.Study
    trials: pd.DataFrame
    steps: pd.DataFrame


def run_study(
    problem_factory: ProblemFactory,
    space: MetaSpace,
    budget: Budget,
    *,
    n_trials: int,
    out: str | Path,
    task: str = "custom",
    arm: str = "ift+tpe",
    config: MetaConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    metric: str | None = None,
    sampler: SamplerFactory | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    resume: bool = False,
    callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]] = (),
    listener: Listener | None = None,
) -> StudyResult:
    """Run an Optuna study of IFT trials in this process, with tables in a run directory.

    The study is a normal one, kept by default in ``<out>/study.journal``. Sampling trial k depends
    on the seed, on k and on the trials before it alone, so a study that was killed and resumed
    makes the same suggestions as an undisturbed one.

    Args:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        space: What varies.
        budget: Length of each trial.
        n_trials: How many finished (complete or pruned) trials the study shall have in the end.
        out: Run directory; refused if it holds anything, unless `resume`.
        task: Name in the tables.
        arm: Name of this way to choose hyperparameters in the tables.
        config: What does not vary. Default: ``MetaConfig()``.
        seed: Of the problem, of every trial and of the sampler.
        device: Where trials run.
        metric: The search metric to minimise; see `Trial`.
        sampler: Makes a sampler from a seed; called anew for each trial. Default: TPE.
        pruner: Default: none is pruned (``NopPruner``).
        storage: An Optuna storage, or its URL (``sqlite:///study.db``, ``journal:///dir/file``).
        study_name: Default: the run's id.
        resume: Go on with the run in `out`: a trial that was running goes on from its checkpoint.
        callbacks: Called with ``(study, frozen_trial)`` after each trial.
        listener: Told how trials go.

    Returns:
        The study and both tables.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False.
        UsageError: If an argument is wrong, or `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
    """
    if n_trials < 1:
        raise UsageError(f"n_trials must be at least 1, got {n_trials}")
    config = MetaConfig() if config is None else config
    settings = {
        "task": task,
        "backend": "optuna",
        "seed": seed,
        "space": space.to_json(),
        "config": config.to_flat(),
        "budget": asdict(budget),
        "metric": metric,
    }
    space.check(config)
    run = RunDirectory(out, resume=resume)
    run_id = run.begin(settings, environment())
    interrupt = Interrupt()
    objective = IFTObjective(
        problem_factory,
        space,
        budget,
        config=config,
        seed=seed,
        device=device,
        metric=metric,
        run=run,
        facts={"run_id": run_id, "task": task, "arm": arm},
        listener=listener,
        interrupt=interrupt,
    )
    study = optuna.create_study(
        storage=open_storage(storage, run),
        study_name=study_name or run_id,
        sampler=optuna.samplers.RandomSampler(),
        pruner=pruner or optuna.pruners.NopPruner(),
        direction="minimize",
        load_if_exists=resume or storage is not None,
    )
    _check_directions(study)
    make_sampler = sampler or sampler_factory("tpe")
    with interrupt.listening():
        _Loop(study, objective, run, run_id, seed, make_sampler, callbacks).run(n_trials, interrupt)
    return StudyResult(study, *run.write_tables())


class _Loop:
    """Ask, run, tell, until the study has its trials."""

    def __init__(
        self,
        study: optuna.Study,
        objective: IFTObjective,
        run: RunDirectory,
        owner: str,
        seed: int,
        make_sampler: SamplerFactory,
        callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
    ) -> None:
        self._study, self._objective, self._run = study, objective, run
        self._owner, self._seed, self._make_sampler = owner, seed, make_sampler
        self._callbacks = callbacks
        self._written, self._writing = 0.0, 0.0

    def run(self, n_trials: int, interrupt: Interrupt) -> None:
        """Go on with trials a killed run left, then start new ones."""
        left = [
            t
            for t in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if t.user_attrs.get("owner", self._owner) == self._owner
        ]
        for frozen in left:
            self._reseed(frozen.number)
            # Optuna has no public way to take up a running trial; this is how its own ask() does.
            self._one(optuna.Trial(self._study, frozen._trial_id))
        while len(self._study.get_trials(deepcopy=False, states=FINISHED)) < n_trials:
            if interrupt.requested:
                raise Interrupted("interrupted between trials")
            self._reseed(len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask()
            trial.set_user_attr("owner", self._owner)
            self._one(trial)

    def _reseed(self, number: int) -> None:
        self._study.sampler = self._make_sampler(derive_seed(self._seed, "sampler", number))

    def _one(self, trial: optuna.Trial) -> None:
        try:
            value = self._objective(trial)
        except optuna.TrialPruned:
            frozen = self._study.tell(trial, state=TrialState.PRUNED)
        except Interrupted:
            self._run.write_tables()
            raise
        except Exception:
            self._study.tell(trial, state=TrialState.FAIL)
            self._run.write_tables()
            raise
        else:
            frozen = self._study.tell(trial, value)
        self._write_tables()
        for callback in self._callbacks:
            callback(self._study, frozen)

    def _write_tables(self) -> None:
        """Refresh the tables, unless that would take more than a twentieth of the time."""
        now = time.monotonic()
        if now - self._written >= 20.0 * self._writing:
            self._run.write_tables()
            self._written = time.monotonic()
            self._writing = self._written - now


def open_storage(storage: str | BaseStorage | None, run: RunDirectory) -> str | BaseStorage:
    """Return what `create_study` takes: a journal in the run directory by default."""
    if storage is None:
        return JournalStorage(JournalFileBackend(str(run.path / "study.journal")))
    if isinstance(storage, str) and storage.startswith("journal://"):
        return JournalStorage(JournalFileBackend(storage.removeprefix("journal://")))
    return storage


def _check_directions(study: optuna.Study) -> None:
    if study.directions != [optuna.study.StudyDirection.MINIMIZE]:
        raise UsageError(
            "search metrics are losses and errors, one of which is minimised: create the study "
            "with direction='minimize'"
        )


def _frozen(trial: optuna.Trial) -> FrozenTrial:
    return trial.study.get_trials(deepcopy=False)[trial.number]


def quiet_optuna() -> None:
    """Let Optuna log warnings only: for programs that show the progress themselves."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def best_point(study: optuna.Study) -> dict[str, Any] | None:
    """Return the best complete trial as plain values, the earliest among equals, or None."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return None
    best = min(complete, key=lambda t: (t.value, t.number))
    return {"trial": best.number, "value": best.value, "params": best.params, **best.user_attrs}


def sampler_factory(name: str) -> SamplerFactory:
    """Return what makes the sampler called ``"tpe"`` or ``"random"`` from a seed.

    Raises:
        UsageError: If the name is another.
    """
    if name not in _SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}{nearest(name, _SAMPLERS)}")
    return _SAMPLERS[name]


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """Return the pruner called ``"none"``, ``"median"`` or ``"hyperband"``.

    Raises:
        UsageError: If the name is another.
    """
    if name not in _PRUNERS:
        raise UsageError(f"unknown pruner {name!r}{nearest(name, _PRUNERS)}")
    return _PRUNERS[name]()


_SAMPLERS: dict[str, SamplerFactory] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
_PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}
