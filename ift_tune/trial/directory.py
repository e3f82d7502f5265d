"""The directory that a run writes into: refused where two runs would mix, locked while in use."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ift_tune.base.errors import RunExistsError, UsageError
from ift_tune.base.files import write_atomically, write_table
from ift_tune.trial.record import TrialRecord, plain_json, records_in
from ift_tune.trial.tables import Results, assemble

_LOCK = ".lock"
_EXTENT = "extent"


class RunDirectory:
    """A directory that a run writes its tables into; it is made when something is written."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        """Take the directory.

        Args:
            path: The directory; it and its parents are made when they are needed.
            resume: Whether to go on with the run it holds.

        Raises:
            RunExistsError: If it is not empty and `resume` is False.
            UsageError: If it is a file.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; name a directory for the run")
        if not resume and not self.is_empty():
            raise RunExistsError(
                f"{self.path} already holds files; choose another --out, or --resume that run"
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
        return path.read_text()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep every other process from writing this run; the lock dies with the process.

        Raises:
            RunExistsError: If another process is at it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
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
        """Return the record of a trial, which need not exist yet."""
        return TrialRecord(self.path / f"trial-{number:05d}")

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials so far, in order, those of a comparison too."""
        return records_in(self.path)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise a `UsageError` if the directory holds a run with other settings."""
        if not (before := self._begun()):
            return
        now = json.loads(plain_json(settings))
        before.pop(_EXTENT, None)
        both = now.keys() & before
        changed = sorted((now.keys() ^ before) | {k for k in both if now[k] != before[k]})
        if changed:
            raise UsageError(
                f"{self.path} was begun with another {', '.join(changed)}; resume with the same "
                "settings, or start a new run in another directory"
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
    ) -> str:
        """Write what the run is and what it runs on beside the tables.

        Args:
            settings: Everything that decides the numbers, as plain values, ``task`` among them.
            environment: Versions and hardware.
            place: Further settings that must not change on resumption, but decide no number.
            extent: Lists that may grow when the run is resumed; see `extended`.

        Returns:
            The run's id, ``<task>-<hash of the settings>``: the same for the same settings.

        Raises:
            UsageError: If the directory holds a run with other settings.
        """
        whole = {**settings, **(place or {})}
        self.check(whole)
        if extent is not None:
            whole |= {_EXTENT: extent}
        self._write("run.json", plain_json(whole))
        self._note(environment)
        text = plain_json(dict(sorted(settings.items())))
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

    def _begun(self) -> dict[str, Any]:
        """Return what `begin` wrote; empty before."""
        path = self.path / "run.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    def _note(self, environment: Mapping[str, Any]) -> None:
        """Keep what the run began on, and the further commands that went on with it."""
        path = self.path / "environment.json"
        known = json.loads(path.read_bytes()) if path.exists() else dict(environment)
        command = environment.get("command")
        further = known.get("further_commands", [])
        if command != known.get("command") and command not in further:
            known["further_commands"] = [*further, command]
        self._write(path.name, plain_json(known))

    def _write(self, name: str, content: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / name, content)
