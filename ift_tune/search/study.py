"""A study of one's own: run_study, in one process or several, resumable, with tables."""

from __future__ import annotations

import copy
import functools
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import optuna
import pandas as pd
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from ift_tune.base.arguments import (
    require_flag,
    require_list,
    require_text,
    shown,
)
from ift_tune.base.cards import Card
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.identity import FACTORY
from ift_tune.base.objectives import Names
from ift_tune.base.spawning import check_importable
from ift_tune.joint.callbacks import Callback, RunFacts, during
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.analysis import best_point, front_of, without_result
from ift_tune.search.artifact import upload_best
from ift_tune.search.backends import Processes, processes_of
from ift_tune.search.fidelity import OUTER_STEPS, require_comparable
from ift_tune.search.foreign import refuse_foreign_pickles, refuse_foreign_storage
from ift_tune.search.loop import FINISHED, StudyPlan
from ift_tune.search.objective import SearchPlan
from ift_tune.search.outcomes import check_means
from ift_tune.search.packed import prepare_pack
from ift_tune.search.processes import run_workers
from ift_tune.search.queued import points_of
from ift_tune.search.samplers import (
    SamplerFactory,
    as_pruner,
    as_sampler_factory,
    sampler_factory,
)
from ift_tune.search.shared_study import SharedStudy
from ift_tune.search.space import MetaSpace
from ift_tune.search.storage_faults import using_storage
from ift_tune.search.work import (
    Worker,
    check_shareable,
    check_storage,
    former_identity,
    set_aside,
    storage_identity,
)
from ift_tune.trial.best import BestTrial
from ift_tune.trial.refit import train_baseline
from ift_tune.trial.runner import TrialPlan
from ift_tune.trial.session import Session
from ift_tune.trial.showing import card_of_tables
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

_log = logging.getLogger(__name__)

OptunaCallback: TypeAlias = Callable[[optuna.Study, FrozenTrial], None]


def hooks_of(callbacks: Sequence[Callback | OptunaCallback]) -> list[Callback]:
    """Return the callbacks of this package, without those of Optuna's kind.

    Raises:
        UsageError: If one is of neither kind.
    """
    for callback in require_list("callbacks", callbacks, "callbacks"):
        ours = isinstance(callback, type) and issubclass(callback, Callback)
        if ours or not (isinstance(callback, Callback) or callable(callback)):
            raise UsageError(
                "callbacks must be instances of ift_tune.Callback, or functions (study, trial), "
                f"got {shown(callback)}"
            )
    return [callback for callback in callbacks if isinstance(callback, Callback)]


class _Tables(NamedTuple):
    study: optuna.Study
    trials: pd.DataFrame
    steps: pd.DataFrame


