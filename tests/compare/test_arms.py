"""How each arm searches: its space, its sampler, what its trials are given.

The laws that every arm keeps are in `ift_tune.testing.contracts.check_arm`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from tiny_comparisons import (
    CONFIG,
    ENDLESS_ARMS,
    PLAIN_ARMS,
    comparison,
    make_clouds,
    of_cell,
    run,
)
from torch import nn

from ift_tune import Budget, ConjugateGradient, MetaConfig, Neumann, UsageError
from ift_tune.base.checkpoints import fingerprint
from ift_tune.compare.arms import ARMS, Grid, get_arms
from ift_tune.compare.arms.base import ENDLESS, INNER_LR, VAL_WEIGHT, spread
from ift_tune.compare.arms.standard import CoarselySet, JointTrials
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison, SearchState
from ift_tune.hyper import Compose, ExampleWeights, HyperKind, WeightDecay
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Choice
from ift_tune.tasks import TASKS
from ift_tune.trial.trial import Trial

CPU = torch.device("cpu")
FRESH = SearchState(spent=0.0, best=math.inf, trials=0, exhausted=False)


def hypers() -> dict[str, nn.Module]:
    """Return hyperparameter modules such as tasks have."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    deep = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
    return {
        "weight": WeightDecay(model),
        "tensor": WeightDecay(model, "tensor", transform="exp"),
        "model": WeightDecay(model, "model"),
        "many tensors": WeightDecay(deep),
        "examples": ExampleWeights(9),
        "both": Compose({"decay": WeightDecay(model), "examples": ExampleWeights(9)}),
        "own": nn.Linear(2, 2),
    }


CONFIGS = [
    CONFIG,
    MetaConfig(),
    MetaConfig(inverse=ConjugateGradient(), inner_steps=1),
    MetaConfig(inverse=Neumann(terms=100, alpha=0.3), inner_steps=7),
    *(task.default_config for task in TASKS.values()),
]


@pytest.mark.parametrize("arm", ARMS)
def test_the_first_point_lies_inside_the_space(arm: str) -> None:
    for config in CONFIGS:
        for hyper in hypers().values():
            whole = comparison(config=config)
            search = ARMS[arm].search(whole, hyper)
            assert isinstance(search.pruner, str)
            if search.space is None:
                assert search.first is None
                assert search.n_trials == 1
                continue
            search.space.check(whole.config if arm == "ift+tpe" else MetaConfig())
            points: list[dict[str, Any]] = [] if search.first is None else [dict(search.first)]
            if isinstance(search.sampler, Mapping):
                points += [{k: v[i % len(v)] for k, v in search.sampler.items()} for i in range(7)]
            assert points
            for point in points:
                assert point.keys() == search.space.distributions.keys()
                for name, value in point.items():
                    d = search.space.distributions[name]
                    assert not isinstance(d, Choice)
                    assert d.low <= value <= d.high


@pytest.mark.parametrize("arm", [name for name in PLAIN_ARMS if name in ENDLESS_ARMS])
def test_the_first_point_of_a_task_is_its_default(arm: str) -> None:
    for task in TASKS.values():
        config = task.default_config
        search = ARMS[arm].search(comparison(config=config), hypers()["weight"])
        assert search.first is not None
        assert search.first[INNER_LR] == config.inner_lr
        assert search.first["decay"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "inverse", [Neumann(terms=4), Neumann(terms=4, alpha=0.3), Neumann(terms=4, alpha_scale=0.5)]
)
def test_the_outer_search_begins_at_the_defaults_of_the_task(inverse: Neumann) -> None:
    config = MetaConfig(inverse=inverse, meta_lr=0.02, inner_steps=7)
    search = ARMS["ift+tpe"].search(comparison(config=config), nn.Linear(1, 1))
    assert search.first is not None
    begun = config.updated(search.first)
    assert (begun.meta_lr, begun.inner_steps) == (0.02, 7)
    assert isinstance(begun.inverse, Neumann)
    assert begun.inverse.terms == 4
    # alpha_scale 1 is what "auto" means
    scale = begun.inverse.alpha_scale
    assert (begun.inverse.alpha, 1.0 if scale is None else scale) == (
        inverse.alpha,
        1.0 if inverse.alpha_scale is None else inverse.alpha_scale,
    )


def test_endless_arms_are_endless() -> None:
    for name, arm in ARMS.items():
        n_trials = arm.search(comparison(), hypers()["weight"]).n_trials
        if name in ENDLESS_ARMS:
            assert n_trials == ENDLESS
        elif name != "grid":
            assert n_trials == 1


LEARNING = {
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
}


def study_of(arm: str, tmp_path: Path, whole: Comparison | None = None) -> tuple[Any, Any]:
    """Return the plan and the study of an arm."""
    cell = Cell(ARMS[arm], 3)
    plan = cell.plan(cell.trials(whole or comparison(), tmp_path, "cpu"), {})
    return plan, plan.open(join=True)


