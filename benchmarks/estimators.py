"""IFTClassifier beside scikit-learn's own classifiers, tuned in the same time.

    python benchmarks/estimators.py --seeds 5 --out results/estimators

On breast_cancer, wine and digits whose labels are partly redrawn (in training rows alone), each
split into training and test rows anew for every seed. `IFTClassifier` is fitted first; the seconds
of the processor that it takes, or `--least` where it takes fewer, are what `MLPClassifier` has for
a random search: settings are drawn, fitted on training rows without a held-out part, and the best
by that part is fitted again on all training rows. `LogisticRegressionCV` has as many strengths as
fit into these seconds. All see standardised columns, and no test row before the end.

Written are ``estimators.parquet`` and ``.csv``, a row for each data set, seed and method, and
``estimators.md``, means with standard errors. Five seeds take about two minutes of one core's time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from ift_tune.base.files import write_atomically, write_table
from ift_tune.sklearn import IFTClassifier

REDRAWN = 0.3  # of the training labels of noisy digits
HELD_OUT = 0.3  # of the training rows, as the estimator's own default
MOST_STRENGTHS = 40
FOLDS = 5


class Data(NamedTuple):
    """Training and test rows."""

    X: Any
    y: Any
    X_test: Any
    y_test: Any


def load(name: str, seed: int) -> Data:
    """Return a data set, split by a seed."""
    source = {"breast_cancer": load_breast_cancer, "wine": load_wine, "noisy_digits": load_digits}
    X, y = source[name](return_X_y=True)
    rows, test, labels, truth = train_test_split(X, y, test_size=0.4, stratify=y, random_state=seed)
    if name == "noisy_digits":
        random = np.random.RandomState(seed)
        redrawn = random.rand(len(labels)) < REDRAWN
        labels = np.where(redrawn, random.randint(0, 10, len(labels)), labels)
    return Data(rows, labels, test, truth)


def timed(fit: Callable[[], Any]) -> tuple[Any, float]:
    """Return what is fitted, and the seconds of the processor that it took."""
    start = time.process_time()
    return fit(), time.process_time() - start


def perceptrons(seed: int) -> Iterator[Pipeline]:
    """Yield perceptrons with settings drawn at random."""
    random = np.random.RandomState(seed)
    while True:
        yield make_pipeline(
            StandardScaler(),
            MLPClassifier(
                hidden_layer_sizes=(64,),
                alpha=10.0 ** random.uniform(-5.0, 1.0),
                learning_rate_init=10.0 ** random.uniform(-3.5, -1.5),
                early_stopping=bool(random.rand() < 0.5),
                max_iter=int(random.choice([50, 100, 200])),
                random_state=seed,
            ),
        )


def searched_perceptron(data: Data, seed: int, seconds: float) -> tuple[Any, int]:
    """Return the best perceptron found in the time, and of how many; the last fit may exceed it."""
    start = time.process_time()
    X, X_held, y, y_held = train_test_split(
        data.X, data.y, test_size=HELD_OUT, stratify=data.y, random_state=seed
    )
    best, best_score, tried = None, -np.inf, 0
    for model in perceptrons(seed):
        score = model.fit(X, y).score(X_held, y_held)
        tried += 1
        if score > best_score:
            best, best_score = model, score
        spent = time.process_time() - start
        if spent * (1.0 + 1.5 / tried) > seconds:  # so that the last fit, on all rows, fits in
            break
    return best.fit(data.X, data.y), tried  # type: ignore[union-attr]  # there is one


def searched_regression(data: Data, seed: int, seconds: float) -> tuple[Any, int]:
    """Return logistic regression with its strength by folds, as many strengths as the time has."""

    def fit(strengths: int) -> Any:
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
        grid = np.logspace(-4.0, 4.0, strengths)
        model = LogisticRegressionCV(Cs=grid, cv=folds, max_iter=2000, scoring="neg_log_loss")
        return make_pipeline(StandardScaler(), model).fit(data.X, data.y)

    model, first = timed(lambda: fit(4))
    each, left = first / 4, seconds - first
    strengths = min(MOST_STRENGTHS, int(left / max(each, 1e-9)))
    return (fit(strengths), strengths) if strengths > 4 else (model, 4)


def methods(seed: int, small: bool) -> dict[str, Callable[[Data, float], tuple[Any, int]]]:
    """Return what is compared, by name: a function of the data and of the seconds."""
    steps = 10 if small else 100

    def ours(tune: str) -> Callable[[Data, float], tuple[Any, int]]:
        model = IFTClassifier(tune=tune, outer_steps=steps, random_state=seed, device="cpu")
        return lambda data, _: (model.fit(data.X, data.y), 1)

    return {
        "IFT weight_decay": ours("weight_decay"),
        "IFT features": ours("features"),
        "IFT example_weights": ours("example_weights"),
        "MLPClassifier": lambda data, seconds: searched_perceptron(data, seed, seconds),
        "LogisticRegressionCV": lambda data, seconds: searched_regression(data, seed, seconds),
    }


def compare(name: str, seed: int, least: float, small: bool) -> list[dict[str, Any]]:
    """Return a row for each method."""
    data, rows, seconds = load(name, seed), [], least
    for method, fit in methods(seed, small).items():
        (model, settings), spent = timed(lambda fit=fit, s=seconds: fit(data, s))  # type: ignore[misc]
        if method.startswith("IFT"):
            seconds = max(seconds, spent)
        rows.append(
            {
                "data": name,
                "seed": seed,
                "method": method,
                "seconds": spent,
                "settings": settings,
                "test_error": float(np.mean(model.predict(data.X_test) != data.y_test)),
            }
        )
    return rows


def as_markdown(table: pd.DataFrame) -> str:
    """Return means and standard errors over the seeds."""
    seeds = table["seed"].nunique()
    lines = [
        "| data | method | test error | seconds | settings tried |",
        "|---|---|---|---|---|",
    ]
    for (data, method), rows in table.groupby(["data", "method"], sort=False):
        error = rows["test_error"]
        spread = f" ± {error.std(ddof=1) / np.sqrt(seeds):.4f}" if seeds > 1 else ""
        lines.append(
            f"| {data} | {method} | {error.mean():.4f}{spread} | {rows['seconds'].mean():.2f} "
            f"| {rows['settings'].mean():.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", nargs="+", default=["breast_cancer", "wine", "noisy_digits"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--least", type=float, default=2.0, help="seconds that the others have")
    parser.add_argument("--small", action="store_true", help="few steps: to see whether it runs")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # some of the settings tried have to
    rows: list[dict[str, Any]] = []
    for name in given.data:
        for seed in range(given.seeds):
            rows += compare(name, seed, given.least, given.small)
        print(as_markdown(pd.DataFrame([row for row in rows if row["data"] == name])), flush=True)
    table = pd.DataFrame(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    write_table(given.out / "estimators", table)
    write_atomically(given.out / "estimators.md", as_markdown(table).encode())


if __name__ == "__main__":
    main()
