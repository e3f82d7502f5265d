"""Run a comparison: arms times seeds, side by side, resumable at every trial."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.errors import UsageError, nearest
from ift_tune.compare.arms import DEFAULT_ARMS, get_arms
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.work import ComparisonWork
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.search.allocation import Allocation, allocate, cores, visible_gpus
from ift_tune.search.processes import check_importable, run_workers
from ift_tune.search.storage import quiet_optuna
from ift_tune.search.work import Worker
from ift_tune.trial.runner import Interrupt
from ift_tune.trial.tables import Results, RunDirectory

BACKENDS = ("optuna", "ray")


def run_comparison(
    comparison: Comparison,
    *,
    out: str | Path,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: int = 10,
    first_seed: int = 0,
    workers: int = 1,
    gpus_per_trial: float | None = None,
    backend: str = "optuna",
    address: str | None = None,
    cpus_per_trial: float = 1.0,
    resume: bool = False,
    on_done: Callable[[Cell, int, int], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Results:
    """Compare ways to choose hyperparameters at equal budget.

    Every arm sees the same splits, initial weights and order of batches for a seed. Each search
    is an Optuna study of its own, in ``<out>/cells/ARM-SEED``.

    Args:
        comparison: The task and the budget.
        out: Run directory; refused if it holds anything, unless `resume`.
        arms: Names from `ARMS`. A resumed comparison has those of before and these.
        seeds: How many. A resumed comparison has those of before and these, for all its arms.
        first_seed: The first of them.
        workers: Processes that run searches side by side, each on its share of the machine. A
            script that asks for several needs ``if __name__ == "__main__":``.
        gpus_per_trial: 1, or a part of 1 to share a GPU, or 0. Default: what there is, divided;
            with Ray 0.
        backend: ``"optuna"``: this process or `workers`; ``"ray"``: as many searches at a time as
            a cluster has room for, on nodes that need no file system in common.
        address: Of a Ray cluster; default: Ray is started here.
        cpus_per_trial: Cores of a search, with Ray.
        resume: Go on with the comparison in `out`.
        on_done: Called when a search is finished, with it, the number of finished ones and that of
            all.
        callbacks: Hooks into the trials and the search, see `Callback`. Trials of different
            searches have numbers of their own. Trainings with frozen hyperparameters have no outer
            steps, so that the hooks of the optimisation are not called in them.

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
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {backend!r}{nearest(backend, BACKENDS)}")
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")
    chosen = get_arms(arms)
    wanted = range(first_seed, first_seed + seeds)
    ray = backend == "ray"
    allocations = [] if ray else _allocations(workers, comparison.device, gpus_per_trial)
    hooks = joint_callbacks(callbacks)
    if allocations:
        check_importable(comparison, chosen, hooks)
    where = resolve_device("cpu" if allocations or ray else comparison.device)
    settings = comparison.settings()
    run = RunDirectory(out, resume=resume)
    run.check(settings)
    if not resume:
        comparison.check(where, first_seed)
    with run.held():
        extent = run.extended({"arms": [arm.name for arm in chosen], "seeds": list(wanted)})
        run_id = run.begin(settings, environment(), extent=extent)
        cells = [Cell(arm, seed) for seed in extent["seeds"] for arm in get_arms(extent["arms"])]
        facts = {"run_id": run_id, "task": comparison.task}
        work = ComparisonWork(comparison, tuple(cells), run.path, facts, comparison.device, hooks)
        todo = set(work.unfinished())

        def one_more(number: int) -> None:
            run.refresh_tables()
            todo.discard(number)
            if on_done is not None:
                on_done(cells[number], len(cells) - len(todo), len(cells))

        interrupt, session = Interrupt(), Worker(uuid.uuid4().hex)
        quiet_optuna()
        try:
            with interrupt.listening():
                if backend == "ray":
                    from ift_tune.search.ray.pieces import run_on_ray

                    run_on_ray(
                        work,
                        address=address,
                        cpus=cpus_per_trial,
                        gpus=gpus_per_trial or 0.0,
                        callbacks=callbacks,
                        interrupt=interrupt,
                        on_done=one_more,
                    )
                elif allocations:
                    run_workers(work, session, allocations, callbacks, interrupt, one_more)
                else:
                    work.do(session, callbacks, interrupt, one_more)
        finally:
            tables = run.write_tables()
    return tables


def _allocations(workers: int, device: str, gpus_per_trial: float | None) -> list[Allocation]:
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    if workers == 1 and gpus_per_trial is None:
        return []
    return allocate(workers, device, gpus_per_trial, visible_gpus(), cores())
