"""Adapters of a frozen transformer: learned scales and decays beside TPE, at the same cost.

    OMP_NUM_THREADS=1 python benchmarks/adapters.py --data-root DIR --out results/adapters

The transformer, its texts and its adapters are those of `examples/lora_adapter_scale.py`. The cost
is counted in gradients of a mini-batch; evaluations are free for all, and so is the check at the
start, which is left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import lora_adapter_scale as example

from ift_tune import ClassificationProblem, JointOptimizer, MetaConfig, WeightDecay
from ift_tune.base.environment import environment
from ift_tune.base.statistics import student_interval
from ift_tune.problem.factory import build_problem
from ift_tune.studies.writing import Finding, Study, decided, write_study

EVERY = 2  # outer steps' worth of inner steps between evaluations
CONFIG = example.CONFIG.updated({"start_check": False})
DEFAULT = {"rank": 8, "alpha": 16.0, "decay": 1e-8, "inner_lr": CONFIG.inner_lr}
ABOUT = """\
    OMP_NUM_THREADS=1 python benchmarks/adapters.py --data-root DIR --out results/adapters

A character transformer of {weights:,} weights that has learned docstrings of Python's library is
frozen; LoRA adapters in its {layers} linear layers are trained on {train} windows of {length}
characters of `{text}`. Each seed has its own stretches of that text, the same for all arms:

- `ift`: rank 8, alpha 16; {outer} outer steps learn a scale and a decay for each adapter by
  hypergradient, then adapters are trained from scratch with them. All of it is charged.
- `tpe`: Optuna's TPE over rank, alpha, one decay and the learning rate, the default first. A trial
  is one training of that length; the last is the one that takes it past the cost of `ift`.
- `default`: rank 8, alpha 16, no decay, one training.

A training of {steps} steps counts at its best evaluation: `ift` and `default` by the search split,
`tpe`, which needs the validation split for nothing else, by both splits. `cost` is in gradients of
a mini-batch. Losses are nats a character; without adapters {before:.3f} (mean over the seeds)."""


def train(
    problem: Any, config: MetaConfig, seed: int, steps: int, splits: tuple[str, ...]
) -> dict[str, Any]:
    """Train the weights alone; return the best evaluation of some splits, and the cost."""
    joint = JointOptimizer(problem, config.updated({"reinit_every": 0}), seed=seed)
    best: dict[str, Any] = {"selected_by": math.inf}
    while joint.inner_steps < steps:
        for _ in range(EVERY):
            joint.baseline_step()
        found = statistics.mean(joint.evaluate(name)[f"{name}_loss"] for name in splits)
        if found < best["selected_by"]:
            best = {"selected_by": found, "best_step": joint.inner_steps, **joint.evaluate("test")}
    return best | {"cost": joint.cost.gradient_equivalents}


def learn(factory: Callable[..., Any], seed: int, outer_steps: int, steps: int) -> dict[str, Any]:
    """Learn scales and decays, train with them, and return what that gives and costs."""
    problem: Any = build_problem(factory, CONFIG, "cpu", seed)
    joint = JointOptimizer(problem, CONFIG, seed=seed, problem_factory=factory)
    for _ in range(outer_steps):
        joint.step()
    again = build_problem(factory, CONFIG, "cpu", seed)
    again.hyper.load_state_dict(problem.hyper.state_dict())
    found = train(again, CONFIG, seed, steps, ("search",))
    found["cost"] += joint.cost.gradient_equivalents
    scale, decay = problem.hyper["scale"], problem.hyper["decay"]
    found |= {f"scale {name}": value for name, value in scale.summary().items()}
    strengths = decay.transform.forward(torch.stack(list(decay.raw)).detach()).tolist()
    found |= {f"decay {n}": v for n, v in zip(decay.layout.names(), strengths, strict=True)}
    return found


def plain(settings: dict[str, Any], seed: int, steps: int, splits: Any, **data: Any) -> Any:
    """Train adapters of a rank and an alpha, with one decay."""

    def factory(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        base, text = example.pretrained(**data)
        model = example.make_model(base, settings["rank"], settings["alpha"])
        hyper = WeightDecay(model, "model", init=settings["decay"])
        return ClassificationProblem(model, hyper, example.make_splits(text, device, seed))

    config = CONFIG.updated({"inner_lr": settings["inner_lr"]})
    return train(build_problem(factory, config, "cpu", seed), config, seed, steps, splits)


def search(cost: float, seed: int, steps: int, **data: Any) -> dict[str, Any]:
    """Return the best of as many of TPE's trials as cost that much."""
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial(DEFAULT)
    spent, best = 0.0, {"selected_by": math.inf}
    while spent < cost:
        trial = study.ask()
        settings = {
            "rank": trial.suggest_categorical("rank", [2, 4, 8, 16]),
            "alpha": trial.suggest_float("alpha", 2.0, 128.0, log=True),
            "decay": trial.suggest_float("decay", 1e-8, 3e-2, log=True),
            "inner_lr": trial.suggest_float("inner_lr", 5e-4, 2e-2, log=True),
        }
        found = plain(settings, seed, steps, ("val", "search"), **data)
        study.tell(trial, found["selected_by"])
        spent += found["cost"]
        best = min(best, found | settings, key=lambda each: each["selected_by"])
    return best | {"cost": spent, "trials": len(study.trials)}


