"""One session of a run, whatever runs the trials: refused or resumed, locked, and its tables."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ift_tune.base.environment import environment
from ift_tune.base.errors import MissingDependencyError, UsageError
from ift_tune.trial.directory import RunDirectory
from ift_tune.trial.runner import Interrupt
from ift_tune.trial.tables import Results


class Session:
    """What a single run, a study, a search with Ray and a comparison have around their trials.

    Made, it has refused what cannot be done and has written nothing. In `writing`, it holds the
    directory and listens for Ctrl-C; at the end it writes the tables.

    Attributes:
        run: The run directory.
        run_id: The run's id, in `writing`.
        extent: What the run shall hold in the end, of earlier sessions and of this one.
        interrupt: What Ctrl-C has asked for, in `writing`.
        tables: Both tables, after `writing`.
    """

    run_id: str
    interrupt: Interrupt
    tables: Results

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: bool,
        place: Mapping[str, Any] | None = None,
        extent: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Compare what is asked for with what the directory holds; see `RunDirectory.begin`.

        Args:
            out: The run directory.
            settings: Everything that decides the numbers.
            resume: Whether to go on with the run in `out`.
            place: Further settings that must not change.
            extent: Lists that may grow.

        Raises:
            RunExistsError: If `out` is not empty and `resume` is False.
            UsageError: If it holds a run with other settings.
        """
        self.run = RunDirectory(out, resume=resume)
        self._settings, self._place, self._extent = settings, place, extent
        self.run.check({**settings, **(place or {})})
        self.extent = self.run.extended(extent or {})

    @contextlib.contextmanager
    def writing(
        self,
        dry_check: Callable[[], object] | None = None,
        listening: Callable[[], AbstractContextManager[Interrupt]] | None = None,
    ) -> Iterator[None]:
        """Hold the directory while trials run, and write the tables afterwards.

        A call that turns out to be mistaken before its first trial leaves nothing behind, so that
        the corrected one is not refused.

        Args:
            dry_check: Finds mistakes before anything is written, missing data among them.
            listening: Listens for the user's wish to stop. Default: for Ctrl-C and SIGTERM.

        Raises:
            RunExistsError: If another process is at the run.
        """
        if dry_check is not None:
            dry_check()
        missing = [p for p in (self.run.path, *self.run.path.parents) if not p.exists()]
        with self.run.held(), self._leaving_nothing_if_refused(missing):
            # Another session may have ended since this one was made.
            self.extent = self.run.extended(self._extent or {})
            self.run_id = self.run.begin(
                self._settings,
                environment(),
                self._place,
                None if self._extent is None else self.extent,
            )
            with (listening or Interrupt().listening)() as self.interrupt:
                try:
                    yield
                finally:
                    self.tables = self.run.write_tables()

    @contextlib.contextmanager
    def _leaving_nothing_if_refused(self, missing: Sequence[Path]) -> Iterator[None]:
        fresh = self.run.is_empty()
        try:
            yield
        except (UsageError, MissingDependencyError):
            if fresh and not self.run.records():
                shutil.rmtree(self.run.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # somebody may have put something there
                    for folder in missing[1:]:
                        folder.rmdir()
                if not missing:
                    self.run.path.mkdir()
            raise
