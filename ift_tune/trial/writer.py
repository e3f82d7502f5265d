"""Writes the record of a trial, whoever steps it: this process, a worker, or one of Ray's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ift_tune.base.files import save_checkpoint, write_atomically
from ift_tune.base.status import RUNNING, StopReason, ending
from ift_tune.base.views import VIEWS_FILE, pack
from ift_tune.joint.config import MetaConfig
from ift_tune.trial.record import TrialRecord
from ift_tune.trial.trial import Trial

HYPERPARAMETERS = "hyperparameters.pt"


class TrialWriter:
    """Keeps a trial's record true while the trial runs.

    The trial may go back to an earlier step, after it was killed or restored, and its settings may
    change on the way, by an exploit of population based training.
    """

    def __init__(self, record: TrialRecord, facts: Mapping[str, Any]) -> None:
        """Take what is known of the trial; nothing is written before `begin`.

        Args:
            record: Where to write.
            facts: What is constant over the trial, as far as it is known.
        """
        self.record = record
        self._facts = dict(facts)
        self._written = False
        self._last: int | None = None  # step of the last row, once the file was looked at

    def begin(self, last_step: int | None = None) -> None:
        """Write that the trial runs.

        Args:
            last_step: The step it goes on after: rows of later ones are dropped. Default: each row
                takes the place of those from its step on when it comes.
        """
        if last_step is not None:
            self.record.truncate(last_step)
            self._last = last_step
        self.update(RUNNING)

    def update(self, facts: Mapping[str, Any]) -> None:
        """Write facts in place of those of the same name.

        Settings that differ from those before are kept in the rows so far: they were trained so.
        """
        old = {k: v for k, v in self._facts.items() if k in facts and facts[k] != v}
        if settings := {k: v for k, v in old.items() if k in MetaConfig.flat_keys()}:
            self.record.fill(settings)
        if old or not self._written or not facts.keys() <= self._facts.keys():
            self._facts |= facts
            self.record.describe(self._facts)
            self._written = True

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, in place of those from its step on."""
        if self._last is None or row["step"] <= self._last:
            self.record.truncate(row["step"] - 1)  # and half a line, if a kill has left one
        columns = self.record.columns
        changed = {k: self._facts[k] for k in MetaConfig.flat_keys() if k in columns}
        self.record.append(changed | dict(row))
        self._last = row["step"]

    def end(self, reason: StopReason, facts: Mapping[str, Any]) -> None:
        """Write how the trial ended, and what was measured at its end."""
        self.update({**facts, **ending(reason)})


def save_found(folder: Path, trial: Trial) -> None:
    """Write the hyperparameters that a trial has found, and their pictures, if there are any."""
    found = trial.found()
    if not found:
        return
    save_checkpoint(folder / HYPERPARAMETERS, found)
    if views := trial.views():
        write_atomically(folder / VIEWS_FILE, pack(views))


def take_found(source: Path, target: TrialRecord) -> None:
    """Copy what `save_found` wrote, if anything, into a record."""
    for name in (HYPERPARAMETERS, VIEWS_FILE):
        if (source / name).exists():
            target.write(name, (source / name).read_bytes())
