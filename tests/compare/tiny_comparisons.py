"""Comparisons that take a blink, and synthetic tables with answers that are known by hand."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ift_tune import Budget, MetaConfig, Neumann, load_results
from ift_tune.base.status import Outcome
from ift_tune.compare.arms import ARMS
from ift_tune.compare.arms.mixtures import MixedTrials
from ift_tune.compare.arms.standard import BaselineTrials
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.findings import Findings, find
from ift_tune.compare.run import run_comparison
from ift_tune.hyper import Compose, ExampleWeights, HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.joint.callbacks import Callback
from ift_tune.problem.batches import Batch, Batches, Loader
from ift_tune.problem.problem import Splits
from ift_tune.trial.tables import MEASURED_COLUMNS, Results

CONFIG = MetaConfig(inverse=Neumann(terms=1), meta_lr=0.1, inner_steps=2, inner_lr=0.1)
TRAINING_STEPS = 6
APPLICABLE_ARMS = [name for name, arm in ARMS.items() if arm.trials.refusal(None) is None]
"""Those that the problem below is one for as it is; the others take it with `weighted`."""
PLAIN_ARMS = [
    name
    for name, arm in ARMS.items()
    if isinstance(arm.trials, BaselineTrials) and not isinstance(arm.trials, MixedTrials)
]
ENDLESS_ARMS = [name for name in ARMS if name not in ("ift", "grid", "none")]
SIZES = {"train": 12, "val": 8, "search": 10, "test": 20}
BATCH = 5  # two whole batches and one of two


def make_clouds(
    config: MetaConfig,
    device: torch.device,
    seed: int,
    *,
    batches: str = "mini",
    kind: type[ClassificationProblem] = ClassificationProblem,
    pause: float = 0.0,
    weighted: bool = False,
) -> ClassificationProblem:
    """Two overlapping clouds in three dimensions, a linear classifier, a decay per weight.

    Args:
        config: Not used.
        device: Where.
        seed: Of everything.
        batches: "full", "mini" (the last one smaller), "drop" (`Batches`, which drops the rest) or
            "curvature" (a larger batch for the outer step).
        kind: Of the problem.
        pause: Seconds that each evaluation of the search split takes longer.
        weighted: Whether there is a weight for each training example too.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = 0.7 * torch.randn(2, 3, generator=generator)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(2, (size,), generator=generator)
        noise = torch.randn(size, 3, generator=generator)
        return (centres[targets] + noise).to(device), targets.to(device)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(3, 2).to(device)
    train: tuple[Tensor, ...] = draw(SIZES["train"])
    train, curvature = (*train, torch.arange(SIZES["train"])) if weighted else train, None
    loader: Loader
    if batches == "mini":
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True, generator=order)
    else:
        size = None if batches == "full" else BATCH
        loader = Batches(*train, batch_size=size, seed=seed)
    if batches == "curvature":
        curvature = Batches(*train, batch_size=9, seed=seed)
    search: Loader = Batches(*draw(SIZES["search"]), batch_size=4)
    splits = Splits(
        train=loader,
        val=Batches(*draw(SIZES["val"]), batch_size=3, seed=seed),
        search=Unhurried(search, pause) if pause else search,
        test=Batches(*draw(SIZES["test"])),
        curvature=curvature,
    )
    hyper: HyperKind = WeightDecay(model, "weight", init=1e-2)
    if weighted:
        hyper = Compose({"decay": hyper, "examples": ExampleWeights(SIZES["train"])})
    return kind(model, hyper, splits)


@dataclass(frozen=True)
class Unhurried:
    """A loader that takes its time."""

    loader: Loader
    pause: float

    def __iter__(self) -> Iterator[Batch]:
        time.sleep(self.pause)
        return iter(self.loader)


