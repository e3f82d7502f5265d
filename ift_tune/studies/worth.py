"""Where IFT is worth it: by wrong labels, clean examples, and what λ is for.

A map of comparisons at equal budget. λ is a weight for each training example, each weight's decay
or a weight for each class; some training labels are redrawn, and so many clean examples validate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import pandas as pd

from ift_tune.base.arguments import require_flag, require_seed
from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.errors import UsageError, require_integer, require_number
from ift_tune.compare.arms import DEFAULT_ARMS, get_arms
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.findings import NOTHING, REFERENCES, find
from ift_tune.compare.run import run_comparison
from ift_tune.compare.verdict import RIVALS, RIVALS_OF_KINDS
from ift_tune.joint.budget import Budget
from ift_tune.problem.factory import build_problem
from ift_tune.problem.loaders import once_through
from ift_tune.problem.sizes import as_size
from ift_tune.search.backends import Processes
from ift_tune.studies.worth_cells import JOBS, WorthCell, axes_of
from ift_tune.studies.worth_findings import (
    CELL,
    compare_arms,
    find_winners,
    judge_worth,
    middle,
)
from ift_tune.studies.writing import Study
from ift_tune.trial.tables import Results, RunDirectory

DATA = ("digits", "mnist")
NOISE = (0.2, 0.5, 0.8)
CLEAN = (50, 200, 1000)

QUICK: Mapping[str, Any] = {
    "data": ("digits",),
    "noise": (0.5,),
    "clean": (50, 200),
    "seeds": 3,
    "middle_seeds": 3,
    "trainings": 6.0,
    "training_steps": 100,
}
"""Arguments of a map that takes minutes, to see what one looks like."""

METRIC = "search_error"
_FOLDER = "comparisons"
_FOUND = ["arm", "seed", "trial", "step", "search", "retrained", "trials", "cost", "seconds"]


@dataclass(frozen=True)
class _Plan:
    """What one cell runs."""

    cell: WorthCell
    comparison: Comparison
    arms: list[str]
    seeds: int
    lacking: list[str] = field(default_factory=list)


def study_worth(
    out: str | os.PathLike[str],
    *,
    data: Sequence[str] = DATA,
    jobs: Sequence[str] = tuple(JOBS),
    noise: Sequence[float] = NOISE,
    clean: Sequence[int] = CLEAN,
    arms: Sequence[str] | None = None,
    seeds: int = 5,
    middle_seeds: int | None = None,
    first_seed: int = 0,
    trainings: float = 10.0,
    training_steps: int = 500,
    workers: int = 1,
    device: str = "cpu",
    data_root: str | os.PathLike[str] | None = None,
    download: bool = False,
    resume: bool = False,
    trust: bool = False,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Compare IFT with its rivals in every cell of a map, at the same budget for all arms.

    Each cell is a comparison of its own in ``<out>/comparisons/``, with a page by
    ``ift-tune report``. What is killed goes on with `resume`.

    Args:
        out: Directory of the map; refused if it holds anything, unless `resume`.
        data: Data sets.
        jobs: Names from `JOBS`.
        noise: Fractions of the training labels that are redrawn.
        clean: Numbers of validation examples.
        arms: Names from `ARMS`, in each cell those that its task is one for. Default: the usual
            ones; of a resumed map, those it has.
        seeds: Of a cell, from `first_seed` on.
        middle_seeds: Of a cell that lies neither at the least nor at the largest noise and number
            of clean examples. Default: twice as many.
        first_seed: Likewise the first of them.
        trainings: The budget of each search, in plain trainings.
        training_steps: Inner steps of a plain training.
        workers: Processes that run the searches of a cell side by side.
        device: Where.
        data_root: Where data sets lie.
        download: Whether they may be fetched.
        resume: Go on with the map in `out`. It has the data sets, jobs, noise, numbers of clean
            examples, arms and seeds of before and these.
        trust: See `run_comparison`.
        on_progress: Called with a line as the study goes on.

    Returns:
        Tables ``worth`` (a row a cell: the winner), ``arms`` (a row for each arm of a cell) and
        ``searches`` (a row a search), with findings.

    Raises:
        UsageError: If a name is unknown, or a cell asks for more examples than there are.
        RunExistsError: If `out` is not empty and `resume` is False, or a process is at work on it.
        Interrupted: On Ctrl-C or SIGTERM, after saving.

    Example:
        >>> from ift_tune.studies.worth import study_worth
        >>> study = study_worth(
        ...     "runs/map", data=["digits"], jobs=["imbalance"], noise=[0.5], clean=[50],
        ...     arms=["ift", "val"], seeds=1, middle_seeds=1, trainings=3, training_steps=20,
        ... )
        >>> study.tables["worth"][["reference", "rival", "seeds"]].to_dict("records")
        [{'reference': 'ift', 'rival': 'val', 'seeds': 1}]
    """
    require_integer("seeds", seeds, 1)
    most = 2 * int(seeds) if middle_seeds is None else middle_seeds
    require_integer("middle_seeds", most, 1)
    first_seed = require_seed(first_seed, "first_seed")
    require_number("trainings", trainings, above=0.0)
    require_integer("training_steps", training_steps, 1)
    require_flag("resume", resume)
    require_flag("trust", trust)
    backend = Processes(workers)
    directory = RunDirectory(out, resume=resume)
    settings = {
        "task": "map of worth",
        "study": "worth",
        "trainings": float(trainings),
        "training_steps": int(training_steps),
        "first_seed": first_seed,
    }
    directory.check(settings)
    asked = {
        **axes_of(data, jobs, noise, clean),
        "arms": [] if arms is None else [arm.name for arm in get_arms(arms)],
        "seeds": list(range(int(seeds))),
        "middle_seeds": list(range(int(most))),
    }
    with directory.held():
        extent = directory.extended(asked)
        extent["arms"] = extent["arms"] or list(DEFAULT_ARMS)
        plans = _plan(extent, settings, device, data_root, download)
        directory.begin(settings, environment(), extent=extent)
        parts = []
        for number, plan in enumerate(plans, 1):
            place = directory.path / _FOLDER / plan.cell.name
            results = run_comparison(
                plan.comparison,
                out=place,
                arms=plan.arms,
                seeds=plan.seeds,
                first_seed=first_seed,
                backend=backend,
                resume=True,
                trust=trust,
            )
            parts.append(_searches(plan.cell, results))
            on_progress(f"{number} of {len(plans)}: {plan.cell.name}, {_said(parts[-1])}")
    searches = pd.concat(parts, ignore_index=True)
    compared = compare_arms(searches)
    winners = find_winners(compared)
    lacking = list(dict.fromkeys(name for plan in plans for name in plan.lacking))
    return Study(
        "Where IFT is worth it",
        _about(plans, settings),
        {"worth": winners, "arms": compared, "searches": searches},
        judge_worth(winners, len(plans), lacking),
    )


