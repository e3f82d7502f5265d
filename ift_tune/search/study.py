"""A study of one's own: run_study, in one process or several, resumable, with tables."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import optuna
import pandas as pd
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.errors import UsageError
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.allocation import Allocation, allocate, cores, visible_gpus
from ift_tune.search.loop import StudyPlan
from ift_tune.search.plan import TrialPlan
from ift_tune.search.processes import check_importable, run_workers
from ift_tune.search.samplers import SamplerFactory, sampler_factory
from ift_tune.search.space import MetaSpace
from ift_tune.search.storage import check_shareable, storage_identity
from ift_tune.search.work import Worker
from ift_tune.trial.runner import Interrupt
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

OptunaCallback: TypeAlias = Callable[[optuna.Study, FrozenTrial], None]


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
    workers: int = 1,
    gpus_per_trial: float | None = None,
    callbacks: Sequence[Callback | OptunaCallback] = (),
) -> StudyResult:
    """Run an Optuna study of IFT trials, with tables in a run directory.

    The study is a normal one, kept by default in ``<out>/study.journal``. Sampling trial k depends
    on the seed, on k and on the trials before it alone, so a study that was killed and resumed
    makes the same suggestions as an undisturbed one. Several workers finish trials in an order
    that nobody repeats: what is sampled then depends on it, each trial by itself does not.

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
            Runs on other machines that name the same one join the study.
        study_name: Default: the run's id.
        resume: Go on with the run in `out`: a trial that was running goes on from its checkpoint.
        workers: Processes that run trials side by side. Each has its own GPU or part of one, or
            its share of the processor's cores; a trial whose process dies goes on from its
            checkpoint in another. A script that asks for several needs
            ``if __name__ == "__main__":``.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0. Default: what there is, divided.
        callbacks: Hooks into the trials and the search, see `Callback`; what is none is called
            with ``(study, frozen_trial)`` after each trial, in this process, as Optuna's own are.

    Returns:
        The study and both tables, which hold the trials of this run directory.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If a worker's process fails.
    """
    if n_trials < 1:
        raise UsageError(f"n_trials must be at least 1, got {n_trials}")
    hooks = [callback for callback in callbacks if isinstance(callback, Callback)]
    after_trial = [callback for callback in callbacks if not isinstance(callback, Callback)]
    trials = TrialPlan(
        problem_factory, space, budget, config or MetaConfig(), seed, device, metric, hooks
    )
    allocations = _allocations(workers, device, gpus_per_trial)
    sampler = sampler or sampler_factory("tpe")
    pruner = pruner or optuna.pruners.NopPruner()
    if allocations:
        check_shareable(storage)
        check_importable(trials, sampler, pruner, storage)
    settings = {
        "task": task,
        "backend": "optuna",
        "arm": arm,
        "pruner": type(pruner).__name__,
        **trials.settings(),
    }
    place = {"storage": storage_identity(storage), "study_name": study_name}
    where = resolve_device("cpu" if allocations else device)  # CUDA is left to the workers
    run = RunDirectory(out, resume=resume)
    run.check(settings | place)
    # Built once for nothing, so that missing data leaves a new directory empty.
    if not resume:
        problem_factory(trials.config, where, seed).validate()
    with run.held():
        run_id = run.begin(settings, environment(), place)
        plan = StudyPlan(
            trials,
            run.path,
            {"run_id": run_id, "task": task, "arm": arm},
            storage,
            study_name or run_id,
            sampler,
            pruner,
            n_trials,
        )
        study = plan.open(join=resume or storage is not None)

        def on_done(number: int) -> None:
            run.refresh_tables()
            for callback in after_trial:
                callback(study, study.get_trials(deepcopy=False)[number])

        session = Worker(uuid.uuid4().hex)
        interrupt = Interrupt()
        try:
            with interrupt.listening():
                if allocations:
                    run_workers(plan, session, allocations, hooks, interrupt, on_done)
                else:
                    plan.do(session, hooks, interrupt, on_done)
        finally:
            tables = run.write_tables()
    return StudyResult(study, *tables)


def _allocations(workers: int, device: str, gpus_per_trial: float | None) -> list[Allocation]:
    """Return what each worker may use; none if this process is the only one, with all there is."""
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    if workers == 1 and gpus_per_trial is None:
        return []
    return allocate(workers, device, gpus_per_trial, visible_gpus(), cores())
