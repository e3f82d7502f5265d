"""A small real comparison, and what may become of its tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ift_tune import Budget, MetaConfig, Neumann
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.run import run_comparison
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.trial.tables import Results

ARMS = ("ift", "ift+tpe", "random", "none")
SEEDS = 3
SCRIPT = "<script>alert(1)</script>"
MATHS = "$\\frac{$ <b>&amp; \"'x_1"

Change = Callable[[Results], Results]


def make_clouds(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
    """Two overlapping clouds, a linear classifier, a decay per weight."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(2, (size,), generator=generator)
        noise = torch.randn(size, 4, generator=generator)
        return targets[:, None] + noise, targets

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Linear(4, 2, bias=False)
    splits = Splits(
        train=Batches(*draw(24), batch_size=8, seed=seed),
        val=Batches(*draw(16)),
        search=Batches(*draw(40)),
        test=Batches(*draw(80)),
    )
    return ClassificationProblem(model, WeightDecay(model, "weight", init=1e-2), splits)


def run_small(out: Path) -> Results:
    """Run four arms on three seeds."""
    config = MetaConfig(inverse=Neumann(terms=2), meta_lr=0.1, inner_steps=3, inner_lr=0.01)
    comparison = Comparison(
        make_clouds,
        Budget(gradient_equivalents=220.0),
        task="clouds",
        config=config,
        trial_budget=Budget(outer_steps=4),
        training_steps=20,
        device="cpu",
    )
    return run_comparison(comparison, out=out, arms=ARMS, seeds=SEEDS)


def saved(results: Results, directory: Path) -> Path:
    """Write the two parquet files, and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, table in zip(Results._fields, results, strict=True):
        table.to_parquet(directory / f"{name}.parquet", index=False)
    return directory


def changed(results: Results, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Results:
    """Return the tables after a change of each; their attributes may be changed freely."""
    found = []
    for table in results:
        mine = table.copy()
        mine.attrs = copy.deepcopy(table.attrs)
        new = change(mine)
        new.attrs = mine.attrs
        found.append(new.reset_index(drop=True))
    return Results(*found)


def as_it_is(results: Results) -> Results:
    """Return the whole."""
    return results


def part(arms: Sequence[str] = ARMS, seeds: int = SEEDS) -> Change:
    """Return what keeps some arms and seeds, as if there had been no others."""

    def keep(table: pd.DataFrame) -> pd.DataFrame:
        table.attrs["run"]["extent"] = {"arms": list(arms), "seeds": list(range(seeds))}
        return table[table["arm"].isin(arms) & (table["seed"] < seeds)]

    return lambda results: changed(results, keep)


def unfinished(results: Results) -> Results:
    """Take away the last search of an arm, and the end of another."""

    def cut(table: pd.DataFrame) -> pd.DataFrame:
        gone = (table["arm"] == "random") & (table["seed"] == SEEDS - 1)
        later = (table["arm"] == "ift+tpe") & (table["seed"] == 1) & (table["trial"] > 0)
        return table[~(gone | later)]

    return changed(results, cut)


def losses(results: Results) -> Results:
    """Make it a task that has no error, as `load_results` gives it."""

    def drop(table: pd.DataFrame) -> pd.DataFrame:
        for column in table:
            if str(column).endswith("_error"):
                table[column] = float("nan")
        table["best_value"] = table["search_loss"]
        return table

    return changed(part(arms=("ift", "random"), seeds=2)(results), drop)


def hostile(results: Results) -> Results:
    """Give everything that a user names a name that would do harm if it were not escaped.

    Of a task without an error, which the pages then show too.
    """

    def rename(table: pd.DataFrame) -> pd.DataFrame:
        table["arm"] = table["arm"].replace({"random": MATHS})
        table["task"] = SCRIPT
        table.attrs["run"]["task"] = SCRIPT
        table.attrs["environment"]["cpu"] = SCRIPT
        table.attrs["environment"]["command"] = [
            "ift-tune",
            SCRIPT,
            "--out",
            "/home/somebody/secret/run",
            "--data-root=/mnt/private/data",
        ]
        return table.rename(columns={"knob.decay": f"knob.{SCRIPT}", "inner_lr": f"knob.{MATHS}"})

    return changed(losses(results), rename)


CHANGES: dict[str, Change] = {
    "whole": as_it_is,
    "one arm": part(arms=("ift",)),
    "one seed": part(seeds=1),
    "one arm, one seed": part(arms=("random",), seeds=1),
    "unfinished": unfinished,
    "without IFT": part(arms=("random", "none")),
    "losses": losses,
    "hostile": hostile,
}
