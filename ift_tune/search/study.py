"""A study of one's own: run_study, in one process or several, resumable, with tables."""

from __future__ import annotations

import copy
import functools
import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage

from ift_tune.base.environment import resolve_device
from ift_tune.base.objectives import Names
from ift_tune.base.spawning import check_importable
from ift_tune.joint.callbacks import Callback, during
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.artifact import upload_best
from ift_tune.search.backends import Processes, processes_of
from ift_tune.search.fidelity import OUTER_STEPS, require_comparable
from ift_tune.search.loop import FINISHED
from ift_tune.search.outcomes import check_means
from ift_tune.search.packed import prepare_pack
from ift_tune.search.plan import SearchPlan
from ift_tune.search.processes import run_workers
from ift_tune.search.pruners import as_pruner
from ift_tune.search.request import OptunaCallback, SearchRequest, hooks_of
from ift_tune.search.result import StudyResult
from ift_tune.search.samplers import SamplerFactory, as_sampler_factory
from ift_tune.search.space import MetaSpace
from ift_tune.search.work import Worker, check_shareable
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.refit import train_baseline
from ift_tune.trial.trial import ProblemFactory

_log = logging.getLogger(__name__)


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
    metric: Names = None,
    mode: Names = None,
    constraints: Sequence[str] = (),
    fidelity: str = OUTER_STEPS,
    sampler: str | BaseSampler | SamplerFactory | None = None,
    pruner: str | optuna.pruners.BasePruner | None = None,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    resume: bool = False,
    workers: int = 1,
    gpus_per_trial: float | None = None,
    processes_per_trial: int | None = None,
    baseline: bool = False,
    callbacks: Sequence[Callback | OptunaCallback] = (),
    timeout: float | None = None,
    catch: type[Exception] | Sequence[type[Exception]] = (),
    enqueue: Sequence[Mapping[str, Any]] = (),
    trust: bool = False,
    pack: int = 1,
) -> StudyResult:
    """Run an Optuna study of IFT trials, with tables in a run directory.

    The study is an ordinary one, run by `optuna.Study.optimize` and kept by default in
    ``<out>/study.journal``: ``study.stop()``, by a callback or by the sampler, ends it after the
    trials at work, and a storage with a heartbeat has its dead trials retried, from their
    checkpoints. Sampling trial k depends on the seed, on k and on the trials before it alone, so a
    study that was killed and resumed makes the same suggestions as an undisturbed one (but see
    `sampler`). Several workers finish trials in an order that nobody repeats: what is sampled then
    depends on it, each trial by itself does not.

    Args:
        problem_factory: ``factory(config, device, seed)``, as `Trial` takes it.
        space: What varies.
        budget: Length of each trial.
        n_trials: How many finished trials the study shall have in the end: complete, pruned, or
            failed by an exception in `catch`.
        out: Run directory; refused if it holds anything, unless `resume`.
        task: Name in the tables.
        arm: Name of this way to choose hyperparameters in the tables.
        config: What does not vary. Default: ``MetaConfig()``.
        seed: Of the problem, of every trial and of the sampler.
        device: Where trials run.
        metric: The search metric that decides, see `Trial`; or a list, such as
            ``["search_error", "gradient_equivalents"]``, for a study of several objectives. The
            first decides within a trial; the others, any column of the table `trials` that is not
            of the test split, are read off it at its end.
        mode: ``"min"`` or ``"max"``: the direction of the metric and of the study, see `Trial`; for
            several metrics, one for each.
        constraints: Such as ``"alpha_lambda_max<=2"``, on any such column: only a trial that keeps
            them all can be the best, or on the front. What was not measured is not kept.
        fidelity: By what the pruner counts a trial's progress: ``"outer_steps"``,
            ``"inner_steps"``, ``"hvps"`` (Hessian-vector products, so terms count) or
            ``"gradient_equivalents"`` (the counted cost). It is the step of each reported value, a
            whole number; of values at the same number the first is reported.
        sampler: A name (``"tpe"``, ``"random"``, ``"gp"``, ``"cmaes"``, ``"qmc"``, ``"nsgaii"``,
            ``"nsgaiii"``, ``"grid"``, ``"bruteforce"``), a sampler of Optuna's, or a function:
            then ``sampler(seed, trial_number)`` makes the sampler of a trial, see
            `samplers.SamplerFactory`. Of a sampler object of Optuna's own classes each trial has a
            copy, with random numbers that depend on the sampler's own seed, on `seed` and on the
            trial's number. One of another class is seeded likewise for each trial and used as it
            is, one in each process: what it remembers ends with the process, and is not resumed.
            Default: TPE.
        pruner: ``"none"``, ``"median"``, ``"hyperband"`` or ``"asha"``, or a pruner of Optuna's,
            whose ``"auto"`` is the most that `budget` allows.
            Default: none is pruned.
        storage: An Optuna storage, or its URL (``sqlite:///study.db``, ``journal:///dir/file``).
            Runs on other machines that name the same one join the study, which compares task,
            factory, seed, space, budget, metric and configuration with those it was begun with.
        study_name: Default: the run's id.
        resume: Go on with the run in `out`: a trial that was running goes on from its checkpoint.
        workers: Processes that run trials side by side. Each has its own GPU or part of one, or
            its share of the processor's cores; a trial whose process dies goes on from its
            checkpoint in another. A script that asks for several needs
            ``if __name__ == "__main__":``.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0; or several, each with a process of
            its own that shares the trial. Default: what there is, divided.
        processes_per_trial: How many processes share each trial, on a GPU each or on the cores of
            its worker; see `run_single`. Default: one for each of several `gpus_per_trial`, else 1.
        baseline: Whether to train plainly as well, with the best trial's settings and λ as the
            factory sets it: what that scores are the columns ``baseline_...`` of the tables.
        callbacks: Hooks into the trials and the search, see `Callback`; what is none is called
            with ``(study, frozen_trial)`` after each trial, in this process, as Optuna's own are;
            the worker that ran the trial waits for them.
        timeout: Seconds after which no further trial begins; those at work come to their end.
        catch: Exceptions of the problem after which a trial has failed and the others go on; one
            class or several. Any other ends the study, and `resume` tries its trial again, at its
            point: its tables say ``failed``, and in the study it is still open. Default: none.
        enqueue: Points that are tried first, such as ``[{"terms": 3}]``; what a point leaves out
            is sampled. Trials enqueued in a storage of your own before the call come first too.
        trust: Whether to go on with, or to join, a study that holds pickles (CMA-ES keeps its state
            so) and was not begun by this user at this place; see docs/trust.md.
        pack: How many trials of a process advance together, stacked into one: for small problems,
            and 16 or more at once. Each trial has the numbers, records and checkpoints that it has
            by itself, so that a run can be resumed with another `pack`. docs/cluster.md has what
            that gains, and what cannot be packed, which is refused.

    Returns:
        The study and both tables, which hold the trials of this run directory. Where no trial
        came to its end with a finite value, its `failure` says so, and a warning is logged.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or a run is resumed or a study joined with other
            settings than it was begun with.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If a worker's process fails.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, run_study, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> study, trials, steps = run_study(
        ...     problem, space, Budget(outer_steps=3), n_trials=2, out="runs/mine", device="cpu"
        ... )
        >>> trials[["trial", "status"]].to_dict("records")
        [{'trial': 0, 'status': 'complete'}, {'trial': 1, 'status': 'complete'}]
        >>> bool(study.best_value == trials["search_loss"].min())
        True
    """
    hooks = hooks_of(callbacks)
    config = config or MetaConfig()
    processes = processes_of(processes_per_trial, gpus_per_trial)
    trials = TrialPlan(
        problem_factory,
        budget,
        config,
        seed,
        device,
        metric,
        mode,
        hooks,
        constraints,
        processes,
    )
    request = SearchRequest(
        SearchPlan(trials, space, fidelity),
        n_trials,
        out,
        task,
        arm,
        as_sampler_factory(sampler, space),
        storage,
        study_name,
        resume,
        callbacks,
        baseline,
        enqueue,
        trust,
    )
    backend = Processes(workers, gpus_per_trial, pruner, timeout, catch, pack)
    result = search_in_processes(request, backend)
    if result.failure is not None:
        _log.warning(result.failure)
    return result


