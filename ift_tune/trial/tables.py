"""The two result tables, `trials` and `steps`: written as the run goes, loaded by `load_results`.

A run directory holds one folder per trial, ``trial-00003/``, with ``trial.json`` (what is constant
over the trial and how it ended) and ``steps.csv`` (one line per outer step, appended and flushed).
The tables are put together from these at every trial's end and by `load_results`, so a kill loses
at most the outer step it interrupts, and several processes can write trials of one run.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
from filelock import FileLock, Timeout

from ift_tune.base.errors import RunExistsError, UsageError
from ift_tune.base.files import write_atomically
from ift_tune.base.views import VIEWS_FILE, View, unpack

Row: TypeAlias = Mapping[str, Any]


IDENTITY_COLUMNS = ("run_id", "task", "arm", "seed", "trial", "step", "status", "stop_reason")


METRIC_COLUMNS = tuple(
    f"{split}_{kind}" for kind in ("loss", "error") for split in ("train", "val", "search", "test")
)


COST_COLUMNS = ("wall_seconds", "gradient_equivalents", "hvps", "peak_memory_bytes", "device")


INTEGER_COLUMNS = ("seed", "trial", "step", "hvps", "peak_memory_bytes", "donor")


TEXT_COLUMNS = (
    "run_id",
    "task",
    "arm",
    "status",
    "stop_reason",
    "device",
    "solve_status",
    "learned_words",
)


MEASURED_COLUMNS = ("wall_seconds", "peak_memory_bytes")
"""Columns that a second run with the same seed does not repeat; all others it does, on the CPU."""


_LOCK = ".lock"


_EXTENT = "extent"


_TRIALS = ("trial-*", "cells/*/trial-*")


_ABOUT = ("run", "environment")  # the JSON files that say what the tables are of


VIEWS = "views"
"""Attribute of the `trials` table: pictures of λ of the first trial that has some, as JSON."""


class Results(NamedTuple):
    """Both tables of a run."""

    trials: pd.DataFrame
    steps: pd.DataFrame


class RunDirectory:
    """A directory that a run writes its tables into."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Open or make the directory.

        Args:
            path: The directory; it and its parents are made.
            resume: Whether to go on with the run it holds.

        Raises:
            RunExistsError: If it is not empty and `resume` is False.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; name a directory for the run")
        # A lock alone is left by a run that was refused before it began.
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} - {_LOCK} and not resume:
            raise RunExistsError(
                f"{self.path} already holds files; choose another --out, or --resume that run"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._written, self._writing = 0.0, 0.0

    @property
    def token(self) -> str:
        """A random name of this directory, by which a shared study tells whose a trial is."""
        path = self.path / "token"
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex.encode())
        return path.read_text()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from writing this run; the lock dies with the process.

        Raises:
            RunExistsError: If another process is at it.
        """
        try:
            lock = FileLock(self.path / _LOCK).acquire(timeout=0)
        except Timeout:
            raise RunExistsError(
                f"another process is at work on the run in {self.path}: wait for it, or stop it "
                "and --resume"
            ) from None
        with lock:
            yield

    def trial(self, number: int) -> TrialRecord:
        """Return the record of a trial; it is made when it does not exist."""
        return TrialRecord(self.path / f"trial-{number:05d}")

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials so far, in order, those of a comparison too."""
        folders = [p for pattern in _TRIALS for p in sorted(self.path.glob(pattern)) if p.is_dir()]
        return [TrialRecord(path) for path in folders]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise a `UsageError` if the directory holds a run with other settings."""
        path = self.path / "run.json"
        if not path.exists():
            return
        before, now = json.loads(path.read_bytes()), json.loads(_json(settings))
        before.pop(_EXTENT, None)
        both = now.keys() & before
        changed = sorted((now.keys() ^ before) | {k for k in both if now[k] != before[k]})
        if changed:
            raise UsageError(
                f"{self.path} was begun with another {', '.join(changed)}; resume with the same "
                "settings, or start a new run in another directory"
            )

    def extended(self, extent: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the lists of what the run shall hold, after those that it has been begun with."""
        path = self.path / "run.json"
        before = json.loads(path.read_bytes()).get(_EXTENT, {}) if path.exists() else {}
        return {k: list(dict.fromkeys([*before.get(k, []), *v])) for k, v in extent.items()}

    def begin(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        place: Mapping[str, Any] | None = None,
        extent: Mapping[str, Sequence[Any]] | None = None,
    ) -> str:
        """Write what the run is and what it runs on beside the tables.

        Args:
            settings: Everything that decides the numbers, as plain values, ``task`` among them.
            environment: Versions and hardware.
            place: Further settings that must not change on resumption, but decide no number.
            extent: Lists of what the run shall hold; see `extended`.

        Returns:
            The run's id, ``<task>-<hash of the settings>``: the same for the same settings.

        Raises:
            UsageError: If the directory holds a run with other settings.
        """
        whole = {**settings, **(place or {})}
        self.check(whole)
        if extent is not None:
            whole |= {_EXTENT: extent}
        write_atomically(self.path / "run.json", _json(whole))
        self._note(environment)
        text = _json(dict(sorted(settings.items())))
        return f"{settings['task']}-{hashlib.sha256(text).hexdigest()[:8]}"

    def _note(self, environment: Mapping[str, Any]) -> None:
        """Keep what the run began on, and the further commands that went on with it."""
        path = self.path / "environment.json"
        known = json.loads(path.read_bytes()) if path.exists() else dict(environment)
        command = environment.get("command")
        further = known.get("further_commands", [])
        if command != known.get("command") and command not in further:
            known["further_commands"] = [*further, command]
        write_atomically(path, _json(known))

    def refresh_tables(self) -> None:
        """Write both tables, unless that would take more than a twentieth of the time."""
        if time.monotonic() - self._written >= 20.0 * self._writing:
            started = time.monotonic()
            self.write_tables()
            self._written = time.monotonic()
            self._writing = self._written - started

    def assembled(self) -> Results:
        """Return both tables; their ``attrs`` hold what run.json and environment.json say.

        Parquet keeps the attributes, so that the tables alone tell what they are of.
        """
        results = _assemble(self.records())
        for name in _ABOUT:
            path = self.path / f"{name}.json"
            if path.exists():
                for table in results:
                    table.attrs[name] = json.loads(path.read_bytes())
        packed = (record.path / VIEWS_FILE for record in self.records())
        if (first := next((path for path in packed if path.exists()), None)) is not None:
            results.trials.attrs[VIEWS] = first.read_text()
        return results

    def write_tables(self) -> Results:
        """Write both tables as parquet and CSV, and return them."""
        results = self.assembled()
        for name, table in zip(Results._fields, results, strict=True):
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False)
            write_atomically(self.path / f"{name}.parquet", buffer.getvalue())
            write_atomically(self.path / f"{name}.csv", table.to_csv(index=False).encode())
        return results