def test_each_search_has_the_sampler_and_the_pruner_of_its_arm(tmp_path: Path) -> None:
    for name, arm in ARMS.items():
        folder = tmp_path / name
        folder.mkdir()
        plan, study = study_of(name, folder)
        if arm.sampler is None:
            assert plan.n_trials == 1
            assert plan.source.search.space is None
        elif isinstance(arm.sampler, str):
            assert plan.sampler is sampler_factory(arm.sampler)
        halves = isinstance(study.pruner, optuna.pruners.SuccessiveHalvingPruner)
        assert halves if name == "asha" else type(study.pruner) is optuna.pruners.NopPruner


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.sampler in LEARNING])
def test_a_sampler_that_learns_is_asked_and_not_just_drawn_at_random(
    arm: str, tmp_path: Path
) -> None:
    calls: Counter[str] = Counter()
    sampler: Any = LEARNING[str(ARMS[arm].sampler)]
    assert str(ARMS[arm].sampler) in arm  # it is what the arm is named after
    # Optuna's TPE samples independently where it is not multivariate; the others relatively.
    original = sampler.sample_independent if "tpe" in arm else sampler.sample_relative
    with pytest.MonkeyPatch.context() as patch:

        def counting(self: Any, *arguments: Any) -> Any:
            calls[type(self).__name__] += 1
            return original(self, *arguments)

        patch.setattr(sampler, original.__name__, counting)
        run(comparison(40.0), tmp_path / "run", arm)
    assert set(calls) == {sampler.__name__}