def _plan(
    extent: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
    device: str,
    data_root: str | os.PathLike[str] | None,
    download: bool,
) -> list[_Plan]:
    """Return what every cell runs. Each problem is built once: mistakes show before anything runs.

    Raises:
        UsageError: If a cell cannot be run, or has no IFT or no rival.
    """
    names, where = extent["arms"], resolve_device(device)
    cells = [
        WorthCell(data, job, noise, clean)
        for job in extent["jobs"]
        for data in extent["data"]
        if data in JOBS[job]
        for noise in sorted(extent["noise"])
        for clean in sorted(extent["clean"])
    ]
    plans = []
    for cell in cells:
        task = cell.task(data_root, download)
        comparison = Comparison(
            task.make_problem,
            Budget(gradient_equivalents=settings["trainings"] * settings["training_steps"]),
            task="-".join([task.name, *(f"{k}={v}" for k, v in task.options().items())]),
            config=task.default_config,
            trial_budget=task.budget,
            training_steps=settings["training_steps"],
            device=device,
            metric=METRIC,
        )
        problem = build_problem(task.make_problem, comparison.config, where, settings["first_seed"])
        found = sum(as_size(problem.batch_size(b)) for b in once_through(problem.splits.val))
        if found != cell.clean:
            raise UsageError(
                f"{cell.data} has too few examples for {cell.name}: ask for fewer clean examples, "
                f"got {cell.clean}, of which {found:g} are left"
            )

        def fitting(asked: Sequence[str], hyper: object = problem.hyper) -> list[str]:
            return [a.name for a in get_arms(asked) if a.trials.refusal(hyper) is None]

        chosen = fitting(names)
        if not set(chosen) & set(REFERENCES) or set(chosen) <= set(REFERENCES):
            raise UsageError(
                f"arms of {cell.name} must hold one of {', '.join(REFERENCES)}, and a rival that "
                f"its task is one for, got {', '.join(map(str, names))}"
            )
        amid = middle(extent["noise"], cell.noise) and middle(extent["clean"], cell.clean)
        seeds = max(len(extent["seeds"]), len(extent["middle_seeds"]) if amid else 0)
        rivals = fitting((*RIVALS, *chain.from_iterable(RIVALS_OF_KINDS.values())))
        lacking = [name for name in rivals if name not in chosen]
        plans.append(_Plan(cell, comparison, chosen, seeds, lacking))
    return plans