class TrialRecord:
    """The folder of one trial: its constants, its steps, its checkpoint."""

    def __init__(self, path: Path) -> None:
        """Open or make the folder."""
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)
        self.checkpoint = path / "checkpoint.pt"
        self._steps = path / "steps.csv"
        self._columns: list[str] | None = None

    def describe(self, facts: Row) -> None:
        """Write what is constant over the trial, and how it ended; replaces what was there."""
        write_atomically(self.path / "trial.json", _json(facts))

    def facts(self) -> dict[str, Any]:
        """Return what `describe` wrote last; empty before."""
        path = self.path / "trial.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

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

    def append(self, row: Row) -> None:
        """Append one outer step; a column not seen before is added to the earlier rows, empty."""
        new = [name for name in row if name not in self.columns]
        if new:
            self._rewrite(self.steps(), [*self.columns, *new])
        with self._steps.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(_exact(row))

    def truncate(self, last_step: int) -> None:
        """Drop rows after `last_step`, and a torn last line: a resumed trial redoes them."""
        table = self.steps()
        self._rewrite(table[table["step"] <= last_step] if len(table) else table, self._header())

    def steps(self) -> pd.DataFrame:
        """Return the steps written so far, without a half-written last line."""
        if not self._steps.exists():
            return pd.DataFrame()
        text = self._steps.read_text()
        text = text[: text.rfind("\n") + 1]
        if not text:
            return pd.DataFrame()
        return pd.read_csv(io.BytesIO(text.encode()), engine="pyarrow")

    def _header(self) -> list[str]:
        if not self._steps.exists():
            return []
        with self._steps.open(newline="") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, table: pd.DataFrame, columns: Sequence[str]) -> None:
        self._columns = list(columns)
        buffer = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(buffer, self._columns, lineterminator="\n")
            writer.writeheader()
            for row in table.to_dict("records"):
                writer.writerow(_exact(row))
        write_atomically(self._steps, buffer.getvalue().encode())


