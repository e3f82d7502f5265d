"""run_ray: a search with Ray Tune, with the same tables as any other."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
import torch
from optuna.samplers import BaseSampler
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from ift_tune.base.cards import Card
from ift_tune.base.errors import IFTTuneError, Interrupted, UsageError, WorkerError
from ift_tune.base.faults import surroundings
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.objectives import Names
from ift_tune.base.status import StopReason, TrialStatus, ending
from ift_tune.joint.callbacks import Callback, CallbackList, during
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.search.analysis import best_point, best_row, front_of, without_result
from ift_tune.search.backends import PBT, RayTune, refuse_several_processes
from ift_tune.search.fidelity import OUTER_STEPS
from ift_tune.search.loop import StudyPlan
from ift_tune.search.outcomes import check_means
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray.cluster import check_room, connected, stopping_ray
from ift_tune.search.ray.points import NUMBER
from ift_tune.search.ray.population import OVER, Population, generator
from ift_tune.search.ray.resuming import next_experiment
from ift_tune.search.ray.searcher import StudySearcher
from ift_tune.search.ray.session import LATEST, OBJECTIVE
from ift_tune.search.ray.settings import iterations, make_scheduler, recommended_run_config
from ift_tune.search.ray.tables import TablesCallback, calling
from ift_tune.search.ray.trainable import ErrorReportingTrainable, IFTTrainable, StopOnError, bound
from ift_tune.search.request import SearchRequest, hooks_of
from ift_tune.search.samplers import SamplerFactory, as_sampler_factory
from ift_tune.search.space import MetaSpace, Space
from ift_tune.trial.best import BestTrial
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.record import folder_name
from ift_tune.trial.refit import train_baseline
from ift_tune.trial.showing import card_of_tables
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import ProblemFactory

_log = logging.getLogger(__name__)


class Experiments:
    """As many of Ray's experiments, one after the other, as it takes to have all trials."""

    def __init__(
        self,
        study: StudyPlan,
        plan: SearchPlan,
        space: Space,
        run: RunDirectory,
        backend: RayTune,
    ) -> None:
        self._study, self._run, self._backend = study, run, backend
        self._plan, self._trials, self._space = plan, plan.trials, space
        self._population = backend.scheduler == PBT
        length = iterations(plan.trials.budget) if self._population else 0
        kind = bound(ErrorReportingTrainable, plan, length)
        resources = {"cpu": backend.cpus_per_trial, "gpu": backend.gpus_per_trial}
        self._trainable: type[IFTTrainable] = tune.with_resources(kind, resources)

    def finish(self, interrupt: Interrupt) -> None:
        """Run until `n_trials` are finished: usually one experiment."""
        while (missing := self._study.n_trials - self.finished()) > 0:
            if interrupt.requested:
                raise Interrupted("interrupted between experiments")
            before = self.finished()
            results = _fit(self._new(missing))
            if interrupt.requested:
                raise Interrupted("interrupted and saved: go on by the same call with resume=True")
            if results.errors:
                raise WorkerError(
                    f"the processes of {results.num_errors} trials died too often; --resume tries "
                    f"others in their place. The first with:\n{results.errors[0]}"
                )
            if self.finished() == before:
                raise WorkerError(f"no trial was finished; Ray's logs are in {self._run.path}")

    def finished(self) -> int:
        """Return how many trials the tables have, and the study too, if there is one."""
        over = [r.number for r in self._run.records() if r.facts().get("status") in OVER]
        running = set() if self._population else StudySearcher(self._study, self._space).running()
        return sum(number not in running for number in over)

    def _new(self, n_trials: int) -> tune.Tuner:
        """Return a tuner of so many trials; those that are not finished go on."""
        trials, space, facts = self._trials, self._space, self._study.facts
        param_space: dict[str, Any] | None = None
        searcher = StudySearcher(self._study, space)
        search: Searcher | BasicVariantGenerator = searcher
        tables = TablesCallback("..", task=facts["task"], arm=facts["arm"], run_id=facts["run_id"])
        if self._population:
            size, seed = self._study.n_trials, trials.seed
            param_space, search = generator(Population(self._run, space, size, seed).members())
        return tune.Tuner(
            self._trainable,
            param_space=param_space,
            tune_config=tune.TuneConfig(
                metric=LATEST if self._population else OBJECTIVE,
                mode=trials.direction.value,
                num_samples=n_trials,
                search_alg=search,
                scheduler=make_scheduler(self._backend.scheduler, self._plan),
                trial_dirname_creator=_directory_of,
                # Starting a process and importing PyTorch takes seconds; on a GPU, a process of
                # its own for each trial is what frees all memory.
                reuse_actors=not self._backend.gpus_per_trial,
            ),
            run_config=recommended_run_config(
                self._run.path,
                next_experiment(self._run.path),
                tables=tables,
                checkpoints_kept=4 if self._population else 2,
                callbacks=[StopOnError([searcher, tables]), JsonLoggerCallback()],
                verbose=0,
            ),
        )