class StudyResult(_Tables):
    """A study with its tables: ``study, trials, steps = result``.

    Shown in a notebook, or printed, it says how its trials ended and which is the best.
    """

    _home: tuple[RunDirectory, ProblemFactory, str] | None = None

    def at(self, run: RunDirectory, factory: ProblemFactory, device: str) -> StudyResult:
        """Return it with where the best model lies, and what it is loaded with."""
        self._home = (run, factory, device)
        return self

    @property
    def best(self) -> BestTrial | None:
        """The best complete trial of the study; None if there is none.

        It keeps all constraints; of several metrics it is the best by the first.
        It is a dictionary of plain values, and its ``model`` and ``hyper`` are the trained model
        and its λ, see `load_best`.
        """
        point = best_point(self.study)
        return None if point is None else BestTrial(point, self._home)

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front, a row a trial: its number, its metrics and what was searched."""
        return front_of(self.study)

    @property
    def failure(self) -> str | None:
        """Why there is no best trial, in a sentence; None if there is one."""
        return without_result(self.trials) if self.best is None else None

    def __repr__(self) -> str:
        return self._card().text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return self._card().html()

    def _card(self) -> Card:
        folder = None if self._home is None else self._home[0].path
        return card_of_tables(self.trials, self.steps, folder, self.best, self.failure)


@dataclass(frozen=True)
class SearchRequest:
    """What is searched and where it is kept, whatever runs the trials; see `run_study`.

    Attributes:
        plan: The trials.
        n_trials: How many shall be finished in the end.
        out: The run directory.
        task: Name in the tables.
        arm: Name of this way to choose hyperparameters in the tables.
        sampler: Makes the sampler of a trial.
        storage: Of the study.
        study_name: Its name. Default: the run's id.
        resume: Whether to go on with the run in `out`.
        callbacks: Hooks into the trials and the search.
        baseline: Whether to train plainly as well, beside the best trial.
        enqueue: Points that the first trials have, each with some of the space's keys.
        trust: Whether a study that others may have written is gone on with, see `run_study`.

    Raises:
        UsageError: If there shall be no trial, or an enqueued point is none of the space.
    """

    plan: SearchPlan
    n_trials: int
    out: str | Path
    task: str = "custom"
    arm: str = "ift+tpe"
    sampler: SamplerFactory = field(default_factory=functools.partial(sampler_factory, "tpe"))
    storage: str | BaseStorage | None = None
    study_name: str | None = None
    resume: bool = False
    callbacks: Sequence[Callback | OptunaCallback] = ()
    baseline: bool = False
    enqueue: Sequence[Mapping[str, Any]] = ()
    trust: bool = False

    def __post_init__(self) -> None:
        require_integer("n_trials", self.n_trials, 1)
        object.__setattr__(self, "n_trials", int(self.n_trials))
        require_text("task", self.task)
        require_text("arm", self.arm)
        require_flag("resume", self.resume)
        require_flag("baseline", self.baseline)
        require_flag("trust", self.trust)
        if self.study_name is not None:
            require_text("study_name", self.study_name)
        check_storage(self.storage)
        object.__setattr__(self, "enqueue", points_of(self.plan.space, self.enqueue))

    def session(self, backend: Mapping[str, Any]) -> Session:
        """Return the session of the run; nothing is written yet.

        Args:
            backend: Its name, and its settings that decide the numbers.
        """
        return Session(
            self.out,
            {"task": self.task, "arm": self.arm, **self.plan.settings(), **backend},
            resume=self.resume,
            place={"storage": storage_identity(self.storage), "study_name": self.study_name},
            formerly={"storage": former_identity(self.storage)},
            trust=self.trust,
        )

    def facts(self, session: Session, finished: int) -> RunFacts:
        """Return what callbacks are told of the search before its trials.

        Args:
            session: Its session.
            finished: Its finished trials so far.
        """
        varied = () if self.plan.space is None else tuple(self.plan.space.distributions)
        return RunFacts(
            session.run.path,
            self.task,
            self.plan.trials.budget,
            self.plan.objectives,
            self.n_trials,
            finished,
            varied,
        )

    def open_study(
        self, plan: StudyPlan, session: Session, *, join: bool, study_first: bool = False
    ) -> SharedStudy:
        """Return the study of a session that has begun, for the first time.

        Args:
            plan: Which study.
            session: It.
            join: Whether the study may be there.
            study_first: See `require_consistent`.

        Raises:
            UsageError: If it was begun with other settings, or others may have written it and a
                sampler would run what it holds.
        """
        study = plan.open(join=join)
        with using_storage():
            if self.storage is None:
                refuse_foreign_pickles(study, session.run.path, trusted=session.trusted)
            else:
                refuse_foreign_storage(study, self.storage, trusted=self.trust)
        plan.go_on(study, study_first=study_first)
        return study

    def study_plan(self, session: Session, pruner: optuna.pruners.BasePruner) -> StudyPlan:
        """Return the study of a session that has begun."""
        set_aside(self.storage)  # for a searcher of Ray's that is restored from a file
        return StudyPlan(
            self.plan,
            self.plan.trials.seed,
            session.run.path.resolve(),
            {"run_id": session.run_id, "task": self.task, "arm": self.arm},
            self.storage,
            self.study_name or session.run_id,
            self.sampler,
            pruner,
            self.n_trials,
            {"task": self.task, **self._identity()},
        )

    def _identity(self) -> dict[str, Any]:
        settings = self.plan.settings()
        if self.resume:  # of its own trials, whose factory may have been corrected
            del settings[FACTORY]
        return settings


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
        pruner: ``"none"``, ``"median"``, ``"hyperband"`` or ``"asha"``, or a pruner of Optuna's.
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
            class or several. Default: the first exception ends the study.
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