def load_results(path: str | os.PathLike[str]) -> Results:
    """Return the tables of a run, finished or not, whichever backend wrote it.

    Args:
        path: The run directory.

    Returns:
        ``(trials, steps)``, also as attributes. Both have the columns of `schema`: `steps` has a
        row per outer step with its trial's constants repeated, `trials` the last of each.

    Raises:
        UsageError: If the directory holds no run.
    """
    path = Path(path)
    if any(found for pattern in _TRIALS for found in path.glob(f"{pattern}/trial.json")):
        return RunDirectory(path, resume=True).assembled()
    if all((path / f"{name}.parquet").exists() for name in Results._fields):
        return Results(*(pd.read_parquet(path / f"{name}.parquet") for name in Results._fields))
    raise UsageError(f"{path} holds no run: no trial-*/ and no trials.parquet with steps.parquet")


def load_views(path: str | os.PathLike[str]) -> dict[str, list[View]]:
    """Return the pictures of λ, as data, of every finished trial of a run that has some.

    Args:
        path: The run directory.

    Returns:
        The views by the name of the trial's folder; where only the tables are left, those that
        they hold.
    """
    records = RunDirectory(path, resume=True).records()
    if not records:
        return {"": unpack(load_results(path).trials.attrs.get(VIEWS, "[]"))}
    files = {record.path.name: record.path / VIEWS_FILE for record in records}
    return {name: unpack(file.read_bytes()) for name, file in files.items() if file.exists()}


def _assemble(records: Sequence[TrialRecord]) -> Results:
    trials, steps = [], []
    for record in records:
        facts = record.facts()
        if not facts:
            continue
        table = record.steps()
        last: dict[Any, Any] = table.ffill().iloc[-1].to_dict() if len(table) else {}
        if len(table):
            constants = {key: value for key, value in facts.items() if key not in table.columns}
            steps.append(pd.DataFrame({**table, **constants}, index=table.index))
        trials.append(pd.DataFrame([{**last, **facts}]))
    return Results(_ordered(trials), _ordered(steps))


def _ordered(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Stack tables, with the fixed columns first and in their order, each column of one type."""
    known = [*IDENTITY_COLUMNS, *METRIC_COLUMNS, "retrained_test_error", *COST_COLUMNS]
    extra = list(dict.fromkeys(key for part in parts for key in part if key not in known))
    filled = [part.dropna(axis="columns", how="all") for part in parts]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
    table = table.reindex(columns=[*known, *extra])
    for column in table:
        if column in INTEGER_COLUMNS:
            table[column] = pd.to_numeric(table[column]).astype("Int64")
        elif table[column].isna().all():
            table[column] = table[column].astype(object if column in TEXT_COLUMNS else float)
    return table


def _exact(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Write floats so that they are read back to the bit, and missing values as nothing."""
    return {
        key: None
        if value is None or (isinstance(value, float) and math.isnan(value))
        else repr(float(value))
        if isinstance(value, float)
        else value
        for key, value in row.items()
    }


def _json(content: Row) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
