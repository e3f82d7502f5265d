"""The command line's Tuner: a search with Ray Tune, with the same tables as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
import torch

from ift_tune.config import Budget, MetaConfig
from ift_tune.environment import environment
from ift_tune.errors import UsageError
from ift_tune.search.best import best_point, best_row
from ift_tune.search.facts import ending
from ift_tune.search.loop import StudyPlan
from ift_tune.search.plan import TrialPlan
from ift_tune.search.ray.cluster import check_room, connected, stopping_ray
from ift_tune.search.ray.experiments import Experiments
from ift_tune.search.ray.schedulers import PBT, make_scheduler
from ift_tune.search.ray.tables import listening
from ift_tune.search.runner import Listener
from ift_tune.search.sampling import SamplerFactory, sampler_factory
from ift_tune.search.space import MetaSpace
from ift_tune.search.storage import storage_identity
from ift_tune.search.trial import ProblemFactory
from ift_tune.tables import RunDirectory
from ift_tune.types import StopReason


class RayResult(NamedTuple):
    """What a search with Ray has come to.

    Attributes:
        study: The study behind the searcher; None under population based training.
        best: The best complete trial as plain values, None if there is none.
        trials: The table.
        steps: The other.
    """

    study: optuna.Study | None
    best: dict[str, Any] | None
    trials: pd.DataFrame
    steps: pd.DataFrame


def run_ray(
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
    scheduler: str = "none",
    storage: str | None = None,
    study_name: str | None = None,
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    resume: bool = False,
    listener: Listener | None = None,
) -> RayResult:
    """Search with Ray Tune, here or on a cluster, with tables in a run directory.

    Puts a ``tune.Tuner`` together from the parts that anyone can use: `ray_trainable`,
    `StudySearcher`, `recommended_run_config`, `TablesCallback`. Arguments that `run_study` has too
    mean the same here. Ray started here listens on all interfaces, unless
    ``ray_local.prepare(local=True)`` was called before Ray was imported, as the command line does.

    Args:
        problem_factory: ``factory(config, device, seed)``, importable on every node.
        space: What varies.
        budget: Length of each trial.
        n_trials: How many finished trials there shall be in `out` in the end.
        out: Run directory; on a cluster, on storage that all nodes reach under this path.
        task: Name in the tables.
        arm: Name in the tables.
        config: What does not vary.
        seed: Of the problem, of every trial and of the sampler.
        device: ``"auto"``: what Ray allots.
        metric: The search metric to minimise.
        sampler: Makes a sampler from a seed. Not used by PBT, which mutates a population drawn at
            random.
        scheduler: ``"none"``, ``"asha"``, ``"hyperband"`` or ``"pbt"``.
        storage: URL of the Optuna study's storage; default: a journal in `out`.
        study_name: Default: the run's id.
        address: Of a cluster; default: Ray is started on this machine, unless this process is
            connected already.
        cpus_per_trial: Cores, which are PyTorch's threads too.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0.
        resume: Go on with the run in `out`.
        listener: Told how trials go.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or no node can hold a trial.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If trials failed, after all their retries.
    """
    if n_trials < 1:
        raise UsageError(f"n_trials must be at least 1, got {n_trials}")
    if device == "cpu" and gpus_per_trial:
        raise UsageError("device cpu with GPUs per trial above 0: drop one of them")
    if device not in ("auto", "cpu") and not gpus_per_trial:
        raise UsageError(f"device {device} needs a GPU for each trial: --gpus-per-trial 1")
    listener = listener or Listener()
    trials = TrialPlan(problem_factory, space, budget, config or MetaConfig(), seed, device, metric)
    settings = {
        "task": task,
        "backend": "ray",
        "arm": arm,
        "scheduler": scheduler,
        **trials.settings(),
    }
    place = {"storage": storage_identity(storage), "study_name": study_name}
    make_scheduler(scheduler, space, budget)  # a wrong name is said before anything is written
    run = RunDirectory(out, resume=resume)
    run.check(settings | place)
    # Built once for nothing, so that missing data leaves a new directory empty. On a cluster, the
    # data may be on the nodes alone.
    if not resume and address is None:
        problem_factory(trials.config, torch.device("cpu"), seed).validate()
    with run.held(), connected(address), listening(run.path, listener):
        listener.announced(check_room(cpus_per_trial, gpus_per_trial))
        run_id = run.begin(settings, environment(), place)
        plan = StudyPlan(
            trials,
            run.path.resolve(),
            {"run_id": run_id, "task": task, "arm": arm},
            storage,
            study_name or run_id,
            sampler or sampler_factory("tpe"),
            optuna.pruners.NopPruner(),
            n_trials,
        )
        search = Experiments(
            plan, run, space, scheduler, {"cpu": cpus_per_trial, "gpu": gpus_per_trial}
        )
        try:
            with stopping_ray() as interrupt:
                search.finish(interrupt, restore=resume)
        finally:
            for record in run.records():
                if record.facts().get("status") == "running":
                    record.describe(record.facts() | ending(StopReason.INTERRUPTED))
            tables = run.write_tables()
        if scheduler == PBT:
            return RayResult(None, best_row(tables.trials, space, metric), *tables)
        study = plan.open(join=True)
    return RayResult(study, best_point(study), *tables)
