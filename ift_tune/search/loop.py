"""Claim a trial, run it, tell the study, until the study has its trials: in one process or many."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ift_tune.base.errors import Interrupted
from ift_tune.base.status import StopReason, ending
from ift_tune.joint.callbacks import Callback
from ift_tune.search.objective import (
    SourceObjective,
    TrialSource,
    check_directions,
    join_study,
    refuse_foreign_trials,
)
from ift_tune.search.samplers import PerTrialSampler, SamplerFactory
from ift_tune.search.work import Work, Worker, asking_lock, open_storage
from ift_tune.trial.runner import Interrupt
from ift_tune.trial.tables import RunDirectory

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
TAKEN = (*FINISHED, TrialState.RUNNING)

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
        left = [t.number for t in running if t.user_attrs.get("worker") == worker.mark]
        return left[0] if left else None

    def name_of(self, number: int) -> str:
        """Return "trial 3"."""
        return f"trial {number}"

    def give_up(self, number: int) -> None:
        """Say in the study and in the tables that a trial has failed."""
        study = self.open(join=True)
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

    def open(self, *, join: bool) -> optuna.Study:
        """Return the study, made if it does not exist; one that does is refused unless `join`.

        Raises:
            UsageError: If it was begun with other settings, or by another program.
        """
        with asking_lock(self.storage, self.directory):  # two at once would both make its tables
            study = optuna.create_study(
                storage=open_storage(self.storage, self.directory),
                study_name=self.name,
                sampler=PerTrialSampler(self.sampler, self.seed),
                pruner=self.pruner,
                direction=self.source.direction.optuna,
                load_if_exists=join,
            )
            check_directions(study, self.source.direction)
            if self.identity:
                if self.storage is not None:
                    refuse_foreign_trials(study)
                join_study(study, self.identity)
        return study


class StudyLoop:
    """One process's part in a study."""

    def __init__(
        self,
        plan: StudyPlan,
        study: optuna.Study,
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

    def run(self) -> None:
        """Run trials until enough are finished or at work elsewhere.

        Raises:
            Interrupted: If the user asked to stop.
            Exception: Whatever a problem raises; the study knows that the trial failed.
        """
        while True:
            if self._interrupt.requested:
                raise Interrupted("interrupted between trials")
            with self._asking:
                trial = self._left_behind() or self._new()
                if trial is not None:
                    trial.set_user_attr("run_directory", self._run.token)
                    trial.set_user_attr("worker", self._worker.mark)
            if trial is None:
                return
            self._one(trial)

    def _left_behind(self) -> optuna.Trial | None:
        """Return a trial of this run directory whose process is no more.

        Where the study is this run's alone, that includes one killed before it was marked.
        """
        unmarked = self._run.token if self._plan.storage is None else None
        for frozen in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            attributes = frozen.user_attrs
            ours = attributes.get("run_directory", unmarked) == self._run.token
            if ours and not self._worker.survives(attributes.get("worker", "/0")):
                _log.info("trial %d, whose process is gone, is taken up again", frozen.number)
                # Optuna has no public way to take up a running trial; its ask() does it like this.
                return optuna.Trial(self._study, frozen._trial_id)
        return None

    def _new(self) -> optuna.Trial | None:
        """Return a new trial, unless enough are finished or running."""
        taken = self._study.get_trials(deepcopy=False, states=TAKEN)
        if self._plan.enough(len(taken)):
            return None
        trial = self._study.ask()
        # A process on another machine may have asked at the same moment. Numbers are given in one
        # order for all, so all agree whose trial is the one too many.
        taken = self._study.get_trials(deepcopy=False, states=TAKEN)
        if sum(other.number < trial.number for other in taken) >= self._plan.n_trials:
            trial.set_user_attr("surplus", True)
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        return trial

    def _one(self, trial: optuna.Trial) -> None:
        try:
            value = self._objective(trial)
        except optuna.TrialPruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        except Interrupted:
            raise
        except Exception:
            self._study.tell(trial, state=TrialState.FAIL)
            raise
        else:
            self._study.tell(trial, value)
        self._on_done(trial.number)