def _fit(tuner: tune.Tuner) -> tune.ResultGrid:
    """Run to the end; what a callback raised is raised as it was, not in Ray's wrapping."""
    with surroundings("the search"):
        return _unwrapped(tuner)


def _unwrapped(tuner: tune.Tuner) -> tune.ResultGrid:
    try:
        return tuner.fit()
    except tune.TuneError as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, IFTTuneError):
            inner = inner.__cause__ or inner.__context__
        if inner is None:
            raise
        raise inner from None


def _directory_of(trial: Any) -> str:
    """Name a trial's folder in Ray's experiment as its record is named, by which it is found."""
    return folder_name(trial.config[NUMBER])


class _Tables(NamedTuple):
    study: optuna.Study | None
    best: BestTrial | None
    trials: pd.DataFrame
    steps: pd.DataFrame


class RayResult(_Tables):
    """What a search with Ray has come to: ``study, best, trials, steps = result``.

    Shown in a notebook, or printed, it says how its trials ended and which is the best.

    Attributes:
        study: The study behind the searcher; None under population based training.
        best: The best complete trial as plain values, None if there is none; its ``model`` and
            ``hyper`` are the trained model and its λ.
        trials: The table.
        steps: The other.
    """

    _folder: Path | None = None

    def of(self, folder: Path) -> RayResult:
        """Return it with its run directory."""
        self._folder = folder
        return self

    @property
    def front(self) -> pd.DataFrame | None:
        """The Pareto front, see `StudyResult`; None under population based training."""
        return None if self.study is None else front_of(self.study)

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
        return card_of_tables(self.trials, self.steps, self._folder, self.best, self.failure)


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
    metric: Names = None,
    mode: Names = None,
    constraints: Sequence[str] = (),
    fidelity: str = OUTER_STEPS,
    sampler: str | BaseSampler | SamplerFactory | None = None,
    scheduler: str = "none",
    storage: str | None = None,
    study_name: str | None = None,
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    gpus_per_trial: float = 0.0,
    resume: bool = False,
    baseline: bool = False,
    callbacks: Sequence[Callback] = (),
    trust: bool = False,
) -> RayResult:
    """Search with Ray Tune, here or on a cluster, with tables in a run directory.

    Puts a ``tune.Tuner`` together from the parts that anyone can use: `ray_trainable`,
    `StudySearcher`, `recommended_run_config`, `TablesCallback`. Arguments that `run_study` has too
    mean the same here. Ray started here listens on all interfaces, unless
    ``search.backends.prepare_ray(local=True)`` was called before Ray was imported, as the command
    line does.

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
        metric: The search metric that decides, or several: the first is Ray's, see `run_study`. Not
            several under PBT.
        mode: ``"min"`` or ``"max"``: its direction, and Ray's; for several metrics, one for each.
        constraints: Such as ``"alpha_lambda_max<=2"``; see `run_study`.
        fidelity: By what the scheduler counts a trial's progress, as in `run_study`; `asha` and
            `hyperband` only. Their longest trial is what the budget allows at most of it.
        sampler: A name, a sampler of Optuna's or a function, as in `run_study`; one that ends its
            study does not end the search. Not used by PBT, which mutates a population drawn at
            random.
        scheduler: ``"none"``, ``"asha"``, ``"hyperband"`` or ``"pbt"``, whose members end together:
            one that the budget's patience ends before waits, and may go on from another's state.
        storage: URL of the Optuna study's storage; default: a journal in `out`.
        study_name: Default: the run's id.
        address: Of a cluster; default: Ray is started on this machine, unless this process is
            connected already.
        cpus_per_trial: Cores, which are PyTorch's threads too.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0.
        resume: Go on with the run in `out`.
        baseline: Whether to train plainly as well, here, as `run_study` does; not on a cluster.
        callbacks: Hooks into the trials and the search, see `Callback`.
        trust: As in `run_study`. Of Ray's own files none is read when a search is resumed.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or no node can hold a trial.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If trials failed, after all their retries.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, run_ray, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> budget = Budget(outer_steps=4)
        >>> run_ray(problem, space, budget, n_trials=2, out="runs/mine")  # doctest: +SKIP
        >>> run_ray(problem, space, budget, n_trials=2, out="runs/mine", scheduler="ashes")
        Traceback (most recent call last):
        ...
        ift_tune.base.errors.UsageError: unknown scheduler 'ashes'; did you mean 'asha'?
    """
    config = config or MetaConfig()
    trials = TrialPlan(
        problem_factory, budget, config, seed, device, metric, mode, callbacks, constraints
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
        trust=trust,
    )
    result = search_with_ray(
        request, RayTune(address, cpus_per_trial, gpus_per_trial, scheduler=scheduler)
    )
    if result.failure is not None:
        _log.warning(result.failure)
    return result


