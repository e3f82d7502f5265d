"""A user's factory draws the same numbers for the same seed, whoever calls it and when."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import ift_tune
from ift_tune import Budget, Comparison, MetaConfig, Trial, run_comparison
from ift_tune.base.randomness import GlobalState
from ift_tune.cli.run import check
from ift_tune.joint.callbacks import Callback
from ift_tune.problem.factory import build_problem

BUDGET = Budget(outer_steps=3)
CONFIG = MetaConfig(inner_steps=2)
drawn: list[tuple[Any, ...]] = []


@pytest.fixture(autouse=True)
def nothing_drawn() -> None:
    drawn.clear()


def test_a_model_is_no_factory() -> None:
    with pytest.raises(ift_tune.UsageError, match=r"a function \(config, .* got Linear"):
        ift_tune.run_single(nn.Linear(2, 2), BUDGET, out="never")


def make_carelessly(config: MetaConfig, device: Any, seed: int) -> ift_tune.BilevelProblem:
    """Draw from all global generators, as most people's code does, and pass no generator on."""
    inputs = torch.linspace(-1.0, 1.0, 80).reshape(40, 2)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    parts = random_split(data, [10, 10, 10, 10])
    model = nn.Linear(2, 2)
    flips = (float(np.random.rand()), random.random())
    drawn.append(
        (*(tuple(part.indices) for part in parts), float(model.bias.detach().sum()), *flips)
    )
    splits = ift_tune.Splits(*(DataLoader(part, batch_size=5, shuffle=True) for part in parts))
    return ift_tune.ClassificationProblem(model, ift_tune.WeightDecay(model, "tensor"), splits)


def present_numbers() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def in_the_open(work: Callable[[], object]) -> None:
    """Do the work, and require that nobody's numbers have moved."""
    before = GlobalState(torch.device("cpu"))
    expected = present_numbers()
    before.restore()
    work()
    assert present_numbers() == expected


def run(trial: Trial) -> float:
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    trial.metrics |= trial.finish()
    return float(trial.metrics["retrained_test_loss"])


def a_trial(seed: int = 0, **more: Any) -> Trial:
    return Trial(make_carelessly, CONFIG, BUDGET, seed=seed, device="cpu", **more)


def test_the_seed_alone_decides_what_a_factory_draws() -> None:
    for seed in (0, 1, 0, 1):
        present_numbers()
        in_the_open(functools.partial(build_problem, make_carelessly, CONFIG, "cpu", seed))
    assert drawn[0] == drawn[2] != drawn[1] == drawn[3]


def test_a_factory_that_seeds_for_itself_leaves_no_trace() -> None:
    def make(config: MetaConfig, device: Any, seed: int) -> ift_tune.BilevelProblem:
        torch.manual_seed(77)
        np.random.seed(77)
        random.seed(77)
        return make_carelessly(config, device, seed)

    in_the_open(lambda: build_problem(make, CONFIG, "cpu", 0))


def test_a_factory_that_raises_gives_the_numbers_back() -> None:
    def fail(config: MetaConfig, device: Any, seed: int) -> ift_tune.BilevelProblem:
        raise ValueError(f"{present_numbers()}")

    def call() -> None:
        with pytest.raises(ValueError, match="0"):
            build_problem(fail, CONFIG, "cpu", 0)

    in_the_open(call)


def test_trial_retraining_and_resumption_have_the_same_splits(tmp_path: Path) -> None:
    scores: list[float] = []
    in_the_open(lambda: scores.append(run(a_trial())))
    first = a_trial()
    first.setup()
    first.step()
    first.save(tmp_path / "c.pt")
    present_numbers()
    second = a_trial()
    second.setup()
    second.load(tmp_path / "c.pt")
    while second.stop_reason is None:
        second.step()
    assert second.finish()["retrained_test_loss"] == scores[0]
    assert len(set(drawn)) == 1
    assert len(drawn) == 5


def test_a_checkpoint_of_another_seed_is_refused(tmp_path: Path) -> None:
    first, other = a_trial(), a_trial(1)
    first.setup()
    first.save(tmp_path / "c.pt")
    other.setup()
    with pytest.raises(ift_tune.UsageError, match=r"another seed; .*has seed 0, got seed 1"):
        other.load(tmp_path / "c.pt")


def test_all_arms_of_a_comparison_have_the_same_splits(tmp_path: Path) -> None:
    whole = Comparison(
        make_carelessly,
        Budget(gradient_equivalents=60),
        config=CONFIG,
        training_steps=10,
        device="cpu",
    )
    in_the_open(lambda: run_comparison(whole, out=tmp_path, arms=["ift", "random"], seeds=1))
    assert len(set(drawn)) == 1
    assert len(drawn) > 4


def test_check_on_the_command_line_seeds_too() -> None:
    in_the_open(lambda: check(f"{__name__}:make_carelessly", device="cpu", seed=4))
    assert len(set(drawn)) == 1
    assert len(drawn) == 2


class Noisy(Callback):
    """Draws at every hook."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_outer_step_begin(self, joint: Any) -> None:
        self.seen.append(float(torch.rand(())))

    def on_hypergradient(self, joint: Any, result: Any) -> None:
        self.seen.append(float(np.random.rand()))

    def on_outer_step_end(self, joint: Any, metrics: dict[str, float]) -> None:
        self.seen.append(random.random())


def test_what_callbacks_draw_is_repeated_and_moves_nothing(tmp_path: Path) -> None:
    one, other = Noisy(), Noisy()
    quiet = run(a_trial())
    assert run(a_trial(callbacks=[one])) == quiet
    first = a_trial(callbacks=[other])
    first.setup()
    first.step()
    first.save(tmp_path / "c.pt")
    second = a_trial(callbacks=[other])
    second.setup()
    second.load(tmp_path / "c.pt")
    present_numbers()
    while second.stop_reason is None:
        in_the_open(second.step)
    assert other.seen == one.seen
    assert len(set(one.seen)) == len(one.seen) == 9
