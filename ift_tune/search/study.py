"""A study of one's own: run_study, resumable, with tables in a run directory."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from ift_tune.config import Budget, MetaConfig
from ift_tune.devices import resolve_device
from ift_tune.environment import environment
from ift_tune.errors import UsageError
from ift_tune.search.optuna import IFTObjective, check_directions
from ift_tune.search.runner import Interrupt, Interrupted, Listener
from ift_tune.search.sampling import PerTrialSampler, SamplerFactory, sampler_factory
from ift_tune.search.space import MetaSpace
from ift_tune.search.trial import ProblemFactory
from ift_tune.tables import RunDirectory

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


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
    pruner = pruner or optuna.pruners.NopPruner()
    settings = {
        "task": task,
        "backend": "optuna",
        "arm": arm,
        "pruner": type(pruner).__name__,
        "seed": seed,
        "space": space.to_json(),
        "config": config.to_flat(),
        "budget": asdict(budget),
        "metric": metric,
    }
    place = {"storage": _name(storage), "study_name": study_name}
    space.check(config)
    where = resolve_device(device)
    run = RunDirectory(out, resume=resume)
    run.check(settings | place)
    # Built once for nothing, so that missing data leaves a new directory empty.
    if not resume:
        problem_factory(config, where, seed).validate()
    opened = open_storage(storage, run)
    run_id = run.begin(settings, environment(), place)
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
        storage=opened,
        study_name=study_name or run_id,
        sampler=PerTrialSampler(sampler or sampler_factory("tpe"), seed),
        pruner=pruner,
        direction="minimize",
        load_if_exists=resume or storage is not None,
    )
    check_directions(study)
    with interrupt.listening():
        loop = _Loop(study, objective, run, callbacks)
        if resume:
            loop.go_on(alone=storage is None)
        loop.run(n_trials, interrupt)
    return StudyResult(study, *run.write_tables())


class _Loop:
    """Ask, run, tell, until the study has its trials."""

    def __init__(
        self,
        study: optuna.Study,
        objective: IFTObjective,
        run: RunDirectory,
        callbacks: Sequence[Callable[[optuna.Study, FrozenTrial], None]],
    ) -> None:
        self._study, self._objective, self._run = study, objective, run
        self._callbacks = callbacks
        self._written, self._writing = 0.0, 0.0

    def go_on(self, *, alone: bool) -> None:
        """Go on with the trials that a killed process left running in this run directory.

        Where the study is this run's `alone`, that includes one killed before it was marked.
        """
        unmarked = self._run.token if alone else None
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.user_attrs.get("run_directory", unmarked) == self._run.token:
                # Optuna has no public way to take up a running trial; its ask() does it like this.
                self._one(optuna.Trial(self._study, frozen._trial_id))

    def run(self, n_trials: int, interrupt: Interrupt) -> None:
        """Start new trials until so many are finished."""
        while len(self._study.get_trials(deepcopy=False, states=FINISHED)) < n_trials:
            if interrupt.requested:
                raise Interrupted("interrupted between trials")
            trial = self._study.ask()
            trial.set_user_attr("run_directory", self._run.token)
            self._one(trial)

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


def open_storage(storage: str | BaseStorage | None, run: RunDirectory) -> BaseStorage:
    """Return an opened storage: by default a journal in the run directory.

    Raises:
        UsageError: If a URL cannot be opened.
    """
    if isinstance(storage, BaseStorage):
        return storage
    if storage is None:
        path = run.path / "study.journal"
        # This process alone writes to it, so a lock can only be left from a killed one; Optuna
        # would wait half a minute for it.
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        return JournalStorage(JournalFileBackend(str(path)))
    try:
        if storage.startswith("journal://"):
            return JournalStorage(JournalFileBackend(storage.removeprefix("journal://")))
        return optuna.storages.get_storage(storage)
    except (SQLAlchemyError, ImportError, OSError) as error:
        raise UsageError(
            f"the storage {storage} cannot be opened ({str(error).splitlines()[0]}): give "
            "sqlite:///FILE.db, journal:///DIR/FILE in a folder that exists, or a database's URL"
        ) from error


def _name(storage: str | BaseStorage | None) -> str | None:
    """Return what tells one storage from another, without the password a URL may hold."""
    if isinstance(storage, str):
        return hashlib.sha256(storage.encode()).hexdigest()[:16]
    return None if storage is None else type(storage).__name__


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