def search_with_ray(request: SearchRequest, backend: RayTune) -> RayResult:
    """Search with Ray Tune; see `run_ray`."""
    plan, trials = request.plan, request.plan.trials
    refuse_several_processes(trials.processes, "Ray")
    space = plan.space
    if space is None:
        raise UsageError("there is nothing to search: give a space")
    if backend.scheduler == PBT and trials.objectives.several:
        raise UsageError(
            "pbt copies what is better by one metric: name one, or choose another scheduler, got "
            f"{trials.objectives.words}"
        )
    pruner = optuna.pruners.NopPruner()  # that is Ray's part
    if backend.scheduler != PBT:
        make_sampler = functools.partial(request.sampler, trials.seed, 0)
        check_means(trials.objectives, make_sampler, pruner, space)
    backend.check(trials.device)
    make_scheduler(backend.scheduler, plan)  # a budget that does not suit it
    session = request.session({"backend": "ray", "scheduler": backend.scheduler})
    callbacks = hooks_of(request.callbacks)
    with contextlib.ExitStack() as connection:

        def dry_check() -> None:
            # On a cluster, the data may be on the nodes alone.
            if not request.resume and backend.address is None:
                plan.check(torch.device("cpu"))
            connection.enter_context(connected(backend.address))
            room = check_room(backend.cpus_per_trial, backend.gpus_per_trial)
            CallbackList(callbacks).on_resources(room)

        run = session.run
        with calling(run.path, callbacks), session.writing(dry_check, stopping_ray):
            study = request.study_plan(session, pruner)
            if backend.scheduler != PBT:
                request.open_study(study, session, join=True, study_first=True)
            search = Experiments(study, plan, space, run, backend)
            try:
                with during(callbacks, request.facts(session, search.finished())):
                    search.finish(session.interrupt)
                    # Not on a cluster: its data may lie elsewhere.
                    if request.baseline and backend.address is None:
                        train_baseline(
                            run, trials.problem_factory, trials.device, callbacks, session.interrupt
                        )
            finally:
                for record in run.records():
                    if record.facts().get("status") == TrialStatus.RUNNING:
                        record.describe(record.facts() | ending(StopReason.INTERRUPTED))
        tables, home = session.tables, (run, trials.problem_factory, trials.device)
        if backend.scheduler == PBT:
            best = best_row(tables.trials, space, trials.objectives.metric, trials.direction)
            found = None if best is None else BestTrial(best, home)
            return RayResult(None, found, *tables).of(run.path)
        opened = study.open(join=True)
    best = best_point(opened)
    found = None if best is None else BestTrial(best, home)
    return RayResult(opened, found, *tables).of(run.path)
