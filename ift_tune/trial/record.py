"""The record of a trial: its folder, and who keeps it true while the trial runs."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from ift_tune.base.cells import guarded, unguarded, unguarded_table
from ift_tune.base.checkpoints import save_checkpoint
from ift_tune.base.faults import writing
from ift_tune.base.files import (
    content_digest,
    damaged,
    flush,
    read_json,
    reading,
    signed_json,
    write_atomically,
)
from ift_tune.base.status import RUNNING, StopReason, TrialStatus, ending
from ift_tune.base.views import VIEWS_FILE, pack

if TYPE_CHECKING:
    from ift_tune.trial.trial import Trial


Row: TypeAlias = Mapping[str, Any]
_log = logging.getLogger(__name__)
_OF_SPLITS = ("search_", "test_", "val_test_gap")  # how the columns of an evaluation begin
_FOLDERS = ("trial-*", "cells/*/trial-*")  # of a run, and of the searches of a comparison
_ROWS, _KNOWN_BY = "rows", "known_by"  # in trial.json: how many rows there are, and their digest


class TrialRecord:
    """The folder of one trial; it is made when something is written into it."""

    def __init__(self, path: Path) -> None:
        """Take the folder's path."""
        self.path = path
        self.checkpoint = path / "checkpoint.pt"
        self._steps = path / "steps.csv"
        self._columns: list[str] | None = None

    @property
    def number(self) -> int:
        """The trial's number in its run."""
        return int(self.path.name.rpartition("-")[2])

    def describe(self, facts: Row, *, over: bool | None = None) -> None:
        """Write what is constant over the trial, and how it ended; replaces what was there.

        Args:
            facts: It.
            over: Whether all rows are there: by what they are known is written too, and `whole`
                compares. False: that there are at least so many; None: nothing of them.
        """
        noted = None if over is None else self._rows() | ({} if over else {_KNOWN_BY: None})
        self.write("trial.json", signed_json({**facts, _ROWS: noted}))

    def facts(self) -> dict[str, Any]:
        """Return what `describe` wrote last; empty before.

        Raises:
            UsageError: If it is damaged.
        """
        return self._read()[0]

    def whole(self) -> tuple[dict[str, Any], str]:
        """Return what `describe` wrote last and the text of the steps; both are empty before.

        Raises:
            UsageError: If they are damaged, or other rows are there than when the trial ended.
        """
        facts, noted = self._read()
        self._compare(noted)
        text = self.text()
        if not facts and (rows := text.count("\n") - 1) > 0:
            raise damaged(self.path / "trial.json", f"none beside {rows} rows")
        if noted is None and (gap := _gap(text)) is not None:
            _log.warning(
                "%s has no row of step %d: --resume takes it again, where the trial is not over",
                *(self._steps, gap),
            )
        return facts, text

    def _compare(self, noted: Mapping[str, Any] | None) -> None:
        """Hold the rows against what is noted of them; what is taken again is only said."""
        if noted is None or (found := self._rows()) == noted:
            return
        there, then = found["number"], noted["number"]
        if noted[_KNOWN_BY] is not None:
            raise damaged(
                self._steps,
                f"{there if there != then else 'other'} rows, where there were {then} when the "
                "trial ended",
            )
        if there < then:
            _log.warning(
                "%s has lost %d of at least %d rows: --resume takes them again",
                *(self._steps, then - there, then),
            )

    def _read(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the facts, and what is noted of the rows of a trial that is over."""
        path = self.path / "trial.json"
        if not path.exists():
            return {}, None
        facts = read_json(path)
        with reading(path):
            earlier = _ROWS not in facts  # always with a status
            noted = facts.pop(_ROWS, None)
            if earlier or "status" in facts:
                TrialStatus(facts["status"])
            if (reason := facts.get("stop_reason")) is not None:
                StopReason(reason)
            return facts, noted

    def _rows(self) -> dict[str, Any]:
        """Return how many rows there are, and by what they are known."""
        with reading(self._steps):
            content = self._steps.read_bytes() if self._steps.exists() else b""
        return {"number": max(0, content.count(b"\n") - 1), _KNOWN_BY: content_digest(content)}

    def write(self, name: str, content: bytes) -> None:
        """Write a file into the folder."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)

    @property
    def columns(self) -> list[str]:
        """What the rows hold so far."""
        if self._columns is None:
            self._columns = self._header()
        return self._columns

    def fill(self, values: Row) -> None:
        """Write constants into the rows so far, before they change in the middle of the trial."""
        table = self.steps()
        if len(table):
            new = {name: value for name, value in values.items() if name not in self.columns}
            self._rewrite(table.assign(**new), [*self.columns, *new])

    def flush(self) -> None:
        """Bring the rows so far to the disk: a checkpoint counts them."""
        if self._steps.exists():
            with writing(self._steps), self._steps.open("a") as file:
                flush(file)

    def known_steps(self) -> int:
        """Return up to which step the rows are all there."""
        table = self.steps()
        steps = table["step"].tolist() if len(table) else []
        return next((n for n, step in enumerate(steps) if step != n + 1), len(steps))

    def rows_digest(self, last_step: int) -> str | None:
        """Return by what the rows up to a step are known; None if they are not all there.

        It is of the values, which stay when columns are added.
        """
        digest, expected = hashlib.blake2b(digest_size=16), 1
        if not self._steps.exists():
            return digest.hexdigest() if last_step == 0 else None
        with reading(self._steps), self._steps.open(newline="") as file:
            for row in csv.DictReader(file):
                if expected > last_step:
                    break
                if row["step"] != str(expected):
                    return None
                values = sorted((k, _canonical(v)) for k, v in row.items() if v)
                digest.update(repr(values).encode())
                expected += 1
        return digest.hexdigest() if expected > last_step else None

    def append(self, row: Row) -> None:
        """Append one outer step; a column not seen before is added to the earlier rows, empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._rewrite(self.steps(), [*self.columns, *new])
        with writing(self._steps), self._steps.open("a", newline="") as file:
            _write(file, _cells(row, self.columns))

    def truncate(self, last_step: int) -> None:
        """Drop rows after `last_step`, and a torn last line: a resumed trial redoes them."""
        table = self.steps()
        self._rewrite(table[table["step"] <= last_step] if len(table) else table, self._header())

    def text(self) -> str:
        """Return the file of the steps written so far, without a half-written last line."""
        if not self._steps.exists():
            return ""
        with reading(self._steps):
            text = self._steps.read_bytes().decode()  # each line's end as it is
            if text and "\n" not in text:  # the head is never half-written
                raise ValueError("no head")
            return text[: text.rfind("\n") + 1]

    def steps(self) -> pd.DataFrame:
        """Return the steps written so far, without a half-written last line."""
        if not (text := self.text()):
            return pd.DataFrame()
        with reading(self._steps):
            return parsed(text)

    def _header(self) -> list[str]:
        if not self._steps.exists():
            return []
        with reading(self._steps), self._steps.open(newline="") as file:
            return [unguarded(name) for name in next(csv.reader(file), [])]

    def _rewrite(self, table: pd.DataFrame, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        buffer = io.StringIO()
        if self._columns:
            _write(buffer, [guarded(name) for name in self._columns])
            for row in table.to_dict("records"):
                _write(buffer, _cells(row, self._columns))
        self.write(self._steps.name, buffer.getvalue().encode())


def folder_name(number: int) -> str:
    """Return the name of a trial's folder."""
    return f"trial-{number:05d}"


def _gap(text: str) -> int | None:
    """Return the first step that is missing; one that took over another trial's state may skip."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    if "donor" in (rows.fieldnames or []):
        return None
    steps = {row["step"] for row in rows}
    return next((n for n in range(1, len(steps) + 1) if str(n) not in steps), None)


def records_in(path: Path) -> list[TrialRecord]:
    """Return the records of all trials of a run so far, in order, those of a comparison too."""
    folders = [p for pattern in _FOLDERS for p in sorted(path.glob(pattern)) if p.is_dir()]
    return [TrialRecord(folder) for folder in folders]


def parsed(text: str) -> pd.DataFrame:
    """Return the table that a file of steps holds.

    Raises:
        ValueError: If it is damaged.
    """
    table = unguarded_table(pd.read_csv(io.BytesIO(text.encode()), engine="pyarrow"))
    if "step" not in table:
        raise ValueError("no column 'step'")
    return table


def latest(steps: pd.DataFrame) -> dict[Any, Any]:
    """Return the latest value in each column of a trial's steps; empty without a step.

    Of the search and the test split, those of the last evaluation: empty where they were not
    finite, and not of an earlier one.
    """
    return latest_of(steps, np.zeros(len(steps), dtype=np.int64)).get(0, {})


def latest_of(steps: pd.DataFrame, trials: np.ndarray[Any, Any]) -> dict[int, dict[Any, Any]]:
    """Return `latest` of several trials.

    Args:
        steps: Their rows, of one trial after the other.
        trials: Of each row, a number of its trial.
    """
    if steps.empty:
        return {}
    last = steps.groupby(trials, sort=False).last()
    searched = [name for name in steps if str(name).startswith("search_")]
    of_splits = [name for name in steps if str(name).startswith(_OF_SPLITS)]
    evaluated = steps[searched].notna().any(axis="columns") | (not searched)
    now = steps[of_splits].set_axis(trials, axis="index")[evaluated.to_numpy()]
    now = now[~now.index.duplicated(keep="last")]
    found = dict(zip(last.index, last.to_dict("records"), strict=True))
    for name in of_splits:
        for trial, measured in zip(now.index, now[name].tolist(), strict=True):
            found[trial][name] = measured
    return found


def _canonical(text: str) -> str:
    """Return a value's text, the same of a whole number that has become a float on the way."""
    try:
        return repr(float(text))
    except ValueError:
        return text


def _write(file: IO[str], cells: Sequence[Any]) -> None:
    # Python quotes a cell with a line's end in it, but not with that of old Macs, which ends a row.
    if any(isinstance(cell, str) and "\r" in cell for cell in cells):
        csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL).writerow(cells)
    else:
        csv.writer(file, lineterminator="\n").writerow(cells)


