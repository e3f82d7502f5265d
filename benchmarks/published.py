"""Figures that others have published beside what this package finds in their settings.

    OMP_NUM_THREADS=1 python benchmarks/published.py --data-root DIR --out results/published

Each part writes its own table; `published` has every published figure, ours (the mean over seeds)
and their ratio. Parts that are not asked for are read from where they were written before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

import published_cleaning as cleaning
import published_distillation as distillation
import published_logistic as logistic

from ift_tune import Neumann, Nystrom
from ift_tune.base.environment import environment
from ift_tune.base.files import read_parquet, write_table
from ift_tune.tasks.datasets import load

HATAYA = "Hataya and Yamada 2023, logistic regression"
CLEANING = "Shen and Chen 2023, hyper-cleaning"
VICOL = "Vicol et al. 2022, table 3"

ACCURACIES = {
    ("linear", "T-RHG"): 84.61,
    ("linear", "G-PBGD"): 89.84,
    ("MLP", "T-RHG"): 84.79,
    ("MLP", "G-PBGD"): 92.38,
}
SCORES = {("linear", "T-RHG"): 89.06, ("linear", "G-PBGD"): 80.63}
DISTILLED = {
    (1, "cold"): 30.7,
    (1, "warm"): 90.8,
    (1, "retrained"): 12.9,
    (10, "cold"): 89.1,
    (10, "warm"): 97.5,
    (10, "retrained"): 17.1,
}
OURS = {"T-RHG": "T-RHG", "G-PBGD": "ift"}
"""The row of ours that stands beside theirs: we have no G-PBGD, and compare it with IFT."""


def logistic_rows(_options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the validation losses of both logistic regressions beside the published ones."""
    losses = logistic.notebook_losses(max(logistic.NOTEBOOK) + 1)
    for step, published in logistic.NOTEBOOK.items():
        row = {"source": "hypertorch, logistic_regression.ipynb", "row": f"outer step {step}"}
        yield row | {"published": published, "ours": losses[step]}
    for name, inverse, figure in (
        ("Nyström, rank 5, damping 0.1", Nystrom(rank=5, damping=0.1), 0.2974),
        ("Nyström, rank 5, damping 0.01", Nystrom(rank=5, damping=0.01), 0.2974),
        ("Neumann, 5 terms, α = 0.1", Neumann(terms=5, alpha=0.1), 0.3658),
        ("Neumann, 7 terms, α = 0.1", Neumann(terms=7, alpha=0.1), 0.3658),
    ):
        ours = logistic.hataya_losses(inverse)[-1]
        yield {"source": HATAYA, "row": name, "published": figure, "ours": ours}


def rate_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rates of each seed."""
    for seed in range(options.seeds):
        for rate in logistic.rates(seed=seed):
            yield {"seed": seed, **rate._asdict()}


def cleaning_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of all networks and seeds."""
    images = load("mnist", root=options.data_root, embedded=options.embedded)
    for net in cleaning.NETS:
        for seed in range(options.seeds):
            yield from cleaning.rows(images, net, seed)


def distillation_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of one and of ten images."""
    images = load("mnist", root=options.data_root, embedded=options.embedded)
    for count in distillation.COUNTS:
        for seed in range(options.distilled_seeds):
            yield from distillation.rows(images, count, seed)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "logistic": logistic_rows,
    "rates": rate_rows,
    "cleaning": cleaning_rows,
    "distillation": distillation_rows,
}


def beside(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return every published figure with ours, of the parts that are there."""
    rows: list[dict[str, Any]] = []

    def add(source: str, row: str, published: float, ours: pd.Series) -> None:
        found = ours.dropna().astype(float)
        if found.empty:
            return
        figures = {"published": published, "ours": found.mean(), "ratio": found.mean() / published}
        rows.append({"source": source, "row": row, **figures, "seeds": len(found)})

    if "logistic" in tables:
        for found in tables["logistic"].to_dict("records"):
            add(found["source"], found["row"], found["published"], pd.Series([found["ours"]]))
    if "rates" in tables:
        for method, group in tables["rates"].groupby("method", sort=False):
            proven = float(group["proven"].iloc[0])
            add("Grazzi et al. 2020, factor a step", str(method), proven, group["measured"])
    if "cleaning" in tables:
        for column, figures in (("accuracy", ACCURACIES), ("f1", SCORES)):
            for (net, method), figure in figures.items():
                table = tables["cleaning"]
                ours = table[(table["net"] == net) & (table["method"] == OURS[method])]
                add(CLEANING, f"{net}, {method} / {OURS[method]}, {column}", figure, ours[column])
    if "distillation" in tables:
        for (count, method), figure in DISTILLED.items():
            table = tables["distillation"]
            ours = table[(table["images"] == count) & (table["method"] == method)]
            add(VICOL, f"{method}, {count} image{'s' * (count > 1)}", figure, ours["accuracy"])
    return pd.DataFrame(rows)


def main() -> None:
    """Make the parts, print what stands beside what, write all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--distilled-seeds", type=int, default=1)
    parser.add_argument("--data-root")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/published"))
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for part, make in PARTS.items():
        if part in options.parts:
            rows = []
            for row in make(options):
                print(json.dumps(row), flush=True)
                rows.append(row)
                write_table(options.out / part, pd.DataFrame(rows))  # what there is, if it is ended
        if (options.out / f"{part}.parquet").exists():
            tables[part] = read_parquet(options.out / f"{part}.parquet")
    published = beside(tables)
    write_table(options.out / "published", published)
    (options.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    print(published.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
