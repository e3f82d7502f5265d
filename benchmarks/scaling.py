"""How the cost of an outer step grows with what it is made of.

    python benchmarks/scaling.py --out results/scaling

Over T inner steps, K terms of the Neumann series, P weights, H hyperparameters (weights of 10³ to
10⁷ training examples, of which each step sees equally many), and the number of trials that
are packed to advance together. The points of a sweep take turns; given are medians, and the line
a + b·x through them by least squares of relative errors.

Beside H stands what one pass over H numbers takes, ``x + y``: an outer step must touch each λ some
times, to scatter into its gradient and to update it, and nothing else in it may depend on H.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from torch import nn

from ift_tune import (
    Batches,
    Budget,
    ClassificationProblem,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    MetaSpace,
    Neumann,
    Splits,
    WeightDecay,
    run_study,
    tasks,
)
from ift_tune.base.environment import environment, resolve_device
from ift_tune.base.files import write_atomically, write_table
from ift_tune.base.randomness import RandomStream
from ift_tune.hyper.base import HyperKind
from ift_tune.search.space import Float
from ift_tune.testing.price import timed

INPUTS, CLASSES, EXAMPLES = 64, 10, 128
FEWEST_REPEATS = 3
SWEEPS = ("terms", "inner_steps", "weights", "hypers", "pack")

Action = Callable[[], object]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=SWEEPS)
    parser.add_argument("--terms", nargs="+", type=int, default=[0, 1, 2, 5, 10, 20, 50])
    parser.add_argument("--inner-steps", nargs="+", type=int, default=[1, 5, 10, 20, 50, 100, 200])
    parser.add_argument("--widths", nargs="+", type=int, default=[8, 32, 128, 512, 1024, 2048])
    parser.add_argument(
        "--hypers", nargs="+", type=int, default=[10**3, 10**4, 10**5, 10**6, 10**7]
    )
    parser.add_argument("--packs", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each sweep, about")
    parser.add_argument("--repeats", type=int, default=50, help="at most")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--out", type=Path, help="a folder for tables and environment")
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


def joint(
    device: torch.device,
    *,
    width: int = 128,
    hypers: int | None = None,
    terms: int = 3,
    inner_steps: int = 10,
) -> JointOptimizer:
    """Return what takes outer steps of an MLP on random data.

    Args:
        device: Where.
        width: Of its two hidden layers.
        hypers: Training examples, each with a weight; None for one weight decay.
        terms: K.
        inner_steps: T.
    """
    with RandomStream(0, torch.device("cpu")).aside():
        layers = [nn.Linear(INPUTS, width), nn.ELU(), nn.Linear(width, width), nn.ELU()]
        model = nn.Sequential(*layers, nn.Linear(width, CLASSES)).to(device)
        inputs = torch.randn(EXAMPLES, INPUTS).to(device)
        targets = torch.randint(CLASSES, (EXAMPLES,)).to(device)
    whole = Batches(inputs, targets)
    kind: HyperKind = WeightDecay(model, "model")
    # A list, for the examples of a step lie anywhere among the H, and only their numbers matter.
    train: Any = whole
    if hypers is not None:
        kind = ExampleWeights(hypers, like=inputs)
        places = torch.linspace(0, hypers - 1, EXAMPLES, device=device).long()
        train = [(inputs, targets, places)]
    problem = ClassificationProblem(model, kind, Splits(train, whole, whole, whole))
    config = MetaConfig(
        inverse=Neumann(terms=terms, alpha=0.02),
        inner_steps=inner_steps,
        meta_optimizer="rmsprop",
        start_check=False,
    )
    return JointOptimizer(problem, config)


def take_turns(
    actions: dict[int, Action], device: torch.device, *, seconds: float, repeats: int
) -> dict[int, list[float]]:
    """Return the seconds of each action, in each repeat one after the other."""
    found: dict[int, list[float]] = {value: [] for value in actions}
    started = time.perf_counter()
    for repeat in range(-1, repeats):  # the first warms up
        if repeat >= FEWEST_REPEATS and time.perf_counter() - started > seconds:
            break
        for value, action in actions.items():
            spent = timed(action, device)[1]
            if repeat >= 0:
                found[value].append(spent)
    return found


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Return a and b of y ≈ a + b·x, and the largest relative error.

    Relative errors are what is least: the points are orders of magnitude apart.
    """
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    return float(a), float(b), float(np.abs((a + b * x) / y - 1.0).max())


def packed(packs: Sequence[int]) -> dict[int, Action]:
    """Return searches of so many trials at once."""
    task = tasks.get("digits-weight-decay")
    space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})

    def search(pack: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            run_study(
                task.make_problem,
                space,
                Budget(outer_steps=5, retrain=False),
                n_trials=pack,
                out=Path(folder, "run"),
                config=task.default_config,
                device="cpu",
                sampler="random",
                # How fast a disk writes a study is no matter of packing.
                storage=optuna.storages.InMemoryStorage(),
                pack=pack,
            )

    return {pack: lambda pack=pack: search(pack) for pack in packs}  # type: ignore[misc]


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    device = resolve_device(given.device)
    rows: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []

    def sweep(name: str, actions: dict[int, Action], per: str, scale: float = 1e3) -> None:
        """Measure and fit; `scale` turns seconds into the unit that `per` begins with."""
        times = take_turns(actions, device, seconds=given.seconds, repeats=given.repeats)
        medians = {value: statistics.median(found) for value, found in times.items()}
        say(f"{name}:")
        for value, median in medians.items():
            say(f"  {value:>10,} {1e3 * median:10.2f} ms")
            rows.append(
                {"sweep": name, "value": value, "seconds": median, "repeats": len(times[value])}
            )
        if len(medians) > 2:
            a, b, worst = line(list(medians), list(medians.values()))
            say(f"  {1e3 * a:.2f} ms + {scale * b:.3g} {per}, off by at most {100 * worst:.0f} %")
            fits.append({"sweep": name, "constant": a, "slope": b, "largest_relative_error": worst})

    if "terms" in given.sweeps:
        steps = {k: joint(device, terms=k, inner_steps=1).step for k in given.terms}
        sweep("terms K (T = 1)", dict(steps), "ms a term")
    if "inner_steps" in given.sweeps:
        steps = {t: joint(device, inner_steps=t).step for t in given.inner_steps}
        sweep("inner steps T (K = 3)", dict(steps), "ms a step")
    if "weights" in given.sweeps:
        made = [joint(device, width=width) for width in given.widths]
        steps = {sum(w.numel() for w in one.problem.weights()): one.step for one in made}
        sweep("weights P (T = 10, K = 3)", dict(steps), "ns a weight", 1e9)
    if "hypers" in given.sweeps:
        steps = {h: joint(device, hypers=h).step for h in given.hypers}
        sweep("hyperparameters H (T = 10, K = 3)", dict(steps), "ns a hyperparameter", 1e9)
        passes: dict[int, Action] = {}
        for h in given.hypers:
            x, y = torch.zeros(h, device=device), torch.ones(h, device=device)
            passes[h] = lambda x=x, y=y: x + y  # type: ignore[misc]
        sweep("one pass over H numbers", passes, "ns a number", 1e9)
    if "pack" in given.sweeps:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sweep("trials packed together", packed(given.packs), "ms a trial")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        write_table(given.out / "scaling", pd.DataFrame(rows))
        write_table(given.out / "fits", pd.DataFrame(fits))
        write_atomically(
            given.out / "environment.json", json.dumps(environment(), indent=2).encode()
        )
        say(f"written to {given.out}")


if __name__ == "__main__":
    main()