def _cells(row: Mapping[Any, Any], columns: Sequence[str]) -> list[Any]:
    """Write floats so that they are read back to the bit, and missing values as nothing."""
    return [_cell(row.get(name)) for name in columns]


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return repr(float(value)) if isinstance(value, float) else guarded(value)


HYPERPARAMETERS, MODEL = "hyperparameters.pt", "model.pt"
_FOUND = (HYPERPARAMETERS, VIEWS_FILE, MODEL)


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
        self.update(RUNNING)  # first: the rows of an ended trial are known by what they are
        if last_step is not None:
            self.record.truncate(last_step)
            self._last = last_step

    def update(self, facts: Mapping[str, Any], *, over: bool | None = None) -> None:
        """Write facts in place of those of the same name.

        Settings that differ from those before are kept in the rows so far: they were trained so.

        Args:
            facts: They.
            over: What is noted of the rows, see `TrialRecord.describe`.
        """
        old = {k: v for k, v in self._facts.items() if k in facts and facts[k] != v}
        if settings := {k: v for k, v in old.items() if self._is_setting(k)}:
            self.record.fill(settings)
        if old or not self._written or not facts.keys() <= self._facts.keys():
            self._facts |= facts
            self.record.describe(self._facts, over=over)
            self._written = True

    def note_rows(self) -> None:
        """Write how many rows there are, which a checkpoint is about to count."""
        self.record.describe(self._facts, over=False)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, in place of those from its step on."""
        if self._last is None or row["step"] <= self._last:
            self.record.truncate(row["step"] - 1)  # and half a line, if a kill has left one
        columns = self.record.columns
        facts = self._facts
        changed = {k: facts[k] for k in columns if k in facts and self._is_setting(k)}
        self.record.append(changed | dict(row))
        self._last = row["step"]

    @staticmethod
    def _is_setting(key: str) -> bool:
        # Whoever only reads records does without PyTorch, which comes with this.
        from ift_tune.joint.config import MetaConfig

        return MetaConfig.is_key(key)

    def end(self, reason: StopReason, facts: Mapping[str, Any]) -> None:
        """Write how the trial ended, and what was measured at its end."""
        over = reason is not StopReason.INTERRUPTED
        self.update({**facts, **ending(reason)}, over=over)


def save_found(folder: Path, trial: Trial) -> None:
    """Write the hyperparameters that a trial has found, with their pictures and its best model."""
    found = trial.found()
    if found:
        save_checkpoint(folder / HYPERPARAMETERS, found)
    if (kept := trial.kept()) is not None:
        save_checkpoint(folder / MODEL, kept)
    if not found:
        return
    try:
        views = pack(drawn) if (drawn := trial.views()) else None
    except Exception as error:  # noqa: BLE001 - no picture is worth the trial behind it
        _log.warning("there are no pictures of λ: its views() failed: %r", error)
        return
    if views is not None:
        write_atomically(folder / VIEWS_FILE, views)


def take_found(source: Path, target: TrialRecord) -> None:
    """Copy what `save_found` wrote, if anything, into a record."""
    for name in _FOUND:
        if (source / name).exists():
            target.write(name, (source / name).read_bytes())


def drop_found(record: TrialRecord) -> None:
    """Remove what `save_found` wrote into a record, if anything."""
    for name in _FOUND:
        (record.path / name).unlink(missing_ok=True)