def make_slow(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the tiny problem at a pace at which a process can be hit in the middle."""
    return make_clouds(config, device, seed, pause=0.01)


def make_packable(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the tiny problem with its data in memory."""
    return make_clouds(config, device, seed, batches="drop")


class Erring(ClassificationProblem):
    """Its training loss is NaN from some call on."""

    after = 0
    calls = 0

    def train_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        loss = super().train_loss(batch)
        return loss * math.nan if self.calls > self.after else loss


def make_erring(
    config: MetaConfig, device: torch.device, seed: int, *, after: int, weighted: bool = False
) -> ClassificationProblem:
    """Return the tiny problem whose training loss is NaN after so many calls."""
    problem = make_clouds(config, device, seed, kind=Erring, weighted=weighted)
    assert isinstance(problem, Erring)
    problem.after = after
    return problem


def comparison(
    limit: float = 60.0, *, batches: str = "mini", weighted: bool = False, **changes: Any
) -> Comparison:
    """Return a comparison of the tiny problem, with a budget in gradient-equivalents."""
    how: dict[str, Any] = {"batches": batches} | ({"weighted": True} if weighted else {})
    whole = Comparison(
        functools.partial(make_clouds, **how),
        Budget(gradient_equivalents=limit),
        task="clouds",
        config=CONFIG,
        trial_budget=Budget(outer_steps=3),
        training_steps=TRAINING_STEPS,
        device="cpu",
        metric="search_loss",
    )
    return replace(whole, **changes)


def run(whole: Comparison, out: Path, *arms: str, seeds: int = 1, **settings: Any) -> Results:
    """Run a comparison."""
    return run_comparison(whole, out=out, arms=arms, seeds=seeds, **settings)


def comparable(table: pd.DataFrame) -> pd.DataFrame:
    """Drop the columns that no two runs have in common."""
    return table.drop(columns=list(MEASURED_COLUMNS))


def assert_same_tables(one: Path | Results, other: Path | Results) -> None:
    """Compare both tables of two runs, to the bit."""
    mine, theirs = (x if isinstance(x, Results) else load_results(x) for x in (one, other))
    for left, right in zip(mine, theirs, strict=True):
        pd.testing.assert_frame_equal(comparable(left), comparable(right), check_exact=True)


def of_cell(table: pd.DataFrame, arm: str, seed: int = 0) -> pd.DataFrame:
    """Return the rows of a search."""
    return table[(table["arm"] == arm) & (table["seed"] == seed)]


class Killed(BaseException):
    """Ends everything at once, as a kill does: no handler of exceptions catches it."""


class Killer(Callback):
    """Kills at the n-th event of a kind."""

    def __init__(self, event: str, number: int) -> None:
        self._event, self._left = event, number

    def _happened(self, event: str) -> None:
        self._left -= event == self._event
        if self._left == 0:
            raise Killed

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        self._happened("started")

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self._happened("step")

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        self._happened("ended")


# Synthetic tables


@dataclass(frozen=True)
class Made:
    """A trial as a table would hold it.

    Attributes:
        evaluations: (cost within the trial, search value), in order of the steps.
        retrained: Test metric after retraining by step.
        at_end: Test metric after retraining at the end, of the best moment.
        cost: Whole cost; default: that of the last evaluation.
        test: Test metric at all moments.
        val: Validation metric at all moments, None for a plain training.
        status: How it ended.
    """

    evaluations: Sequence[tuple[float, float]] = ()
    retrained: Mapping[int, float] | None = None
    at_end: float | None = None
    cost: float | None = None
    test: float = 0.5
    val: float | None = None
    status: str = "complete"


Searches = Mapping[tuple[str, int], Sequence[Made]]


def tables(
    searches: Searches,
    *,
    limit: float = 100.0,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    seconds: bool = False,
) -> Results:
    """Return the tables of searches, as `load_results` would."""
    trials, steps = [], []
    column = "wall_seconds" if seconds else "gradient_equivalents"
    for (arm, seed), made in searches.items():
        for number, trial in enumerate(made):
            same = {"arm": arm, "seed": seed, "trial": number, "wall_seconds": 1.0}
            same["status"] = trial.status
            retrained = trial.retrained or {}
            best, best_step = math.nan, math.nan
            for step, (cost, value) in enumerate(trial.evaluations, 1):
                if not value >= best:
                    best, best_step = value, step
                steps.append(
                    same
                    | {
                        "step": step,
                        "search_error": value,
                        "test_error": trial.test,
                        "val_error": math.nan if trial.val is None else trial.val,
                        "best_value": best,
                        "best_step": best_step,
                        "retrained_test_error": retrained.get(step, math.nan),
                        column: cost,
                    }
                )
            last = trial.evaluations[-1] if trial.evaluations else (0.0, math.nan)
            known = [*retrained.values()][-1:] if trial.at_end is None else [trial.at_end]
            trials.append(
                same
                | {
                    "search_error": last[1],
                    "best_value": best,
                    "best_step": best_step,
                    "retrained_test_error": (known or [math.nan])[0],
                    column: last[0] if trial.cost is None else trial.cost,
                }
            )
    columns = ["arm", "seed", "trial", "step", "search_error", "test_error", "val_error"]
    columns += ["best_value", "best_step", "retrained_test_error", column]
    names = list(dict.fromkeys(arm for arm, _ in searches)) if arms is None else list(arms)
    numbers = sorted({seed for _, seed in searches}) if seeds is None else list(seeds)
    about = {
        "task": "toy",
        "backend": "compare",
        "metric": None,
        "budget": {
            "gradient_equivalents": None if seconds else limit,
            "seconds": limit if seconds else None,
        },
        "extent": {"arms": names, "seeds": numbers},
    }
    results = Results(pd.DataFrame(trials), pd.DataFrame(steps, columns=None if steps else columns))
    for table in results:
        table.attrs["run"] = about
    return results


def found(searches: Searches, **settings: Any) -> Findings:
    """Return the findings of synthetic tables."""
    return find(tables(searches, **settings))


def outcomes(values: Mapping[str, Sequence[float]]) -> Searches:
    """Return searches of one evaluation each, with these retrained values by arm and seed."""
    return {
        (arm, seed): [Made([(10.0, value)], at_end=value)]
        for arm, column in values.items()
        for seed, value in enumerate(column)
        if not math.isnan(value)
    }