def search_in_processes(request: SearchRequest, backend: Processes) -> StudyResult:
    """Run a study in this process or in several; see `run_study`."""
    hooks = hooks_of(request.callbacks)
    trials, pruner = request.plan.trials, as_pruner(backend.pruner)
    make_sampler = functools.partial(request.sampler, trials.seed, 0)
    check_means(trials.objectives, make_sampler, pruner, request.plan.space)
    require_comparable(pruner, request.plan.fidelity)
    allocations = backend.allocations(trials.device, trials.processes)
    if allocations:
        check_shareable(request.storage)
        check_importable(request.plan, request.sampler, pruner, request.storage, backend.caught)
    where = resolve_device("cpu" if allocations else trials.device)  # CUDA is left to the workers
    session = request.session({"backend": "optuna", "pruner": type(pruner).__name__})
    after_trial = [call for call in request.callbacks if not isinstance(call, Callback)]
    if backend.pack > 1:
        beats = getattr(request.storage, "get_heartbeat_interval", lambda: None)() is not None
        prepare_pack(trials, request.plan.space, backend.pack, where, heartbeat=beats)
    with session.writing(None if request.resume else lambda: request.plan.check(where)):
        deadline = None if backend.timeout is None else time.time() + backend.timeout
        plan = replace(
            request.study_plan(session, pruner),
            catch=backend.caught,
            deadline=deadline,
            pack=backend.pack,
        )
        join = request.resume or request.storage is not None
        study = request.open_study(plan, session, join=join)
        for point in request.enqueue:
            study.enqueue_trial(dict(point), skip_if_exists=True)
        worker, interrupt = Worker(uuid.uuid4().hex), session.interrupt
        study.session = worker.session  # which a callback may stop

        def on_done(number: int) -> None:
            session.run.refresh_tables()
            for call in after_trial:
                call(study, copy.deepcopy(study.get_trials(deepcopy=False)[number]))

        finished = len(study.get_trials(deepcopy=False, states=FINISHED))
        with during(hooks, request.facts(session, finished)):
            try:
                if allocations:
                    run_workers(plan, worker, allocations, hooks, interrupt, on_done)
                else:
                    plan.do(worker, hooks, interrupt, on_done)
            finally:
                study.left()
            upload_best(study, session.run)
            if request.baseline:
                train_baseline(
                    session.run,
                    trials.problem_factory,
                    trials.device,
                    hooks,
                    interrupt,
                    processes=trials.processes,
                )
    return StudyResult(study, *session.tables).at(
        session.run, trials.problem_factory, trials.device
    )