def _searches(cell: WorthCell, results: Results) -> pd.DataFrame:
    """Return a row for each search of a cell; without a choice where it found nothing."""
    run = results.trials.attrs["run"]
    extent = run["extent"]
    asked = pd.MultiIndex.from_product([extent["arms"], extent["seeds"]], names=["arm", "seed"])
    try:
        chosen = find(results).chosen
    except UsageError as error:
        if str(error) != NOTHING:
            raise
        chosen = pd.DataFrame(columns=_FOUND)
    rows: pd.DataFrame = asked.to_frame(index=False).merge(
        chosen[_FOUND], on=["arm", "seed"], how="left"
    )
    for place, name in enumerate(CELL):
        rows.insert(place, name, getattr(cell, name))
    return rows


def _said(searches: pd.DataFrame) -> str:
    """Return who wins in one cell, in a few words."""
    winners = find_winners(compare_arms(searches))
    if winners.empty:
        return "nothing to compare"
    (found,) = winners.to_dict("records")
    return (
        f"{found['verdict']}: {found['reference']} {found['reference_error']:.4f}, "
        f"{found['rival']} {found['rival_error']:.4f}"
    )


def _about(plans: Sequence[_Plan], settings: Mapping[str, Any]) -> str:
    places = dict.fromkeys(f"{plan.cell.job} on {plan.cell.data}" for plan in plans)
    arms = dict.fromkeys(f"`{name}`" for plan in plans for name in plan.arms)
    return _ABOUT.format(
        trainings=f"{settings['trainings']:g}",
        steps=f"{settings['training_steps']:,}",
        seeds=" and ".join(str(n) for n in sorted({plan.seeds for plan in plans})),
        arms=", ".join(arms),
        places=", ".join(places),
        references=", ".join(f"`{name}`" for name in REFERENCES),
    )


_ABOUT = """\
Each cell compares ways to choose hyperparameters at the same budget, {trainings} plain trainings of
{steps} inner steps, over {seeds} seeds: {arms}, where the task is one for them. A fraction of the
training labels (*noise*) is redrawn over all classes; so many examples with true labels (*clean*)
validate; the search split, by which every arm chooses, has true labels too. λ is a weight for each
training example (cleaning), a decay for each of the model's weights (decay) or a weight for each
class of a long tail (imbalance): {places}.

The error is that on the test split, of what the search split has chosen, retrained from scratch.
The verdict is about the first of {references} that was run: IFT is better where
it is better than every rival, a rival is better where one is, by paired t-tests over seeds (5 %,
two-sided, with Holm's correction for the rivals of the cell); intervals are 95 % and not corrected.
Nor are cells for their number: of twenty ties one may look decided."""