def compare(seed: int, outer_steps: int, steps: int, **data: Any) -> list[dict[str, Any]]:
    """Return a row for each arm."""
    factory = functools.partial(example.make_problem, **data)
    before = build_problem(factory, CONFIG, "cpu", seed).measure("test")["loss"]
    rows: list[dict[str, Any]] = []

    def keep(arm: str, run: Callable[[], dict[str, Any]]) -> float:
        started = time.process_time()
        row = {"seed": seed, "arm": arm, "untuned_test_loss": before, **run()}
        rows.append(row | {"cpu_seconds": time.process_time() - started})
        told = f"test loss {row['test_loss']:.4f}, cost {row['cost']:.0f}"
        print(f"seed {seed}, {arm}: {told}, {rows[-1]['cpu_seconds']:.0f} s", flush=True)
        return float(row["cost"])

    cost = keep("ift", lambda: learn(factory, seed, outer_steps, steps))
    keep("tpe", lambda: search(cost, seed, steps, **data))
    keep("default", lambda: plain(DEFAULT, seed, steps, ("search",), **data))
    return rows


def findings(table: pd.DataFrame) -> list[Finding]:
    """Return what the table says, seed by seed."""
    losses, found = table.pivot(index="seed", columns="arm", values="test_loss"), []
    for rival in ("tpe", "default"):
        gains = (losses[rival] - losses["ift"]).tolist()
        gain = student_interval(gains)
        means = f"`ift` {losses['ift'].mean():.4f}, `{rival}` {losses[rival].mean():.4f}"
        sentence = (
            f"Learned scales and decays end below `{rival}` (mean test losses {means}; lower by "
            f"{gain.mean:.4f}, 95 % interval {gain.low:.4f} to {gain.high:.4f}, on "
            f"{sum(g > 0 for g in gains)} of {len(gains)} seeds)"
        )
        found.append(Finding(f"ift below {rival}", decided(gain.low, gain.high), sentence))
    return found


def main() -> None:
    """Run all seeds, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--outer-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200, help="of a training")
    parser.add_argument("--pretraining", type=int, default=600, metavar="STEPS")
    parser.add_argument("--data-root")
    parser.add_argument("--embedded", action="store_true", help="without files")
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    data: dict[str, Any] = {"root": args.data_root, "embedded": args.embedded}
    data["pretraining"] = args.pretraining
    base, _ = example.pretrained(**data)
    rows = [
        row
        for seed in range(1, args.seeds + 1)
        for row in compare(seed, args.outer_steps, args.steps, **data)
    ]
    table = pd.DataFrame(rows)
    about = ABOUT.format(
        weights=sum(p.numel() for p in base.parameters()),
        layers=4 * example.LAYERS,
        train=example.SIZES["train"],
        length=example.LENGTH,
        text=example.NEW[args.embedded],
        outer=args.outer_steps,
        steps=args.steps,
        before=table["untuned_test_loss"].mean(),
    )
    title = "Adapters of a frozen transformer: scales and decays learned, or searched for"
    study = Study(title, about, {"adapters": table}, findings(table))
    for finding in study.findings:
        print(finding)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_study(args.out, study)
        (args.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


if __name__ == "__main__":
    main()
