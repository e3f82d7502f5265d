"""Claim a trial, run it, tell the study, until the study has its trials: in one process or many."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import Interrupted, UsageError
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.status import StopReason, ending
from ift_tune.joint.callbacks import Callback
from ift_tune.search.identity import join_study, refuse_foreign_trials
from ift_tune.search.objective import SourceObjective
from ift_tune.search.outcomes import check_directions
from ift_tune.search.packed import Claimed, Lane, PackedTrials, pack_for
from ift_tune.search.per_trial import PerTrialSampler, suggest
from ift_tune.search.plan import SearchPlan, TrialSource
from ift_tune.search.pruners import repeatable
from ift_tune.search.reconciled import require_consistent
from ift_tune.search.retry import RUN_DIRECTORY, note_stale
from ift_tune.search.samplers import SamplerFactory
from ift_tune.search.shared_study import SharedStudy, name_metrics
from ift_tune.search.storage_faults import reading_study, using_storage
from ift_tune.search.work import Work, Worker, asking_lock, open_storage, storage_name
from ift_tune.trial.tables import RunDirectory

_NOBODY = "nobody"  # whose loops a sampler may stop where there is no loop
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
TAKEN = (*FINISHED, TrialState.RUNNING)
WORKER = "worker"
CAUGHT = "caught"
"""User attribute of trials that failed by an exception which the search goes on after."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyPlan(Work):
    """A study and where its trials come from. Picklable, so that other processes can open it.

    Attributes:
        source: Makes its trials.
        seed: Of the sampler.
        directory: The run directory.
        facts: Constant columns of the tables.
        storage: See `storage.open_storage`.
        name: The study's name.
        sampler: Makes the sampler of a trial.
        pruner: The pruner.
        n_trials: How many trials shall be finished in the end.
        identity: What whoever joins the study must have too; the study keeps it. Empty for a study
            that nobody else can reach.
        catch: Exceptions after which a trial has failed and the others go on.
        pack: How many trials of a process advance together.
        deadline: When no further trial shall begin, as `time.time` counts; None: no such time.
    """

    source: TrialSource
    seed: int
    directory: Path
    facts: dict[str, Any]
    storage: str | BaseStorage | None
    name: str
    sampler: SamplerFactory
    pruner: optuna.pruners.BasePruner
    n_trials: int
    identity: Mapping[str, Any] = field(default_factory=dict)
    catch: tuple[type[Exception], ...] = ()
    deadline: float | None = None
    pack: int = 1

    def on(self, device: str) -> StudyPlan:
        """Return the same study with its trials on a device."""
        return replace(self, source=self.source.on(device))

    def do(
        self,
        worker: Worker,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Run trials as a worker, until enough are finished or at work elsewhere."""
        StudyLoop(
            self,
            self.open(join=True),
            worker,
            callbacks=callbacks,
            interrupt=interrupt,
            on_done=on_done,
        ).run()

    def left_by(self, worker: Worker) -> int | None:
        """Return the number of the trial that a worker that died was at, if it was at one."""
        running = self.open(join=True).get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = [t.number for t in running if t.user_attrs.get(WORKER) == worker.mark]
        return left[0] if left else None

    def name_of(self, number: int) -> str:
        """Return "trial 3"."""
        return f"trial {number}"

    def give_up(self, number: int) -> None:
        """Say in the study and in the tables that a trial has failed."""
        study = self.open(join=True)
        study.session = _NOBODY
        study.tell(number, state=TrialState.FAIL)
        point = study.get_trials(deepcopy=False)[number].params
        settings = self.source.on("cpu").trial(point, number).constants() | {"device": None}
        record = RunDirectory(self.directory, resume=True).trial(number)
        facts = {**self.facts, "trial": number, **settings, **record.facts()}
        record.describe(facts | ending(StopReason.FAILED))

    def enough(self, taken: int) -> bool:
        """Return whether no further trial shall begin.

        Args:
            taken: How many trials are finished or running.
        """
        return taken >= self.n_trials or self.source.exhausted()

    def open(self, *, join: bool) -> SharedStudy:
        """Return the study, made if it does not exist; one that does is refused unless `join`.

        Raises:
            UsageError: If it was begun with other settings, or by another program.
        """
        # Two at once would both make its tables.
        name = storage_name(self.storage, self.directory)
        with asking_lock(self.storage, self.directory), reading_study(name):
            storage = open_storage(self.storage, self.directory)
            if not join or self.name not in optuna.get_all_study_names(storage):
                directions = self.source.objectives.optuna
                optuna.create_study(storage=storage, study_name=self.name, directions=directions)
            sampler = PerTrialSampler(self.sampler, self.seed)
            pruner = repeatable(self.pruner, self.source.longest)
            study = SharedStudy(self.name, storage, sampler, pruner)
            check_directions(study, self.source.objectives)
            name_metrics(study, self.source.objectives.names)
            if self.identity:
                if self.storage is not None:
                    refuse_foreign_trials(study)
                join_study(study, self.identity)
        return study

    def go_on(self, study: SharedStudy, *, study_first: bool = False) -> None:
        """Look whether the study and what its trials have written still belong together.

        Args:
            study: It.
            study_first: See `require_consistent`.

        Raises:
            UsageError: If something of them is damaged or lost.
        """
        name = storage_name(self.storage, self.directory)
        with reading_study(name):
            run = RunDirectory(self.directory, resume=True)
            require_consistent(study, run, name, study_first=study_first)


class Leave(BaseException):
    """Ends Optuna's loop, with a trial of which the study knows already, or shall not know."""


class _Enough(Exception):
    """No further trial shall begin."""


class StudyLoop:
    """One process's part in a study: Optuna's own loop, over the trials that it claims."""

    def __init__(
        self,
        plan: StudyPlan,
        study: SharedStudy,
        worker: Worker,
        *,
        callbacks: Sequence[Callback] = (),
        interrupt: Interrupt | None = None,
        on_done: Callable[[int], None],
    ) -> None:
        """Take what to run.

        Args:
            plan: The study.
            study: It, opened.
            worker: Who this process is.
            callbacks: Their hooks of the search are called.
            interrupt: Looked at between outer steps.
            on_done: Called with the number of each trial whose end the study knows.
        """
        self._plan, self._study, self._worker, self._on_done = plan, study, worker, on_done
        self._run = RunDirectory(plan.directory, resume=True)
        self._asking = asking_lock(plan.storage, plan.directory)
        self._interrupt = interrupt or Interrupt()
        self._objective = SourceObjective(
            plan.source,
            run=self._run,
            facts=plan.facts,
            callbacks=callbacks,
            interrupt=self._interrupt,
        )
        self._ended_by: BaseException | None = None

    def run(self) -> None:
        """Run trials until enough are finished or at work elsewhere, or the study is stopped.

        Raises:
            Interrupted: If the user asked to stop.
            Exception: Whatever a problem raises. The tables say that the trial failed; in the study
                it stays open, as after a kill, and whoever resumes takes it up again.
        """
        deadline = self._plan.deadline
        try:
            with self.open(), using_storage():  # what trials and callbacks raise does not pass here
                self._optimize(None if deadline is None else max(0.0, deadline - time.time()))
        except (_Enough, Leave):
            pass
        if self._ended_by is not None:
            raise self._ended_by

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Let the study's trials be claimed here."""
        study = self._study
        study.claim, study.session = self._claim, self._worker.session
        study.keep_alive(self._left_behind())
        try:
            yield
        finally:
            study.left()

    def _optimize(self, timeout: float | None) -> None:
        """Run one trial after the other, or several together."""
        if self._plan.pack > 1:
            self._optimize_packed(timeout)
            return
        self._study.optimize(
            self._one, timeout=timeout, catch=self._plan.catch, callbacks=[self._after]
        )

    def _optimize_packed(self, timeout: float | None) -> None:
        source = self._plan.source
        if not isinstance(source, SearchPlan):
            raise UsageError(
                f"trials of a search alone can be packed, got those of a {type(source).__name__}"
            )
        end = None if timeout is None else time.monotonic() + timeout
        lane, more = self.lane(), True

        def following(_: Sequence[Lane]) -> Claimed | None:
            nonlocal more
            late = end is not None and time.monotonic() >= end
            trial = self.claim() if more and not late else None
            more = trial is not None
            return None if trial is None else (lane, trial)

        def interrupt() -> None:
            self._interrupt.requested = True

        pack = pack_for(source.trials, resolve_device(source.trials.device))
        PackedTrials(pack, self._plan.pack, following=following, interrupt=interrupt).run()

    def lane(self) -> Lane:
        """Return what drives one of the claimed trials beside those of others."""
        halves = self._objective.halves
        return Lane(self._study, halves, self._judging, self._after, self._plan.catch)

    def claim(self) -> optuna.Trial | None:
        """Return the trial to run next, at its point; None if no further one shall begin.

        Raises:
            Interrupted: If the user asked to stop.
        """
        try:
            return self._claim()
        except _Enough:
            return None

    def _claim(self) -> optuna.Trial:
        """Return the trial to run next, at its point."""
        if self._interrupt.requested:
            raise Interrupted("interrupted between trials")
        with self._asking:
            if self._study.has_heartbeat:
                note_stale(self._run, self._study)
            trial = self._taken_up() or self._new()
            if trial is None:
                raise _Enough
            # Here, so that whoever asks next sees the point, and takes another one.
            suggest(self._plan.source.space, trial)
            if self._study.sampler.repeats(self._study, trial.number):
                self._surplus(trial)
                raise _Enough
        return trial

    def _left_behind(self) -> list[FrozenTrial]:
        """Return the trials of this run directory that no process is at any more.

        It was killed or interrupted, or the trial raised. Where the study is this run's alone, that
        includes one killed before it was marked.
        """
        unmarked = self._run.token if self._plan.storage is None else None
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [
            trial
            for trial in running
            if trial.user_attrs.get(RUN_DIRECTORY, unmarked) == self._run.token
            and not self._worker.survives(trial.user_attrs.get(WORKER, "/0"))
        ]

    @property
    def _marks(self) -> dict[str, str]:
        return {RUN_DIRECTORY: self._run.token, WORKER: self._worker.mark}

    def _taken_up(self) -> optuna.Trial | None:
        """Return a trial that was left behind, if there is one."""
        for frozen in self._left_behind():
            _log.info("trial %d, which is not over, is taken up again", frozen.number)
            # Optuna has no public way to take up a running trial; its ask() does it like this.
            trial = optuna.Trial(self._study, frozen._trial_id)
            for name, value in self._marks.items():
                trial.set_user_attr(name, value)
            return trial
        return None

    def _new(self) -> optuna.Trial | None:
        """Return a new trial, unless enough are finished or running, or the study is stopped."""
        study, taken = self._study, len(self._taken())
        if study.stopped or self._plan.enough(taken) or study.sampler.exhausted(study):
            return None
        trial = study.new_trial(self._marks)
        # A process on another machine may have asked at the same moment. Numbers are given in one
        # order for all, so all agree whose trial is the one too many.
        if sum(other.number < trial.number for other in self._taken()) >= self._plan.n_trials:
            self._surplus(trial)
            return None
        return trial

    def _taken(self) -> list[FrozenTrial]:
        """Return the trials that count: finished, running, or failed and to be left so."""
        trials = self._study.get_trials(deepcopy=False)
        return [t for t in trials if t.state in TAKEN or CAUGHT in t.user_attrs]

    def _surplus(self, trial: optuna.Trial) -> None:
        trial.set_user_attr("surplus", True)
        self._study.tell(trial, state=TrialState.FAIL)

    def _one(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        with self._judging(trial):
            return self._objective(trial)

    @contextlib.contextmanager
    def _judging(self, trial: optuna.Trial) -> Iterator[None]:
        """Decide what the study is told of a trial that ends by an exception: of most, nothing.

        A finished trial of Optuna's cannot be begun again, and one in its place would have another
        number, and so another point: this one would never be tried, however the mistake is mended.
        """
        try:
            yield
        except optuna.TrialPruned:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, self._plan.catch) and not isinstance(error, Interrupted):
                trial.set_user_attr(CAUGHT, f"{type(error).__name__}: {error}")
                raise
            self._ended_by = self._ended_by or error
            raise Leave from error

    def _after(self, study: optuna.Study, trial: FrozenTrial) -> None:
        name_metrics(study, trial.user_attrs.get("metric"))
        try:
            self._on_done(trial.number)
        except Exception as error:
            self._ended_by = error
            raise Leave from error
        self._study.keep_alive(self._left_behind())
