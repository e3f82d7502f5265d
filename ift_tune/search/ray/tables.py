"""Writes our tables from the driver, whichever searcher and scheduler run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from ift_tune.base.errors import UsageError
from ift_tune.base.status import Outcome, StopReason
from ift_tune.joint.callbacks import Callback, CallbackList
from ift_tune.joint.config import MetaConfig
from ift_tune.search.ray.session import NUMBER, RECORD
from ift_tune.trial.artifacts import take_found
from ift_tune.trial.tables import RunDirectory, TrialRecord
from ift_tune.trial.trial_status import RUNNING, ending, stopped_early

_ID = "ray_trial"  # file in a trial's folder that holds Ray's name of it
_driver_callbacks: dict[Path, Callback] = {}


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


class TablesCallback(tune.Callback):
    """Writes the `trials` and `steps` tables of `load_results` as results arrive.

    Works with any trainable of this package, searcher, scheduler and logger, and after
    ``Tuner.restore``. A trial that goes on from a checkpoint writes the steps since then again in
    place of the old rows, so no step is there twice.
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
        self._records: dict[str, _Rows] = {}
        self._run: RunDirectory | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_records": {}, "_run": None}  # the files are the truth

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Make the trial's folder."""
        rows = self._rows(trial)
        rows.describe(RUNNING)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Append the rows of a result."""
        text = result.pop(RECORD, None)
        if text is None:
            if result.get("stop_reason") == StopReason.FAILED.value:
                self._failed(trial)
            return
        record = json.loads(text)
        rows, callback = self._rows(trial), self._callback
        if rows.first:
            rows.first = False
            flat = {k: v for k, v in record["facts"].items() if k in MetaConfig.flat_keys()}
            begun = record["rows"][0]["step"] - 1 if record["rows"] else 0
            callback.on_trial_begin(rows.number, MetaConfig.from_flat(flat), begun)
        donor = record["donor"]
        rows.change(record["facts"] | record["found"])
        for row in record["rows"]:
            inherited = {} if donor is None else {"donor": self._number_of(donor)}
            donor = None
            rows.write(row | inherited)
            callback.on_trial_step(rows.number, row)
        if record["retrained"] is not None:
            callback.on_retraining(rows.number, record["retrained"])
        rows.outcome = Outcome(
            StopReason.PRUNED,
            record["value"],
            result["metric"],
            {**result, "step": result["outer_step"]},
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Write how it ended, and λ as found."""
        rows = self._rows(trial)
        # Not trial.last_result where it can be avoided: an heir allocations that with its donor.
        last = trial.last_result or {} if rows.outcome is None else rows.outcome.metrics
        said = last.get("stop_reason")
        reason = StopReason(said) if said else stopped_early(last)
        rows.describe(ending(reason))
        if reason is StopReason.DONE and trial.checkpoint is not None:
            with trial.checkpoint.as_directory() as directory:
                # There is nothing where checkpoints are rarer than results.
                take_found(Path(directory), rows.record.path)
        self._ended(rows, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Write that it failed, after all its retries."""
        self._failed(trial)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Write both tables; what still runs was interrupted."""
        for rows in self._records.values():
            rows.describe(ending(StopReason.INTERRUPTED))
        if self._run is not None:
            self._run.write_tables()

    @property
    def _callback(self) -> Callback:
        directory = None if self._run is None else self._run.path.resolve()
        return _driver_callbacks.get(directory, Callback()) if directory else Callback()

    def _failed(self, trial: Trial) -> None:
        rows = self._rows(trial)
        rows.describe(ending(StopReason.FAILED))
        self._ended(rows, StopReason.FAILED)

    def _ended(self, rows: _Rows, reason: StopReason) -> None:
        outcome = rows.outcome or Outcome(reason, None, "", {})
        ended = Outcome(reason, outcome.value, outcome.metric, outcome.metrics)
        self._callback.on_trial_end(rows.number, ended)
        self._records.pop(rows.ray_id, None)
        self._directory.refresh_tables()

    @property
    def _directory(self) -> RunDirectory:
        if self._run is None:
            raise UsageError("TablesCallback was used before any trial had begun")
        return self._run

    def _rows(self, trial: Trial) -> _Rows:
        """Return the trial's rows: by its number, by what the folders say, or in a new folder."""
        if self._run is None:
            self._run = RunDirectory(_resolve(self._path, trial), resume=True)
        found = self._records.get(trial.trial_id)
        if found is None:
            number = trial.config.get(NUMBER, self._number_of(trial.trial_id))
            if number is None:
                number = 1 + max((_number(r) for r in self._run.records()), default=-1)
            record = self._run.trial(number)
            (record.path / _ID).write_text(trial.trial_id)
            names = {"run_id": self._name_run(trial), **self._names, NUMBER: number}
            found = _Rows(record, trial.trial_id, names)
            self._records[trial.trial_id] = found
        return found

    def _name_run(self, trial: Trial) -> str:
        """Return the run's id; an experiment that was moved keeps its old name."""
        if self._run_id is None:
            known = (record.facts().get("run_id") for record in self._directory.records())
            first = next(filter(None, known), None)
            self._run_id = first or str(_storage(trial).experiment_dir_name)
        return self._run_id

    def _number_of(self, trial_id: str) -> int | None:
        """Return the number under which a trial of Ray's is recorded."""
        for record in self._directory.records():
            name = record.path / _ID
            if name.exists() and name.read_text() == trial_id:
                return _number(record)
        return None


class _Rows:
    """The record of a trial that may go back to an earlier step, or change its settings."""

    def __init__(self, record: TrialRecord, ray_id: str, names: dict[str, Any]) -> None:
        self.record, self.ray_id, self.number = record, ray_id, int(names[NUMBER])
        self.outcome: Outcome | None = None
        self.first = True
        self._facts = record.facts()
        self._facts |= names
        steps = record.steps()
        self.last = int(steps["step"].iloc[-1]) if len(steps) else 0

    def describe(self, facts: dict[str, Any]) -> None:
        """Write facts in place of those of the same name, if that changes anything."""
        if any(name not in self._facts or self._facts[name] != facts[name] for name in facts):
            self._facts |= facts
            self.record.describe(self._facts)

    def change(self, facts: dict[str, Any]) -> None:
        """Take new facts; settings that an exploit has changed are kept in the rows before it."""
        old = {k: v for k, v in self._facts.items() if k in facts and facts[k] != v}
        settings = {k: v for k, v in old.items() if k in MetaConfig.flat_keys()}
        if settings:
            self.record.fill(settings)
        self.describe(facts)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, in place of those from its step on."""
        if row["step"] <= self.last:
            self.record.truncate(row["step"] - 1)
        changing = {k: self._facts[k] for k in MetaConfig.flat_keys() if k in self.record.columns}
        self.record.append(row | changing)
        self.last = row["step"]


def _number(record: TrialRecord) -> int:
    return int(record.path.name.rpartition("-")[2])


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