def test_the_grid_takes_each_point_exactly_once(tmp_path: Path) -> None:
    whole = comparison(1e6, training_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        small = replace(ARMS["grid"], sampler=Grid(size=3, inner_lrs=2))
        patch.setitem(ARMS, "grid", small)
        results = run(whole, tmp_path / "run", "grid", seeds=2)
    search = small.search(whole, make_clouds(CONFIG, CPU, 0).hyper)
    orders = []
    for seed in (0, 1):
        trials = of_cell(results.trials, "grid", seed)
        taken = list(zip(trials["knob.decay"], trials["inner_lr"], strict=True))
        assert isinstance(search.sampler, Mapping)
        wanted = [(d, lr) for d in search.sampler["decay"] for lr in search.sampler[INNER_LR]]
        assert Counter(taken) == Counter(wanted)
        assert len(set(taken)) == len(taken) == 6
        assert set(trials["knob.factor.weight"]) == {1.0}
        orders.append(taken)
    assert orders[0] != orders[1]


def test_successive_halving_prunes_and_random_search_does_not(tmp_path: Path) -> None:
    results = run(comparison(90.0), tmp_path / "run", "asha", "random")
    reasons = {arm: Counter(of_cell(results.trials, arm)["stop_reason"]) for arm in ARMS}
    begun = results.trials[results.trials["gradient_equivalents"] > 0.0]
    pruned = begun[(begun["arm"] == "asha") & (begun["stop_reason"] == "pruned")]
    assert len(pruned) >= 3
    assert len(pruned) > len(begun[begun["arm"] == "asha"]) / 3
    assert (begun[begun["arm"] == "random"]["stop_reason"] == "done").all()
    assert reasons["asha"]["done"] >= 1
    # A training that was given up half-way has no last step to be proud of, but a best one.
    assert pruned["best_value"].notna().all()
    assert pruned["retrained_test_loss"].notna().all()


def test_the_first_plain_training_of_all_arms_is_the_same(tmp_path: Path) -> None:
    arms = [n for n in PLAIN_ARMS if n != "grid" and not ARMS[n].train_on_val]
    results = run(comparison(11.0), tmp_path / "run", *arms)
    losses = [
        of_cell(results.steps, arm).query("trial == 0")["search_loss"].head(2).tolist()
        for arm in arms
    ]
    for row in losses:
        assert row == pytest.approx(losses[0], rel=1e-5)


def trial_of(arm: str, point: dict[str, Any], whole: Comparison, **changes: Any) -> Trial:
    search_state = replace(FRESH, **changes)
    return ARMS[arm].trials.trial(whole, point, search_state, seed=2, device="cpu")


def test_a_module_of_the_users_own_is_left_alone() -> None:
    def make_own(config: MetaConfig, device: torch.device, seed: int) -> Any:
        problem: Any = make_clouds(config, device, seed)
        problem.hyper = nn.Linear(2, 2)
        return problem

    own = CoarselySet(make_own, {"decay": 1.0})(CONFIG, CPU, 0)
    assert type(own.hyper) is nn.Linear


def test_no_search_trains_with_the_hyperparameters_as_they_are() -> None:
    whole = comparison()
    trial = trial_of("none", {}, whole)
    trial.setup()
    fresh = make_clouds(CONFIG, CPU, 2)
    assert fingerprint(trial.joint.problem.hypers()) == fingerprint(fresh.hypers())
    assert fingerprint(trial.joint.problem.weights()) == fingerprint(fresh.weights())
    trial.step()
    assert fingerprint(trial.joint.problem.hypers()) == fingerprint(fresh.hypers())
    assert trial.config.inner_lr == CONFIG.inner_lr


@pytest.mark.parametrize("arm", [name for name in PLAIN_ARMS if name != "none"])
def test_a_point_sets_decay_and_learning_rate(arm: str) -> None:
    point = {"decay": 0.2, "factor.weight": 3.0, "factor.bias": 0.5, INNER_LR: 0.07}
    trial = trial_of(arm, point, comparison())
    trial.setup()
    kind = trial.joint.problem.hyper
    assert isinstance(kind, WeightDecay)
    weight, bias = kind.decays()
    assert float(weight.detach().mean()) == pytest.approx(0.6)
    assert float(bias.detach().mean()) == pytest.approx(0.1)
    assert trial.config.inner_lr == 0.07
    trial.step()
    assert trial.constants()["knob.factor.weight"] == 3.0


@pytest.mark.parametrize("arm", ARMS)
def test_a_trial_is_given_what_is_left(arm: str) -> None:
    trial = trial_of(arm, {}, comparison(60.0), spent=48.5, best=0.7)
    assert trial.budget.gradient_equivalents == pytest.approx(11.5)
    trial = trial_of(arm, {}, comparison(budget=Budget(seconds=3.0)), spent=2.0)
    assert trial.budget.seconds == pytest.approx(1.0)
    assert trial.budget.gradient_equivalents is None


def test_unknown_and_repeated_arms() -> None:
    assert [arm.name for arm in get_arms(["tpe", "ift"])] == ["tpe", "ift"]
    with pytest.raises(UsageError, match=r"there is no arm 'randon'.*random"):
        get_arms(["ift", "randon"])
    with pytest.raises(UsageError, match="each once"):
        get_arms(["ift", "tpe", "ift"])
    with pytest.raises(UsageError, match="name some arms"):
        get_arms([])


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_grid_lies_inside_its_range_and_is_even_in_the_logarithm(size: int) -> None:
    values = spread(1e-6, 1.0, size)
    assert len(values) == size
    assert all(1e-6 < value < 1.0 for value in values)
    logs = [math.log10(value) for value in values]
    gaps = [b - a for a, b in itertools.pairwise([-6.0, *logs, 0.0])]
    assert gaps[1:-1] == pytest.approx([6.0 / size] * (size - 1))
    assert (gaps[0], gaps[-1]) == pytest.approx((3.0 / size, 3.0 / size))


def test_a_grid_of_meta_hyperparameters_is_refused() -> None:
    with pytest.raises(UsageError, match="a grid is of real numbers, and inner_steps is none"):
        replace(ARMS["grid"], trials=JointTrials()).search(comparison(), nn.Linear(1, 1))


def test_a_task_without_a_coarse_space_is_searched_by_the_learning_rate_alone(
    tmp_path: Path,
) -> None:
    for kind in ("examples", "own"):
        for name in PLAIN_ARMS:
            search = ARMS[name].search(comparison(), hypers()[kind])
            if ARMS[name].sampler is not None:
                assert search.space is not None
                weight = [VAL_WEIGHT] if name == "random+val" else []
                assert list(search.space.distributions) == [INNER_LR, *weight]
    whole = comparison(12.0, problem_factory=make_weighted)
    results = run(whole, tmp_path / "run", *PLAIN_ARMS)
    assert set(results.trials.dropna(subset=["best_value"])["arm"]) == set(PLAIN_ARMS)
    given = [column for column in results.trials if str(column).startswith("knob.")]
    assert given == [f"knob.{VAL_WEIGHT}"]


def make_weighted(config: MetaConfig, device: torch.device, seed: int) -> Any:
    """Return the tiny problem with a hyperparameter that has no knobs."""
    problem = make_clouds(config, device, seed)
    problem.hyper = Plainest()
    return problem


class Plainest(HyperKind):
    """One number that multiplies the loss."""

    name = "plainest"

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(()))

    def weigh(self, losses: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
        return losses * self.raw.exp()

    def summary(self) -> dict[str, float]:
        return {"raw": float(self.raw.detach())}

    @classmethod
    def example(cls, model: nn.Module, inputs: torch.Tensor) -> HyperKind:
        return cls()


def test_columns_of_knobs_do_not_leak_between_arms(tmp_path: Path) -> None:
    results = run(comparison(36.0), tmp_path / "run", "ift", "random")
    joint = of_cell(results.trials, "ift")
    assert joint["knob.decay"].isna().all()
    plain = of_cell(results.trials, "random")
    for column in ("terms", "meta_lr", "meta_optimizer", "warm_start"):
        assert pd.isna(plain[column]).all()
