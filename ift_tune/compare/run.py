"""Run a comparison: arms times seeds, side by side, resumable at every trial."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ift_tune.checkpoint import write_atomically
from ift_tune.compare.arms import get_arms
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.devices import resolve_device
from ift_tune.environment import environment
from ift_tune.errors import UsageError
from ift_tune.search import Listener
from ift_tune.search.facts import ending
from ift_tune.search.runner import Interrupt, Interrupted
from ift_tune.search.shares import Share, cores, describe, divide, visible_gpus
from ift_tune.search.storage import quiet_optuna
from ift_tune.search.work import Work, Worker
from ift_tune.search.workers import check_importable, run_workers
from ift_tune.tables import Results, RunDirectory
from ift_tune.types import StopReason

DEFAULT_ARMS = ("ift", "random", "tpe", "none")
_LOCK, _OWNER, _FINISHED = ".lock", "owner", "finished"


def run_comparison(
    comparison: Comparison,
    *,
    out: str | Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 10,
    first_seed: int = 0,
    workers: int = 1,
    gpus_per_trial: float | None = None,
    resume: bool = False,
    told: Callable[[Cell, int, int], None] | None = None,
    listener: Listener | None = None,
) -> Results:
    """Compare ways to choose hyperparameters at equal budget.

    Every arm sees the same splits, initial weights and order of batches for a seed. Each search
    is an Optuna study of its own, in ``<out>/cells/ARM-SEED``.

    Args:
        comparison: The task and the budget.
        out: Run directory; refused if it holds anything, unless `resume`.
        arms: Names from `ARMS`. A resumed comparison may have further ones.
        seeds: How many; a resumed comparison may have more.
        first_seed: The first of them.
        workers: Processes that run searches side by side, each on its share of the machine. A
            script that asks for several needs ``if __name__ == "__main__":``.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0. Default: what there is, divided.
        resume: Go on with the comparison in `out`.
        told: Called when a search is finished, with it, with the number of finished ones and with
            the number of all.
        listener: Told what the workers are given, and how trials go; trials of different searches
            have numbers of their own.

    Returns:
        Both tables, over all searches.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If a worker's process fails.
    """
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    chosen = get_arms(arms)
    cells = [Cell(arm, seed) for seed in range(first_seed, first_seed + seeds) for arm in chosen]
    shares = _shares(workers, comparison.device, gpus_per_trial)
    if shares:
        check_importable(comparison, cells)
    where = resolve_device("cpu" if shares else comparison.device)
    settings = comparison.settings()
    run = RunDirectory(out, resume=resume)
    run.check(settings)
    if not resume:
        comparison.check(where, first_seed)
    with run.held():
        wanted: dict[str, list[Any]] = {
            "arms": [arm.name for arm in chosen],
            "seeds": [cell.seed for cell in cells],
        }
        run_id = run.begin(settings, environment(), extent=wanted)
        facts = {"run_id": run_id, "task": comparison.task}
        work = ComparisonWork(comparison, tuple(cells), run.path, facts, comparison.device)
        finished: set[int] = set()

        def one_more(number: int) -> None:
            run.refresh_tables()
            finished.add(number)
            if told is not None:
                told(cells[number], len(finished), len(cells))

        interrupt, session = Interrupt(), Worker(uuid.uuid4().hex)
        listener = listener or Listener()
        quiet_optuna()
        try:
            with interrupt.listening():
                if shares:
                    listener.announced(describe(shares))
                    run_workers(work, session, shares, listener, interrupt, one_more)
                else:
                    work.do(session, listener, interrupt, one_more)
        finally:
            tables = run.write_tables()
    return tables


def _shares(workers: int, device: str, gpus_per_trial: float | None) -> list[Share]:
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    if workers == 1 and gpus_per_trial is None:
        return []
    return divide(workers, device, gpus_per_trial, visible_gpus(), cores())


@dataclass(frozen=True)
class ComparisonWork(Work):
    """The searches of a comparison, for any number of processes.

    A process owns a search while it holds the lock in its folder. The lock dies with it, so what
    a killed process has left is simply free again.

    Attributes:
        comparison: What they are part of.
        cells: The searches.
        out: The run directory.
        facts: Constant columns of the tables.
        device: Where trials run.
    """

    comparison: Comparison
    cells: tuple[Cell, ...]
    out: Path
    facts: dict[str, Any]
    device: str

    def on(self, device: str) -> ComparisonWork:
        """Return the same work for a process that has this device."""
        return replace(self, device=device)

    def do(
        self,
        worker: Worker,
        listener: Listener,
        interrupt: Interrupt,
        told: Callable[[int], None],
    ) -> None:
        """Run searches that nobody is at, until none is left."""
        for number, cell in enumerate(self.cells):
            if interrupt.requested:
                raise Interrupted("interrupted between searches")
            folder = cell.directory(self.out)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = FileLock(folder / _LOCK).acquire(timeout=0)
            except Timeout:
                continue
            with lock:
                if (folder / _FINISHED).exists():
                    continue
                write_atomically(folder / _OWNER, worker.mark.encode())
                cell.run(
                    self.comparison,
                    folder,
                    self.facts,
                    worker,
                    device=self.device,
                    listener=listener,
                    interrupt=interrupt,
                )
                write_atomically(folder / _FINISHED, b"")
            told(number)

    def left_by(self, worker: Worker) -> int | None:
        """Return the search that a worker that died was at."""
        for number, cell in enumerate(self.cells):
            folder = cell.directory(self.out)
            owner = folder / _OWNER
            at_it = owner.exists() and owner.read_text() == worker.mark
            if at_it and not (folder / _FINISHED).exists():
                return number
        return None

    def name_of(self, number: int) -> str:
        """Return "ift with seed 3"."""
        return self.cells[number].name

    def give_up(self, number: int) -> None:
        """Say in the tables that the trial at which processes died has failed."""
        run = RunDirectory(self.cells[number].directory(self.out), resume=True)
        for record in run.records():
            facts = record.facts()
            if facts.get("status") == "running":
                record.describe(facts | ending(StopReason.FAILED))
