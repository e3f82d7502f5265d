"""Writes our tables from the driver, whichever searcher and scheduler run."""

from __future__ import annotations

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from ift_tune.base.errors import EnvironmentFaultError, RunExistsError, UsageError
from ift_tune.base.status import Outcome, StopReason, stopped_early
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.joint.config import MetaConfig
from ift_tune.search.ray.conclusions import Conclusions
from ift_tune.search.ray.endings import ending_of, watch
from ift_tune.search.ray.points import NUMBER
from ift_tune.search.ray.resuming import RAY_NAME
from ift_tune.search.ray.session import RECORD
from ift_tune.trial.best import keep_best
from ift_tune.trial.record import TrialWriter, take_found
from ift_tune.trial.tables import RunDirectory

_driver_callbacks: dict[Path, Callback] = {}

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def calling(directory: Path, callbacks: Sequence[Callback]) -> Iterator[None]:
    """Call hooks of the search for the trials written to a directory, inside the context.

    `TablesCallback` is pickled with every snapshot of a run, which no display survives: so the
    callbacks are kept here.
    """
    _driver_callbacks[directory.resolve()] = CallbackList(callbacks)
    try:
        yield
    finally:
        del _driver_callbacks[directory.resolve()]


@dataclass
class _RunningTrial:
    """What is known of a trial while it runs."""

    ray_id: str
    number: int
    writer: TrialWriter
    begun: bool = False
    outcome: Outcome | None = None
    reason: StopReason | None = None  # why it ends with its latest result
    concludes: bool = False  # whether it ends by a criterion, of which its process knows nothing


