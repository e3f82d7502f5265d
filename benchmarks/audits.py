"""How well an audit finds labels that are known to be wrong, beside the orders that others use.

    python benchmarks/audits.py --seeds 5 --data-root DIR --out results/audit

A run of each cleaning task, whose labels are partly redrawn, and of the net with BatchNorm of
``examples/noisy_labels_loader.py``, which can memorise, is audited with one seed of training.
Runs are kept in ``--runs``; those that are there are not made again. Written are ``audit.parquet``
and ``.csv``, a row for each task, seed and order: the area under the ROC curve, F1 of the flags,
precision among as many as are wrong, and the cost in gradient-equivalents. Five seeds take half an
hour of one core's time; without ``--data-root`` there is no MNIST, and they take ten minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from ift_tune import Budget, MetaConfig, audit, run_single, tasks
from ift_tune.base.environment import environment
from ift_tune.base.files import write_table

NET = "noisy_labels_loader"
CASES: list[tuple[str, dict[str, float]]] = [
    ("digits-cleaning", {}),
    ("digits-cleaning", {"corrupted": 0.3}),
    (NET, {}),
    ("mnist-cleaning", {}),
]
FOUND = ("auc", "f1", "precision_at_wrong", "gradient_equivalents")
FIRST_SEED = 30


def job_of(
    name: str, options: dict[str, float], seed: int, data_root: Path | None
) -> tuple[Any, Budget, MetaConfig, float, Any]:
    """Return a case's factory, budget and settings, the share that is redrawn, and which are wrong.

    A task knows by itself which of its labels are.
    """
    if name == NET:
        sys.path.append(str(Path(__file__).parent.parent / "examples"))
        net = importlib.import_module(NET)
        settings = MetaConfig(inner_optimizer="sgd", inner_lr=0.1, meta_lr=0.5)
        wrong = net.noisy_digits(seed)[0]
        return net.make_problem, Budget(outer_steps=12), settings, wrong.mean(), wrong
    task = tasks.get(name, data_root=data_root, options=options)
    redrawn = task.options()["corrupted"]
    return task.make_problem, task.budget, task.default_config, redrawn, None


def audited(
    name: str, options: dict[str, float], seed: int, folder: Path, data_root: Path | None
) -> list[dict[str, Any]]:
    """Return a row for each order of one run's audit."""
    make_problem, budget, config, redrawn, wrong = job_of(name, options, seed, data_root)
    if not folder.exists():
        run_single(make_problem, budget, config=config, seed=seed, out=folder, task=name)
    # Five more trainings of each MNIST run cost more than all else.
    folds = 0 if name.startswith("mnist") else 5
    facts = audit(folder, make_problem, folds=folds, products=0, wrong=wrong).attrs["audit"]
    about = {"task": name, "redrawn": redrawn, "seed": seed, "examples": facts["examples"]}
    about["wrong"] = facts["wrong"]
    return [
        {**about, "order": row["ranking"], **{key: row[key] for key in FOUND}}
        for row in facts["rankings"]
    ]


def main() -> None:
    """Run, audit and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-root", type=Path, help="where MNIST lies")
    parser.add_argument("--runs", type=Path, default=Path("runs/audits"))
    parser.add_argument("--out", type=Path, required=True, help="a folder for the tables")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, options in CASES:
        if name.startswith("mnist") and given.data_root is None:
            continue
        for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
            words = [name, *(f"{key}={value:g}" for key, value in options.items()), str(seed)]
            rows += audited(name, options, seed, given.runs / "-".join(words), given.data_root)
            print(f"{name} {options or ''} seed {seed}", flush=True)
    table = pd.DataFrame(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    write_table(given.out / "audit", table)
    (given.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    groups = table.groupby(["task", "redrawn", "order"], sort=False)
    found = groups[["auc", "precision_at_wrong"]].agg(["min", "max"])
    print(found.round(4).to_string())


if __name__ == "__main__":
    main()
