"""Data augmentation learned on few images, beside none and beside one set by hand.

    python examples/augmentation_study.py --data-root DIR           # 20 minutes of one core
    python examples/augmentation_study.py --task digits-augment --seeds 2 --outer-steps 5

After Lorraine, Vicol, Duvenaud 2020, section 5.3. Every arm learns a weight decay on the validation
split by the same algorithm, takes the same inner steps from the same initial weights, and is then
trained again from scratch with what it has found frozen: that is what is compared. One more arm
spends the validation images as training images, by the decay that the arm without augmentation
has found.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

import ift_tune
from ift_tune.base.environment import environment
from ift_tune.base.statistics import paired, student_interval
from ift_tune.base.views import View
from ift_tune.report.runs import compose
from ift_tune.studies.writing import Finding, Study, decided, write_study
from ift_tune.tasks import Task
from ift_tune.trial.tables import RunDirectory

NONE, HAND, AFFINE, NETWORK, POOLED = (
    "none",
    "hand-set",
    "affine",
    "U-Net",
    "none, train + val",
)
ARMS = {NONE: "none", HAND: "fixed", AFFINE: "affine", NETWORK: "network"}
"""The arms whose λ is learned, with their `augmenter`."""


@dataclass(frozen=True)
class Setting:
    """What is run for each seed.

    Attributes:
        network: The task whose augmenter is the U-Net; its settings are that arm's.
        affine: The task with the strengths; its settings are the other arms'.
        steps: Outer steps.
    """

    network: Task
    affine: Task
    steps: int

    def task(self, arm: str) -> Task:
        """Return the task of an arm."""
        task = self.network if arm == NETWORK else self.affine
        return task.with_options({"augmenter": ARMS[arm]})


def measure(joint: ift_tune.JointOptimizer, prefix: str = "") -> dict[str, float]:
    """Return losses and errors on all splits but the training images."""
    found = joint.evaluate("val") | joint.evaluate("search") | joint.evaluate("test")
    return {f"{prefix}{name}": value for name, value in found.items()}


def run_seed(setting: Setting, seed: int) -> tuple[list[dict[str, Any]], dict[str, list[View]]]:
    """Run all arms with a seed; return a row an arm, and the learned arms' pictures."""
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[View]] = {}
    for arm in ARMS:
        task = setting.task(arm)
        config = task.default_config
        start = time.process_time()
        joint = ift_tune.JointOptimizer(task.make_problem(config, "cpu", seed), config, seed=seed)
        for _ in range(setting.steps):
            joint.step()
        row = {"arm": arm, "seed": seed} | measure(joint) | {"inner_steps": joint.inner_steps}
        found = joint.problem.hyper.state_dict()
        middle = time.process_time()
        again = ift_tune.JointOptimizer(task.make_problem(config, "cpu", seed), config, seed=seed)
        again.problem.hyper.load_state_dict(found)
        again.train_weights(joint.inner_steps)
        row |= measure(again, "retrained_")
        row |= {f"learned_{k}": v for k, v in joint.problem.summary().items()}
        row |= {
            "tuning_seconds": middle - start,
            "retraining_seconds": time.process_time() - middle,
        }
        rows.append(row)
        pictures[arm] = joint.problem.views()
        if arm == NONE:
            rows.append({"arm": POOLED, "seed": seed} | pool(task, setting.steps, found, seed))
    return rows, pictures