class TablesCallback(tune.Callback):
    """Writes the `trials` and `steps` tables of `load_results` as results arrive.

    Works with any trainable of this package, searcher, scheduler and logger, and after
    ``Tuner.restore``. A trial that goes on from a checkpoint writes the steps since then again in
    place of the old rows, so no step is there twice.

    A trial that the user's ``stop`` or ``time_budget_s`` ends is done, one that a scheduler ends is
    pruned; ``stop_reason`` in its last result says so too. What the first has found, its λ and the
    score by retraining, is worked out from its latest checkpoint, by a task of Ray's with the
    trial's resources; ``fit`` returns when all of these are there.

    Example:
        >>> from ift_tune import TablesCallback, recommended_run_config
        >>> tables = TablesCallback("../tables", task="mine", arm="ift+pbt")
        >>> config = recommended_run_config("runs", tables=tables)
        >>> tables in config.callbacks
        True
    """

    def __init__(
        self,
        path: str | Path = ".",
        *,
        task: str = "custom",
        arm: str = "ift+ray",
        run_id: str | None = None,
    ) -> None:
        """Say where and under which names.

        Args:
            path: The run directory; a relative one starts at Ray's experiment directory, so that
                a moved experiment can be restored.
            task: Name in the tables.
            arm: Name of the way to choose hyperparameters.
            run_id: Default: the name of Ray's experiment.
        """
        self._path, self._names = Path(path), {"task": task, "arm": arm}
        self._run_id = run_id
        self._forget()

    def _forget(self) -> None:
        self._running: dict[str, _RunningTrial] = {}
        self._run: RunDirectory | None = None
        self._numbers: dict[str, int] | None = None  # of the folders, by Ray's names of trials
        self._conclusions: Conclusions[_RunningTrial] = Conclusions()
        self.fault: EnvironmentFaultError | None = None
        self._failed = False  # since the last round of Ray's loop
        self._ends: Counter[StopReason] = Counter()

    def __getstate__(self) -> dict[str, Any]:
        # The files are the truth: a restored experiment looks at them.
        return {name: vars(self)[name] for name in ("_path", "_names", "_run_id")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Make the trial's folder.

        Raises:
            RunExistsError: If the run directory holds another experiment's trials.
        """
        if self._run is None and self._run_id is None:
            self._refuse_another_experiment(trials, trial)
        watch(trial)
        known = self._known(trial)
        self._conclusions.forget(known.writer.record)
        known.writer.begin()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Append the rows of a result."""
        text = result.pop(RECORD, None)
        if text is None:
            if result.get("stop_reason") == StopReason.FAILED.value:
                self._ended(self._known(trial), StopReason.FAILED)
            return
        record = json.loads(text)
        known, callback = self._known(trial), self._callback
        if not known.begun:
            known.begun = True
            if record["moved"] and record["exploited"] is None:
                _log.warning(
                    "trial %d has values outside the space, and takes %s",
                    known.number,
                    ", ".join(record["moved"]),
                )
            flat = {k: v for k, v in record["facts"].items() if MetaConfig.is_key(k)}
            first = record["rows"][0]["step"] - 1 if record["rows"] else result["outer_step"]
            callback.on_trial_begin(known.number, MetaConfig.from_flat(flat), first)
        known.writer.update(record["facts"] | record["found"])
        donor = (
            {} if record["exploited"] is None else {"donor": self._number_of(record["exploited"])}
        )
        for row in record["rows"]:
            known.writer.append(row | donor)
            donor = {}
            callback.on_trial_step(known.number, row)
        if record["rows"]:
            known.writer.record.flush()  # a checkpoint follows, which counts them
        if record["retrained"] is not None:
            callback.on_retraining(known.number, record["retrained"])
        known.reason = ending_of(trial, result)
        if known.reason is not None and not result.get("stop_reason"):
            known.concludes = known.reason is StopReason.DONE
            result["stop_reason"] = known.reason.value  # for searchers, loggers and Ray's results
        known.outcome = Outcome(
            StopReason.PRUNED,
            record["value"],
            result["metric"],
            {**result, "step": result["outer_step"]},
            result["mode"],
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Write how it ended, and λ as found.

        What cannot be written is kept in `fault`: of an exception here Ray would make a failure of
        the trial.
        """
        try:
            self._complete(trial)
        except EnvironmentFaultError as fault:
            self.fault = fault

    def _complete(self, trial: Trial) -> None:
        known = self._known(trial)
        reason = known.reason
        if reason is None:  # stopped while it was paused
            # Not trial.last_result where it can be avoided: after an exploit it is the other's.
            last = trial.last_result or {} if known.outcome is None else known.outcome.metrics
            said = last.get("stop_reason")
            reason = StopReason(said) if said else stopped_early(last)
            if known.outcome is not None:
                trial.last_result["stop_reason"] = reason.value
        if known.concludes:
            self._conclude(known, trial)
            return
        if reason is StopReason.DONE and trial.checkpoint is not None:
            with trial.checkpoint.as_directory() as directory:
                # There is nothing where checkpoints are rarer than results.
                take_found(Path(directory), known.writer.record)
        self._ended(known, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Write that it failed, after all its retries."""
        self._failed = True
        self._ended(self._known(trial), StopReason.FAILED)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Remember that there was an error, after which Ray may be told to stop all trials."""
        self._failed = True

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Take what has been worked out, and look whether Ray has stopped all trials at once.

        Ray tells nobody of trials that end so: by ``time_budget_s`` or a stopper's ``stop_all``.
        """
        if self._running and not self._failed:
            for trial in trials:
                known = self._running.get(trial.trial_id)
                if trial.status == Trial.TERMINATED and known and known.outcome is not None:
                    trial.last_result["stop_reason"] = StopReason.DONE.value
                    self._conclude(known, trial)
        self._failed = False
        self._take_conclusions(wait=False)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Write both tables; what still runs was interrupted."""
        self._resume_conclusions(trials)
        self._take_conclusions(wait=True)
        for known in self._running.values():
            known.writer.end(StopReason.INTERRUPTED, {})
        if set(self._ends) == {StopReason.PRUNED} and not self._running:
            _log.warning(
                "a scheduler has stopped every trial, so none is done: give it max_t of the "
                "budget's length, or RunConfig(stop=...) of the length that a trial shall have"
            )
        if self._run is not None:
            self._run.write_tables()

    def _conclude(self, known: _RunningTrial, trial: Trial) -> None:
        """Begin to work out what a trial that a criterion has ended has found."""
        if trial.checkpoint is None:
            _log.warning(
                "trial %d has no checkpoint: its hyperparameters are not kept, and it is not "
                "retrained; set checkpoint_at_end in tune.CheckpointConfig",
                known.number,
            )
            self._ended(known, StopReason.DONE)
            return
        step = None if known.outcome is None else int(known.outcome.metrics["step"])
        self._conclusions.begin(trial, step, known.writer.record, known)
        self._running.pop(known.ray_id, None)

    def _take_conclusions(self, *, wait: bool) -> None:
        for known, conclusion in self._conclusions.finished(wait=wait):
            known.writer.update(conclusion.found)
            if known.outcome is not None:
                known.outcome.metrics.update(conclusion.found)
            if conclusion.retrained is not None:
                self._callback.on_retraining(known.number, conclusion.retrained)
            self._ended(known, StopReason.DONE)

    def _resume_conclusions(self, trials: list[Trial]) -> None:
        """Begin again what a driver that was killed was working out."""
        ended = [trial for trial in trials if trial.status == Trial.TERMINATED]
        if self._run is None and ended and (path := _resolve(self._path, ended[0])).exists():
            self._run = RunDirectory(path, resume=True)
        records = [] if self._run is None else self._run.records()
        left = {record.number for record in self._conclusions.left_behind(records)}
        for trial in ended:
            if left and self._number_of(trial.trial_id) in left:
                self._conclude(self._known(trial), trial)

    @property
    def _callback(self) -> Callback:
        directory = None if self._run is None else self._run.path.resolve()
        return _driver_callbacks.get(directory, Callback()) if directory else Callback()

    def _ended(self, known: _RunningTrial, reason: StopReason) -> None:
        known.writer.end(reason, {})
        if self._run is not None:
            keep_best(self._run, known.number)
        self._ends[reason] += 1
        outcome = known.outcome or Outcome(reason, None, "", {})
        ended = replace(outcome, stop_reason=reason)
        self._callback.on_trial_end(known.number, ended)
        self._running.pop(known.ray_id, None)
        if self._run is not None:
            self._run.refresh_tables()

    def _known(self, trial: Trial) -> _RunningTrial:
        """Return what is known of a trial: its folder is that of its number, or a new one."""
        known = self._running.get(trial.trial_id)
        if known is None:
            if self._run is None:
                self._run = RunDirectory(_resolve(self._path, trial), resume=True)
            number = self._number_of(trial.trial_id)
            if number is None:  # later it may be the number of a trial that this one has exploited
                number = trial.config.get(NUMBER)
            if number is None:
                number = 1 + max(self._by_ray_id().values(), default=-1)
            self._by_ray_id()[trial.trial_id] = number
            record = self._run.trial(number)
            record.write(RAY_NAME, trial.trial_id.encode())
            names = {"run_id": self._name_run(trial), **self._names, NUMBER: number}
            writer = TrialWriter(record, record.facts() | names)
            known = self._running[trial.trial_id] = _RunningTrial(trial.trial_id, number, writer)
        return known

    def _refuse_another_experiment(self, trials: list[Trial], trial: Trial) -> None:
        """Look whether all recorded trials are of this experiment: a restored one knows them."""
        path = _resolve(self._path, trial)
        names = [record.path / RAY_NAME for record in RunDirectory(path, resume=True).records()]
        recorded = {name.read_text() for name in names if name.exists()}
        if recorded - {known.trial_id for known in (*trials, trial)}:
            raise RunExistsError(
                f"{path} already holds the tables of another experiment: give this one another "
                "name or TablesCallback another path, or restore that one"
            )

    def _name_run(self, trial: Trial) -> str:
        """Return the run's id; an experiment that was moved keeps its old name."""
        if self._run_id is None:
            records = [] if self._run is None else self._run.records()
            known = (record.facts().get("run_id") for record in records)
            first = next(filter(None, known), None)
            self._run_id = first or str(_storage(trial).experiment_dir_name)
        return self._run_id

    def _number_of(self, ray_id: str) -> int | None:
        """Return the number under which a trial of Ray's is recorded."""
        return self._by_ray_id().get(ray_id)

    def _by_ray_id(self) -> dict[str, int]:
        """Return the numbers of all folders by Ray's names; they are looked at once."""
        if self._numbers is None:
            self._numbers = {}
            for record in [] if self._run is None else self._run.records():
                name = record.path / RAY_NAME
                # A folder without a name is taken too.
                ray_id = name.read_text() if name.exists() else str(record.path)
                self._numbers[ray_id] = record.number
        return self._numbers


def _storage(trial: Trial) -> Any:
    if trial.storage is None:
        raise UsageError("TablesCallback needs trials of a tune.Tuner")
    return trial.storage


def _resolve(path: Path, trial: Trial) -> Path:
    """Return the run directory on this machine."""
    if path.is_absolute():
        return path
    storage = _storage(trial)
    if storage.storage_filesystem.type_name != "local":
        raise UsageError(
            f"the experiment lies on {storage.storage_filesystem.type_name}, where no table can be "
            "appended to: give TablesCallback an absolute path on this machine"
        )
    return Path(storage.experiment_fs_path, path)
