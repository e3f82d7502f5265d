"""Run a comparison: arms times seeds, side by side, resumable at every trial."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from ift_tune.base.arguments import require_flag, require_instance, require_seed, shown
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import Interrupted, UsageError, nearest, require_integer
from ift_tune.base.files import write_atomically
from ift_tune.base.locks import ProcessLock
from ift_tune.base.objectives import Objectives
from ift_tune.base.spawning import check_importable
from ift_tune.base.status import StopReason, TrialStatus, ending
from ift_tune.compare.arms import DEFAULT_ARMS, Arm, TrialKind, get_arms
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.joint.callbacks import (
    Callback,
    CallbackList,
    RunFacts,
    during,
    joint_callbacks,
)
from ift_tune.problem.factory import build_problem
from ift_tune.search.backends import Backend, Processes, RayTune, refuse_several_processes
from ift_tune.search.foreign import refuse_foreign_journal
from ift_tune.search.processes import run_workers
from ift_tune.search.work import FolderWork, Worker, quiet_optuna
from ift_tune.trial.runner import Interrupt
from ift_tune.trial.session import Session
from ift_tune.trial.tables import Results, RunDirectory

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
    """

    comparison: Comparison
    cells: tuple[Cell, ...]
    out: Path
    facts: dict[str, Any]
    device: str
    joint_callbacks: Sequence[Callback] = ()

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
        """Run searches that nobody is at, until none is left."""
        for number in self.unfinished():
            if interrupt.requested:
                raise Interrupted("interrupted between searches")
            folder = self.folder(number)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = ProcessLock(folder / _LOCK).acquire(timeout=0)
            except Timeout:
                continue
            with lock:
                if (folder / _FINISHED).exists():
                    continue
                write_atomically(folder / _OWNER, worker.mark.encode())
                self.do_item(
                    number,
                    folder,
                    device=self.device,
                    callbacks=callbacks,
                    interrupt=interrupt,
                    on_done=lambda _: None,
                )
                self.finish(number)
            on_done(number)

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
        self.cells[number].run(
            self.comparison,
            folder,
            self.facts,
            Worker(uuid.uuid4().hex),
            device=device,
            callbacks=callbacks,
            joint_callbacks=self.joint_callbacks,
            interrupt=interrupt,
            on_done=on_done,
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


BACKENDS = ("optuna", "ray")


def run_comparison(
    comparison: Comparison,
    *,
    out: str | Path,
    arms: Sequence[str] | None = None,
    seeds: int = 10,
    first_seed: int = 0,
    workers: int = 1,
    gpus_per_trial: float | None = None,
    backend: str | Backend = "optuna",
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    resume: bool = False,
    on_done: Callable[[Cell, int, int], None] | None = None,
    callbacks: Sequence[Callback] = (),
    trust: bool = False,
) -> Results:
    """Compare ways to choose hyperparameters at equal budget.

    Every arm sees the same splits, initial weights and order of batches for a seed. Each search
    is an Optuna study of its own, in ``<out>/cells/ARM-SEED``.

    Args:
        comparison: The task and the budget.
        out: Run directory; refused if it holds anything, unless `resume`.
        arms: Names from `ARMS`. A resumed comparison has those of before and these. Default: those
            of `DEFAULT_ARMS` that the task is one for.
        seeds: How many. A resumed comparison has those of before and these, for all its arms.
        first_seed: The first of them.
        workers: Processes that run searches side by side, each on its share of the machine. A
            script that asks for several needs ``if __name__ == "__main__":``.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0. Default: what there is, divided;
            with Ray 0.
        backend: ``"optuna"``: this process or `workers`; ``"ray"``: as many searches at a time as
            a cluster has room for, on nodes that need no file system in common. Or a
            `search.backends.Processes` or `RayTune`, in place of `workers`, `gpus_per_trial`,
            `address` and `cpus_per_trial`.
        address: Of a Ray cluster; default: Ray is started here.
        cpus_per_trial: Cores of a search, with Ray.
        resume: Go on with the comparison in `out`.
        on_done: Called when a search is finished, with it, the number of finished ones and that of
            all.
        callbacks: Hooks into the trials and the search, see `Callback`. Trials of different
            searches have numbers of their own. Trainings with frozen hyperparameters have no outer
            steps, so that the hooks of the optimisation are not called in them.
        trust: Whether to go on with searches that hold pickles (CMA-ES keeps its state so), in a
            directory that this user has not begun at this place; see docs/trust.md.

    Returns:
        Both tables, over all searches.

    Raises:
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        UsageError: If an argument is wrong, or `resume` is asked for with other settings.
        Interrupted: On Ctrl-C or SIGTERM, after saving.
        WorkerError: If a worker's process fails.

    Example:
        >>> import tempfile
        >>> from ift_tune import Budget, Comparison, run_comparison, testing
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> whole = Comparison(
        ...     problem, Budget(gradient_equivalents=99), training_steps=20, device="cpu"
        ... )
        >>> with tempfile.TemporaryDirectory() as out:
        ...     trials, steps = run_comparison(whole, out=out, arms=["ift", "random"], seeds=2)
        >>> bool((trials.groupby(["arm", "seed"])["gradient_equivalents"].sum() <= 99).all())
        True
    """
    if isinstance(backend, str):
        backend = _backend(backend, workers, gpus_per_trial, address, cpus_per_trial)
    require_instance("comparison", comparison, Comparison, "a Comparison(factory, budget)")
    require_instance(
        "backend", backend, (Processes, RayTune), "'optuna', 'ray', Processes(...) or RayTune(...)"
    )
    refuse_several_processes(backend.gpus_per_trial or 0, "a comparison")
    require_integer("seeds", seeds, 1)
    first_seed = require_seed(first_seed, "first_seed")
    require_seed(first_seed + seeds - 1, "the last seed")
    require_flag("resume", resume)
    require_flag("trust", trust)
    if on_done is not None and not callable(on_done):
        raise UsageError(f"on_done must be a function (cell, done, all), got {shown(on_done)}")
    chosen, hooks = _arms_for(comparison, arms, first_seed), joint_callbacks(callbacks)
    local = isinstance(backend, Processes)
    allocations = backend.allocations(comparison.device) if isinstance(backend, Processes) else []
    if allocations:
        check_importable(comparison, chosen, hooks)
    where = resolve_device(comparison.device if local and not allocations else "cpu")
    session = Session(
        out,
        comparison.settings(),
        resume=resume,
        extent={
            "arms": [arm.name for arm in chosen],
            "seeds": list(range(first_seed, first_seed + seeds)),
        },
        trust=trust,
    )
    quiet_optuna()
    with session.writing(None if resume else lambda: comparison.check(where, first_seed)):
        extent, interrupt = session.extent, session.interrupt
        cells = [Cell(arm, seed) for seed in extent["seeds"] for arm in get_arms(extent["arms"])]
        facts = {"run_id": session.run_id, "task": comparison.task}
        work = ComparisonWork(
            comparison, tuple(cells), session.run.path, facts, comparison.device, hooks
        )
        todo = set(work.unfinished())
        for number in todo:
            refuse_foreign_journal(work.folder(number), trusted=session.trusted)

        def one_more(number: int) -> None:
            session.run.refresh_tables()
            todo.discard(number)
            done = len(cells) - len(todo)
            told.on_search_end(cells[number].name, done, len(cells))
            if on_done is not None:
                on_done(cells[number], done, len(cells))

        worker, told = Worker(uuid.uuid4().hex), CallbackList(callbacks)
        begun = RunFacts(
            session.run.path,
            comparison.task,
            None,
            Objectives.of(comparison.metric, comparison.mode),
            len(cells),
            len(cells) - len(todo),
            searches=True,
        )
        with during(callbacks, begun):
            if isinstance(backend, RayTune):
                from ift_tune.search.ray.cluster import run_on_ray

                run_on_ray(work, backend, callbacks, interrupt, one_more)
            elif allocations:
                run_workers(work, worker, allocations, callbacks, interrupt, one_more)
            else:
                work.do(worker, callbacks, interrupt, one_more)
    return session.tables


def _arms_for(comparison: Comparison, names: Sequence[str] | None, seed: int) -> list[Arm]:
    """Return the arms of these names; without names the usual ones that the task is one for.

    Raises:
        UsageError: If a name is unknown, or the task is none for its arm.
    """
    chosen = get_arms(DEFAULT_ARMS if names is None else names)
    if all(type(arm.trials).refusal is TrialKind.refusal for arm in chosen):
        return chosen
    factory, config = comparison.problem_factory, comparison.config
    hyper = build_problem(factory, config, torch.device("cpu"), seed).hyper
    reasons = {arm.name: arm.trials.refusal(hyper) for arm in chosen}
    for name, why in reasons.items():
        if why is not None and names is not None:
            raise UsageError(f"leave out the arm {name!r}: {why}, got {', '.join(names)}")
    return [arm for arm in chosen if reasons[arm.name] is None]


def _backend(
    name: str,
    workers: int,
    gpus_per_trial: float | None,
    address: str | None,
    cpus_per_trial: float,
) -> Backend:
    """Return the backend of a name.

    Raises:
        UsageError: If there is none of that name, or a number is out of range.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}{nearest(name, BACKENDS)}")
    if name == "optuna":
        return Processes(workers, gpus_per_trial)
    return RayTune(address, cpus_per_trial, gpus_per_trial or 0.0)