def pool(task: Task, steps: int, found: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return the row of plain training on both splits, with the decay found without them."""
    config = task.default_config
    joint = ift_tune.JointOptimizer(task.make_problem(config, "cpu", seed), config, seed=seed)
    joint.problem.hyper.load_state_dict(found)
    start = time.process_time()
    for _ in range(steps):
        joint.baseline_step(train_on_val=True)
    return (
        measure(joint, "retrained_")
        | {"inner_steps": joint.inner_steps}
        | {"retraining_seconds": time.process_time() - start}
    )


def judge(table: pd.DataFrame) -> list[Finding]:
    """Compare the arms seed by seed, by the test error after retraining."""
    errors = table.pivot_table(index="seed", columns="arm", values="retrained_test_error")
    asked = [(arm, NONE) for arm in (AFFINE, NETWORK, HAND, POOLED)]
    asked += [(AFFINE, HAND), (NETWORK, HAND), (AFFINE, POOLED), (AFFINE, NETWORK)]
    findings = []
    for arm, other in asked:
        gain = 100.0 * (errors[other] - errors[arm]).to_numpy()
        found = paired(gain)
        mean, _, low, high = student_interval(gain)
        findings.append(
            Finding(
                f"{arm} below {other}",
                decided(low, high),
                f"`{arm}` has a lower test error than `{other}` after retraining: "
                f"{100 * errors[arm].mean():.2f} % against {100 * errors[other].mean():.2f} %, "
                f"lower by {mean:.2f} points [{low:.2f}, {high:.2f}], in {found.wins} of "
                f"{found.pairs} seeds (p = {found.p:.3g})",
            )
        )
    return findings


def as_markdown(table: pd.DataFrame) -> str:
    """Return the means over seeds, an arm a line."""
    columns = {
        "test_error": "test error, joint run",
        "retrained_test_error": "test error, retrained",
        "retrained_test_loss": "test loss, retrained",
        "learned_mean_change": "mean change of a pixel",
        "learned_spread": "its spread over draws",
        "tuning_seconds": "CPU s, tuning",
        "retraining_seconds": "CPU s, retraining",
    }
    means = table.groupby("arm", sort=False)[list(columns)].mean()
    lines = [f"| arm | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for arm, row in means.iterrows():
        cells = ("" if pd.isna(value) else f"{value:.3g}" for value in row)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    learned = table[table["arm"] == AFFINE].filter(like="learned_augmentation.").mean()
    strengths = ", ".join(
        f"{str(name).rpartition('.')[2]} {value:.3g}" for name, value in learned.dropna().items()
    )
    return "\n".join(
        [*lines, "", f"Strengths learned by `{AFFINE}`, means over seeds: {strengths}."]
    )


def main() -> None:
    """Run all seeds, print the findings, and write tables, pictures and README.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", default="mnist-augment", help="one that has an -affine beside it")
    parser.add_argument("--seeds", type=int, default=7)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--outer-steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--data-root")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/augmentation"))
    options = parser.parse_args()

    network, affine = (
        ift_tune.tasks.get(name, data_root=options.data_root, embedded=options.embedded)
        for name in (options.task, f"{options.task}-affine")
    )
    setting = Setting(network, affine, options.outer_steps)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    configs = {task.name: task.default_config.to_flat() for task in (network, affine)}
    directory = RunDirectory(options.out)  # one that is not empty is refused before the work
    rows: list[dict[str, Any]] = []
    pictures: dict[str, list[View]] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for found, drawn in pool.map(partial(run_seed, setting), seeds):
            rows += found
            pictures = pictures or drawn
            for row in found:
                text = f"test error after retraining {row['retrained_test_error']:.4f}"
                print(f"seed {row['seed']}, {row['arm']}: {text}", flush=True)
    table = pd.DataFrame(rows).round(6)
    directory.begin(
        {"task": network.name, "seeds": list(seeds), "outer_steps": setting.steps}
        | {"configs": configs, "options": network.options()},
        environment(),
    )
    figures = []
    for arm, name in {AFFINE: "affine.png", NETWORK: "network.png", HAND: "hand-set.png"}.items():
        titled = [replace(view, title=f"{arm}: {view.title}") for view in pictures[arm]]
        compose(titled).savefig(directory.path / name, dpi=110)
        figures.append(directory.path / name)
    s = network.sizes
    about = (
        f"`{network.name}`: {s.train:,} training images, {s.val:,} validation images for λ, "
        f"{s.test:,} test images, a CNN with {s.weights:,} weights, {options.seeds} seeds, each "
        f"with its own splits, initial weights and order of batches. Every arm takes "
        f"{setting.steps} × {network.default_config.inner_steps} inner steps and learns one weight "
        f"decay by implicit differentiation; `{AFFINE}` learns {affine.sizes.hypers - 1} strengths "
        f"of augmentation with it, `{NETWORK}` {s.hypers - 1:,} weights of a U-Net, `{HAND}` has "
        f"fixed strengths, `{NONE}` no augmentation. Then each is trained from scratch with its λ "
        f"frozen. `{POOLED}` trains on the validation images too, with the decay of `{NONE}`. "
        "Differences are over seeds, with 95 % t intervals; p is of the paired permutation test."
        f"\n\n{as_markdown(table)}"
    )
    findings = judge(table)
    study = Study("Learned data augmentation", about, {"arms": table}, findings)
    for finding in findings:
        print(finding)
    for file in write_study(directory.path, study, figures):
        print(file)


if __name__ == "__main__":
    main()
