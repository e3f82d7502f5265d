"""Run a comparison: arms times seeds, side by side, resumable at every trial."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ift_tune.base.arguments import require_flag, require_instance, require_seed, shown
from ift_tune.base.environment import resolve_device
from ift_tune.base.errors import UsageError, nearest, require_integer
from ift_tune.base.objectives import Objectives
from ift_tune.base.spawning import check_importable
from ift_tune.compare.arms import DEFAULT_ARMS, Arm, TrialKind, get_arms
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.packed import pack_of
from ift_tune.compare.work import ComparisonWork
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
from ift_tune.search.packed import warn_of_a_small_pack
from ift_tune.search.processes import run_workers
from ift_tune.search.work import Worker, quiet_optuna
from ift_tune.trial.session import Session
from ift_tune.trial.tables import Results

BACKENDS = ("optuna", "ray")

_log = logging.getLogger(__name__)


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
    pack: int = 1,
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
            `address`, `cpus_per_trial` and `pack`.
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
        pack: How many searches of a process advance together, a trial of each, stacked into one:
            for small problems, and 16 or more at once. The tables are those of one by one, and a
            comparison can be resumed with another `pack`. What cannot be packed is logged as a
            warning, and runs by itself; docs/cluster.md has what that is.

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
        backend = _backend(backend, workers, gpus_per_trial, address, cpus_per_trial, pack)
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
        if isinstance(backend, Processes) and backend.pack > 1 and todo:
            share = math.ceil(len(todo) / backend.workers)
            work = replace(work, pack=_packed(work, sorted(todo), min(backend.pack, share), where))
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


def _packed(work: ComparisonWork, numbers: Sequence[int], pack: int, device: torch.device) -> int:
    """Return how many searches advance together in a process: 1, if they cannot, which is said."""
    try:
        pack_of(work.comparison, [work.cells[number].seed for number in numbers], device)
    except UsageError as error:
        _log.warning("the searches run one by one, not packed: %s", error)
        return 1
    warn_of_a_small_pack(pack)
    return pack


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
    pack: int,
) -> Backend:
    """Return the backend of a name.

    Raises:
        UsageError: If there is none of that name, a number is out of range, or Ray shall pack.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}{nearest(name, BACKENDS)}")
    if name == "optuna":
        return Processes(workers, gpus_per_trial, pack=pack)
    if pack != 1:
        raise UsageError(f"Ray runs each search by itself: leave pack out, got pack={pack!r}")
    return RayTune(address, cpus_per_trial, gpus_per_trial or 0.0)
