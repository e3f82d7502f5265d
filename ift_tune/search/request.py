"""What is searched and where it is kept, whatever runs the trials."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from ift_tune.base.arguments import require_flag, require_list, require_text, shown
from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.identity import FACTORY
from ift_tune.joint.callbacks import Callback, RunFacts
from ift_tune.search.foreign import refuse_foreign_pickles, refuse_foreign_storage
from ift_tune.search.loop import StudyPlan
from ift_tune.search.plan import SearchPlan
from ift_tune.search.queued import points_of
from ift_tune.search.samplers import SamplerFactory, sampler_factory
from ift_tune.search.shared_study import SharedStudy
from ift_tune.search.storage_faults import using_storage
from ift_tune.search.work import check_storage, former_identity, set_aside, storage_identity
from ift_tune.trial.session import Session

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
