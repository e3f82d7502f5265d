"""A normal Optuna study as Ray Tune's search algorithm."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from ift_tune.base.direction import is_penalty
from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.base.status import Outcome, StopReason, TrialStatus, stopped_early
from ift_tune.search.loop import FINISHED, StudyPlan
from ift_tune.search.outcomes import note_outcome
from ift_tune.search.ray.points import NUMBER
from ift_tune.search.ray.resuming import GOES_ON, latest_checkpoint
from ift_tune.search.ray.session import OBJECTIVE
from ift_tune.search.retry import RUN_DIRECTORY
from ift_tune.search.shared_study import SharedStudy, name_metrics
from ift_tune.search.space import Space
from ift_tune.search.storage_faults import using_storage
from ift_tune.search.work import set_aside, taken_up
from ift_tune.trial.tables import RunDirectory

_TRIAL_ID = "ray_trial"


class StudySearcher(Searcher):
    """Suggests what an Optuna study asks for, and tells it how every trial ended.

    The study in its storage is the only state. Ray's snapshots may be older than it, or be lost,
    and nothing is forgotten: a trial that Ray no longer knows is still marked as running, and is
    suggested again under its number.

    Compared with Ray's own ``OptunaSearch``: trials stopped early are PRUNED, a failed or diverged
    one never stays RUNNING, and suggestions depend on the seed and the trial's number alone.
    """

    def __init__(self, plan: StudyPlan, space: Space) -> None:
        """Take the study.

        Args:
            plan: Which study, where; it is opened when the first suggestion is asked for.
            space: What varies.
        """
        super().__init__(metric=OBJECTIVE, mode=plan.source.direction.value)
        self._plan, self._space = plan, space
        self._known: set[str] = set()
        self._taken_up: set[int] = set()  # trials whose end the study knew before
        self.fault: EnvironmentFaultError | None = None
        self._opened: SharedStudy | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Ray pickles this into the experiment's folder, where no password shall lie.
        plan = replace(self._plan, storage=set_aside(self._plan.storage))
        return vars(self) | {"_opened": None, "fault": None, "_plan": plan}

    @property
    def study(self) -> SharedStudy:
        """The study."""
        if self._opened is None:
            plan = replace(self._plan, storage=taken_up(self._plan.storage))
            self._opened = plan.open(join=True)
            self._opened.session = type(self).__name__  # whose trials Ray ends, and no sampler
        return self._opened

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Refuse a space given to the Tuner: this searcher has its own."""
        return not config

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the next point, with the trial's number in the study beside it."""
        with using_storage():
            if (ended := self._half_ended()) is not None:
                self._taken_up.add(ended.number)
                return self._going_on(ended)
            marks = {RUN_DIRECTORY: self._run.token, _TRIAL_ID: trial_id}
            if (left := self._left_behind()) is not None:
                for name, value in marks.items():
                    left.set_user_attr(name, value)
                self._known.add(trial_id)
                return self._going_on(left)
            trial = self.study.new_trial(marks)
            self._known.add(trial_id)
            return {**self._space.suggest(trial), NUMBER: trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an intermediate value."""
        with using_storage():
            if (frozen := self._frozen(trial_id)) is not None and not result.get("stop_reason"):
                self._report(frozen, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study: COMPLETE, PRUNED if stopped early or diverged, FAIL after an error.

        A storage that cannot be written is kept in `fault`: of an exception here Ray would make a
        failure of the trial.
        """
        try:
            with using_storage():
                self._tell(trial_id, result, error)
        except EnvironmentFaultError as fault:
            self.fault = fault

    def _tell(self, trial_id: str, result: dict[str, Any] | None, error: bool) -> None:
        frozen = self._frozen(trial_id)
        if frozen is None:
            return
        said = (result or {}).get("stop_reason")
        reason = StopReason(said) if said else stopped_early(result or {})
        if error or reason is StopReason.FAILED:
            self.study.tell(frozen.number, state=TrialState.FAIL)
            return
        if result is not None:
            measured = {key: value for key, value in result.items() if not is_penalty(value)}
            if OBJECTIVE in measured:
                self._report(frozen, measured)
            objectives = self._plan.source.objectives
            mode = objectives.direction.value
            outcome = Outcome(reason, None, result["metric"], measured, mode)
            note_outcome(optuna.Trial(self.study, frozen._trial_id), outcome, objectives)
            name_metrics(self.study, outcome.metric)
            if reason is StopReason.DONE:
                self.study.tell(frozen.number, objectives.values(result[OBJECTIVE], measured))
                return
        self.study.tell(frozen.number, state=TrialState.PRUNED)

    def running(self) -> set[int]:
        """Return the trials of this run directory that are running, as far as the study knows."""
        return {frozen.number for frozen in self._running() if self._is_ours(frozen)}

    def on_pause(self, trial_id: str) -> None:
        """Take no notice: ``HyperBandForBOHB`` tells its searcher; a study knows no pauses."""

    def on_unpause(self, trial_id: str) -> None:
        """Take no notice, as there."""

    def save(self, checkpoint_path: str) -> None:
        """Save which of Ray's trials are known; the rest is in the study."""
        Path(checkpoint_path).write_text(json.dumps(sorted(self._known)))

    def restore(self, checkpoint_path: str) -> None:
        """Load what `save` wrote."""
        self._known = set(json.loads(Path(checkpoint_path).read_text()))

    @property
    def _run(self) -> RunDirectory:
        return RunDirectory(self._plan.directory, resume=True)

    def _is_ours(self, frozen: FrozenTrial) -> bool:
        """Return whether a trial is of this run directory, which has been marked or not yet."""
        unmarked = self._run.token if self._plan.storage is None else None
        return frozen.user_attrs.get(RUN_DIRECTORY, unmarked) == self._run.token

    def _report(self, frozen: FrozenTrial, result: dict[str, Any]) -> None:
        if self._plan.source.objectives.several:
            return  # Optuna takes no report of several metrics, and prunes nothing by one
        step = int(result[self._plan.source.fidelity])
        if step > max(frozen.intermediate_values, default=-1):
            optuna.Trial(self.study, frozen._trial_id).report(result[OBJECTIVE], step)

    def _going_on(self, trial: optuna.Trial | FrozenTrial) -> dict[str, Any]:
        """Return the configuration of a trial that another experiment has begun."""
        found = latest_checkpoint(self._run.trial(trial.number))
        file = {} if found is None else {GOES_ON: str(found.checkpoint)}
        return {**self._space.suggest(trial), NUMBER: trial.number, **file}

    def _half_ended(self) -> FrozenTrial | None:
        """Return a trial whose end the study knows, and the tables do not: a kill came between."""
        for frozen in self.study.get_trials(deepcopy=False, states=FINISHED):
            known = frozen.user_attrs.get(_TRIAL_ID) in self._known
            if known or frozen.number in self._taken_up or not self._is_ours(frozen):
                continue
            status = self._run.trial(frozen.number).facts().get("status")
            if status in (TrialStatus.RUNNING, TrialStatus.INTERRUPTED):
                return frozen
        return None

    def _running(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _frozen(self, trial_id: str) -> FrozenTrial | None:
        """Return the running trial of the study behind one of Ray's."""
        for frozen in self._running():
            if frozen.user_attrs.get(_TRIAL_ID) == trial_id:
                return frozen
        return None

    def _left_behind(self) -> optuna.Trial | None:
        """Return a running trial of this run directory that Ray does not know (any more)."""
        for frozen in self._running():
            if self._is_ours(frozen) and frozen.user_attrs.get(_TRIAL_ID) not in self._known:
                # Optuna has no public way to take up a running trial; its ask() does it like this.
                return optuna.Trial(self.study, frozen._trial_id)
        return None
