"""The tables of a run, and the directory that holds them with everything else of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import Timeout

from ift_tune.base.arguments import require_path, require_writable
from ift_tune.base.command import COMMAND, current_command
from ift_tune.base.errors import RunExistsError, UsageError
from ift_tune.base.files import (
    damaged,
    drop_leftovers,
    plain_json,
    read_json,
    read_parquet,
    reading,
    signed_json,
    write_atomically,
    write_table,
)
from ift_tune.base.identity import known_as, require_same, without_factory
from ift_tune.base.locks import ProcessLock
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import FAULT, StopReason
from ift_tune.base.views import VIEWS_FILE, View, unpack
from ift_tune.trial.diagnoses import DIAGNOSES
from ift_tune.trial.record import TrialRecord, folder_name, records_in
from ift_tune.trial.showing import card_of_tables
from ift_tune.trial.stacking import ordered, stack

IDENTITY_COLUMNS = ("run_id", "task", "arm", "seed", "trial", "step", "status", "stop_reason")

METRIC_COLUMNS = tuple(
    f"{split}_{kind}" for kind in ("loss", "error") for split in ("train", "val", "search", "test")
)

COST_COLUMNS = ("wall_seconds", "gradient_equivalents", "hvps", "peak_memory_bytes", "device")
INTEGER_COLUMNS = ("seed", "trial", "step", "hvps", "peak_memory_bytes", "donor")

TEXT_COLUMNS = (
    *("run_id", "task", "arm", "status", "stop_reason", "device", "solve_status"),
    "start_check_status",
    *("learned_words", DIAGNOSES, FAULT),
)

MEASURED_COLUMNS = ("wall_seconds", "peak_memory_bytes")
"""Columns that a second run with the same seed does not repeat; all others it does, on the CPU."""

_FIRST_COLUMNS = (*IDENTITY_COLUMNS, *METRIC_COLUMNS, "retrained_test_error", *COST_COLUMNS)

_ABOUT = ("run", "environment")  # the JSON files that say what the tables are of

VIEWS = "views"
"""Attribute of the `trials` table: pictures of λ of the first trial that has some, as JSON."""


class _Tables(NamedTuple):
    trials: pd.DataFrame
    steps: pd.DataFrame


class Results(_Tables):
    """Both tables of a run: ``trials, steps = results``.

    Shown in a notebook, or printed, it says how the trials ended and which is the best.
    """

    _folder: Path | None = None

    def of(self, folder: Path) -> Results:
        """Return them with the run directory that they are of."""
        self._folder = folder
        return self

    def __repr__(self) -> str:
        return card_of_tables(*self, self._folder).text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return card_of_tables(*self, self._folder).html()


def load_results(path: str | os.PathLike[str]) -> Results:
    """Return the tables of a run, finished or not, whichever backend wrote it.

    Args:
        path: The run directory.

    Returns:
        ``(trials, steps)``, also as attributes. `steps` has a row per outer step with its trial's
        constants repeated, `trials` the last of each.

    Raises:
        UsageError: If the directory holds no run.

    Example:
        >>> from ift_tune import Budget, load_results, testing
        >>> from ift_tune.trial.session import run_single
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> outcome = run_single(problem, Budget(outer_steps=3), out="runs/mine", device="cpu")
        >>> trials, steps = load_results("runs/mine")
        >>> trials[["trial", "step", "status", "stop_reason"]].to_dict("records")
        [{'trial': 0, 'step': 3, 'status': 'complete', 'stop_reason': 'done'}]
        >>> len(steps)
        3
    """
    path = require_path("the run directory", path)
    if any((record.path / "trial.json").exists() for record in records_in(path)):
        return assemble(path)
    if all((path / f"{name}.parquet").exists() for name in Results._fields):
        return Results(*(read_parquet(path / f"{n}.parquet") for n in Results._fields)).of(path)
    raise UsageError(f"{path} holds no run: no trial-*/ and no trials.parquet with steps.parquet")


def load_views(path: str | os.PathLike[str]) -> dict[str, list[View]]:
    """Return the pictures of λ, as data, of every finished trial of a run that has some.

    Args:
        path: The run directory.

    Returns:
        The views by the name of the trial's folder; where only the tables are left, those that
        they hold.

    Raises:
        UsageError: If the directory holds no run.
    """
    records = records_in(require_path("the run directory", path))
    if not records:
        return {"": unpack(load_results(path).trials.attrs.get(VIEWS, "[]"))}
    files = {record.path.name: record.path / VIEWS_FILE for record in records}
    found = {}
    for name, file in files.items():
        if file.exists():
            with reading(file):
                found[name] = unpack(file.read_bytes())
    return found


def assemble(path: Path) -> Results:
    """Return both tables; their ``attrs`` hold what run.json and environment.json say.

    Parquet keeps the attributes, so that the tables alone tell what they are of.
    """
    records = records_in(path)
    files = {name: path / f"{name}.json" for name in _ABOUT}
    about = {name: read_json(file) for name, file in files.items() if file.exists()}
    run = about.get("run", {})
    parts = stack(records, run.get("metric"), run.get("mode") or "min")
    results = Results(*(_typed(ordered(part, _FIRST_COLUMNS)) for part in parts)).of(path)
    for name, value in baseline_in(path).items():
        results.trials[name] = value
    Objectives.of_run(run).mark(results.trials)
    for table in results:
        table.attrs.update(about)
    packed = (record.path / VIEWS_FILE for record in records)
    if (first := next((file for file in packed if file.exists()), None)) is not None:
        with reading(first):
            unpack(text := first.read_text())
        results.trials.attrs[VIEWS] = text
    return results


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    """Give each column of a table one type."""
    empty = table.columns[table.isna().all()]
    types = {name: object if name in TEXT_COLUMNS else float for name in empty}
    integers = {name: table[name] for name in table if name in INTEGER_COLUMNS}
    whole = {name: pd.to_numeric(column).astype("Int64") for name, column in integers.items()}
    return table.astype(types).assign(**whole)


BASELINE = "baseline"
"""Folder of a run with its plain training, whose scores the `trials` table has as ``baseline_...``.
"""


def baseline_in(path: Path) -> dict[str, Any]:
    """Return what the plain training beside a run scored, as ``baseline_...``."""
    facts = TrialRecord(path / BASELINE).facts()
    done = facts.get("stop_reason") == StopReason.DONE
    scores = {k: v for k, v in facts.items() if k.startswith(("search_", "test_"))}
    return {f"{BASELINE}_{name}": value for name, value in scores.items() if done}


_LOCK = ".lock"
_EXTENT = "extent"


class RunDirectory:
    """A directory that a run writes its tables into; it is made when something is written.

    `run_single`, `run_study` and `run_comparison` take its path as `out`. A study that is
    optimised by oneself is given it as ``IFTObjective(..., run=RunDirectory(path))``.

    Example:
        >>> from ift_tune import RunDirectory
        >>> RunDirectory("runs/mine").is_empty()
        True
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Take the directory.

        Args:
            path: The directory; it and its parents are made when they are needed.
            resume: Whether to go on with the run it holds.

        Raises:
            RunExistsError: If it is not empty and `resume` is False.
            UsageError: If it is a file.
        """
        self.path = require_path("the run directory", path)
        if self.path.is_file():
            raise UsageError(f"{self.path} is a file; name a directory for the run")
        require_writable("the run directory", self.path)
        if not resume and not self.is_empty():
            raise RunExistsError(
                f"{self.path} already holds files; choose another --out, or --resume that run "
                "(in Python: out=, resume=True)"
            )
        self._written, self._writing = 0.0, 0.0

    def is_empty(self) -> bool:
        """Return whether it holds nothing, or is not there."""
        # A lock alone is left by a run that was refused before it began.
        return not self.path.is_dir() or not {p.name for p in self.path.iterdir()} - {_LOCK}

    @property
    def token(self) -> str:
        """A random name of this directory, by which a shared study tells whose a trial is."""
        path = self.path / "token"
        if not path.exists():
            self._write("token", uuid.uuid4().hex.encode())
        with reading(path):
            token = path.read_text()
        if re.fullmatch("[0-9a-f]{32}", token) is None:
            raise damaged(path, f"{len(token)} characters, where 32 hexadecimal digits should be")
        return token

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from writing this run; the lock dies with the process.

        Raises:
            RunExistsError: If another process is at it.
        """
        missing = [p for p in (self.path, *self.path.parents) if not p.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UsageError(
                f"{self.path} cannot be made: name a directory that you may write to, got "
                f"{error.strerror}"
            ) from error
        try:
            lock = ProcessLock(self.path / _LOCK).acquire(timeout=0)
        except Timeout:
            raise RunExistsError(
                f"another process is at work on the run in {self.path}: wait for it, or stop it "
                "and --resume"
            ) from None
        try:
            with lock:
                drop_leftovers(self.path)
                yield
        finally:
            self._leave_nothing(missing)

    def _leave_nothing(self, made: Sequence[Path]) -> None:
        """Remove the folders that were made for a run of which nothing has been written."""
        if made and self.is_empty():
            (self.path / _LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody may have put something there
                for folder in made:
                    folder.rmdir()

    def trial(self, number: int) -> TrialRecord:
        """Return the record of a trial, which need not exist yet."""
        return TrialRecord(self.path / folder_name(number))

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials so far, in order, those of a comparison too."""
        return records_in(self.path)

    def baseline(self) -> dict[str, Any]:
        """Return what the plain training beside the run scored, as ``baseline_...``."""
        return baseline_in(self.path)

    def check(self, settings: Mapping[str, Any], formerly: Mapping[str, Any] | None = None) -> None:
        """Raise a `UsageError` if the directory holds a run with other settings.

        Args:
            settings: Those asked for.
            formerly: How earlier versions wrote some of them.
        """
        if before := self.settings():
            now = json.loads(plain_json(settings))
            same = {k: now[k] for k, v in (formerly or {}).items() if v == before.get(k)}
            before |= same
            require_same(
                str(self.path),
                *without_factory(str(self.path), before, now),
                mend="resume with the same settings, or start a new run in another directory",
            )

    def extended(self, extent: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the run's lists so far, such as its seeds, each with the new entries after it."""
        before = self._begun().get(_EXTENT, {})
        return {k: list(dict.fromkeys([*before.get(k, []), *v])) for k, v in extent.items()}

    def begin(
        self,
        settings: Mapping[str, Any],
        environment: Mapping[str, Any],
        place: Mapping[str, Any] | None = None,
        extent: Mapping[str, Sequence[Any]] | None = None,
        formerly: Mapping[str, Any] | None = None,
    ) -> str:
        """Write what the run is and what it runs on beside the tables.

        Args:
            settings: Everything that decides the numbers, as plain values, ``task`` among them.
            environment: Versions and hardware.
            place: Further settings that must not change on resumption, but decide no number.
            extent: Lists that may grow when the run is resumed; see `extended`.
            formerly: How earlier versions wrote some of `place`, which is written as now.

        Returns:
            The run's id, ``<task>-<hash of the settings>``: the same for the same settings.

        Raises:
            UsageError: If the directory holds a run with other settings.
        """
        whole = {**settings, **(place or {})}
        self.check(whole, formerly)
        before = self.settings()
        known = known_as(before, settings)
        whole = {**before, **{k: whole[k] for k in formerly or {}}} if before else whole
        if extent is not None:
            whole = {**whole, _EXTENT: extent}
        if (command := current_command()) is not None:
            whole = {**whole, COMMAND: command}
        self._write("run.json", signed_json(whole))
        self._note(environment)
        text = plain_json(dict(sorted(known.items())))
        return f"{settings['task']}-{hashlib.sha256(text).hexdigest()[:8]}"

    def refresh_tables(self) -> None:
        """Write both tables, unless that would take more than a twentieth of the time."""
        if time.monotonic() - self._written >= 20.0 * self._writing:
            started = time.monotonic()
            self.write_tables()
            self._written = time.monotonic()
            self._writing = self._written - started

    def write_tables(self) -> Results:
        """Write both tables as parquet and CSV, and return them."""
        results = assemble(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for name, table in zip(Results._fields, results, strict=True):
            write_table(self.path / name, table)
        return results

    def settings(self) -> dict[str, Any]:
        """Return the settings of the run that it holds; empty if it holds none."""
        return {k: v for k, v in self._begun().items() if k not in (_EXTENT, COMMAND)}

    def command(self) -> dict[str, dict[str, Any]]:
        """Return the settings of the command that began it, by its name; none of a call."""
        noted = self._begun().get(COMMAND)
        return noted if isinstance(noted, dict) else {}

    def _begun(self) -> dict[str, Any]:
        """Return what `begin` wrote; empty before."""
        path = self.path / "run.json"
        if not path.exists():
            return {}
        begun = read_json(path)
        if not isinstance(begun.get("task"), str):
            raise damaged(path, f"task {begun.get('task')!r}")
        return begun

    def _note(self, environment: Mapping[str, Any]) -> None:
        """Keep what the run began on, and the further commands that went on with it."""
        path = self.path / "environment.json"
        known = read_json(path) if path.exists() else dict(environment)
        command = environment.get("command")
        further = known.get("further_commands", [])
        if command != known.get("command") and command not in further:
            known["further_commands"] = [*further, command]
        self._write(path.name, signed_json(known))

    def _write(self, name: str, content: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)
