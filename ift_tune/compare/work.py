"""The searches of a comparison as work for processes: who has one, and how it is done."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import Timeout

from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import Interrupted
from ift_tune.base.files import write_atomically
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.locks import ProcessLock
from ift_tune.base.status import StopReason, TrialStatus, ending
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.packed import PackedSearches, pack_of
from ift_tune.joint.callbacks import Callback
from ift_tune.search.loop import StudyLoop
from ift_tune.search.work import FolderWork, Worker
from ift_tune.trial.tables import RunDirectory

_LOCK, _OWNER, _FINISHED = ".lock", "owner", "finished"


@dataclass(frozen=True)
class ComparisonWork(FolderWork):
    """The searches of a comparison, for any number of processes.

    A process owns a search while it holds the lock in its folder. The lock dies with it, so what
    a killed process has left is simply free again.

    Attributes:
        comparison: What they are part of.
        cells: The searches.
        out: The run directory.
        facts: Constant columns of the tables.
        device: Where trials run.
        joint_callbacks: With hooks of the optimisation, for every trial.
        pack: How many searches of a process have a trial each that advance together.
    """

    comparison: Comparison
    cells: tuple[Cell, ...]
    out: Path
    facts: dict[str, Any]
    device: str
    joint_callbacks: Sequence[Callback] = ()
    pack: int = 1

    def on(self, device: str) -> ComparisonWork:
        """Return the same work for a process that has this device."""
        return replace(self, device=device)

    def do(
        self,
        worker: Worker,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Run searches that nobody is at, until none is left; packed, some at a time."""
        if self.pack > 1:
            self._do_packed(worker, callbacks, interrupt, on_done)
        for number in self.unfinished():
            if interrupt.requested:
                raise Interrupted("interrupted between searches")
            with self._begun(number, worker, callbacks, interrupt) as loop:
                if loop is None:
                    continue
                loop.run()
                self.finish(number)
            on_done(number)

    def _do_packed(
        self,
        worker: Worker,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Run searches that nobody is at, with a trial of each at a time."""
        todo = self.unfinished()
        if not todo:
            return
        seeds = [self.cells[number].seed for number in todo]
        PackedSearches(
            pack_of(self.comparison, seeds, resolve_device(self.device)),
            self.pack,
            todo,
            begun=lambda number: self._begun(number, worker, callbacks, interrupt),
            finish=self.finish,
            on_done=on_done,
            name_of=self.name_of,
            interrupt=interrupt,
        ).run()

    @contextlib.contextmanager
    def _begun(
        self, number: int, worker: Worker, callbacks: Sequence[Callback], interrupt: Interrupt
    ) -> Iterator[StudyLoop | None]:
        """Hold a search and give what runs it; None if another process does, or it is finished."""
        folder = self.folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = ProcessLock(folder / _LOCK).acquire(timeout=0)
        except Timeout:
            yield None
            return
        with lock:
            if (folder / _FINISHED).exists():
                yield None
                return
            write_atomically(folder / _OWNER, worker.mark.encode())
            yield self._loop(
                number,
                folder,
                device=self.device,
                callbacks=callbacks,
                interrupt=interrupt,
                on_done=lambda _: None,
            )

    def do_item(
        self,
        number: int,
        folder: Path,
        *,
        device: str,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
    ) -> None:
        """Run a search, or go on with it; see `FolderWork.do_item`.

        One process at a time has the folder. A trial in it that is marked as running was begun by
        one that is gone, and goes on here: the worker's new name tells that it is nobody else's.
        """
        self._loop(
            number,
            folder,
            device=device,
            callbacks=callbacks,
            interrupt=interrupt,
            on_done=on_done,
        ).run()

    def _loop(self, number: int, folder: Path, **how: Any) -> StudyLoop:
        """Return what does an item; see `do_item`."""
        return self.cells[number].loop(
            self.comparison,
            folder,
            self.facts,
            Worker(uuid.uuid4().hex),
            joint_callbacks=self.joint_callbacks,
            **how,
        )

    def folder(self, number: int) -> Path:
        """Return the folder of a search."""
        return self.cells[number].directory(self.out)

    def unfinished(self) -> list[int]:
        """Return the searches that are still to do."""
        return [n for n in range(len(self.cells)) if not (self.folder(n) / _FINISHED).exists()]

    def finish(self, number: int) -> None:
        """Mark a search as finished."""
        write_atomically(self.folder(number) / _FINISHED, b"")

    @property
    def wanted_device(self) -> str:  # type: ignore[override]
        """What the user asked for."""
        return self.comparison.device

    def left_by(self, worker: Worker) -> int | None:
        """Return the search that a worker that died was at."""
        for number in self.unfinished():
            owner = self.folder(number) / _OWNER
            if owner.is_file() and owner.read_bytes() == worker.mark.encode():
                return number
        return None

    def name_of(self, number: int) -> str:
        """Return "ift with seed 3"."""
        return self.cells[number].name

    def give_up(self, number: int) -> None:
        """Say in the tables that the trial at which processes died has failed."""
        run = RunDirectory(self.folder(number), resume=True)
        for record in run.records():
            facts = record.facts()
            if facts.get("status") == TrialStatus.RUNNING:
                record.describe(facts | ending(StopReason.FAILED))
