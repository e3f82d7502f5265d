"""How each arm searches: its space, its sampler, what its trials are given."""

from __future__ import annotations

import math
from collections import Counter
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
from ift_tune.compare.arms import ARMS, BaselineArm, get_arms
from ift_tune.compare.arms.base import ENDLESS, INNER_LR
from ift_tune.compare.cell import Cell
from ift_tune.compare.comparison import Comparison, SearchState
from ift_tune.compare.plain import BaselineTrial
from ift_tune.compare.scored import ScoredTrial
from ift_tune.hyper import Compose, ExampleWeights, HyperKind, WeightDecay
from ift_tune.joint.callbacks import Callback
from ift_tune.search.space import Choice
from ift_tune.search.work import Worker
from ift_tune.tasks import TASKS
from ift_tune.trial.checkpoint import fingerprint
from ift_tune.trial.runner import Interrupt

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
            if not isinstance(search.sampler, str):
                points += [{k: v[i % len(v)] for k, v in search.sampler.items()} for i in range(7)]
            assert points
            for point in points:
                assert point.keys() == search.space.distributions.keys()
                for name, value in point.items():
                    d = search.space.distributions[name]
                    assert not isinstance(d, Choice)
                    assert d.low <= value <= d.high


@pytest.mark.parametrize("arm", ["random", "tpe", "gp", "cmaes", "asha"])
@pytest.mark.parametrize("name", TASKS)
def test_the_first_point_of_a_task_is_its_default(arm: str, name: str) -> None:
    config = TASKS[name].default_config
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


SAMPLERS: dict[str, Any] = {
    "ift+tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "random+val": optuna.samplers.RandomSampler,
    "asha": optuna.samplers.RandomSampler,
    "tpe": optuna.samplers.TPESampler,
    "gp": optuna.samplers.GPSampler,
    "cmaes": optuna.samplers.CmaEsSampler,
    "grid": optuna.samplers.GridSampler,
}


def study_of(arm: str, tmp_path: Path, whole: Comparison | None = None) -> tuple[Any, Any]:
    """Return the plan and the study of an arm."""
    plan = Cell(ARMS[arm], 3)._plan(whole or comparison(), tmp_path, {}, "cpu")
    return plan, plan.open(join=True)


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_uses_the_sampler_it_is_named_after(arm: str, tmp_path: Path) -> None:
    plan, study = study_of(arm, tmp_path)
    if arm in SAMPLERS:
        assert isinstance(plan.sampler(0), SAMPLERS[arm])
    else:
        assert plan.n_trials == 1
        assert plan.search.space is None
    halves = isinstance(study.pruner, optuna.pruners.SuccessiveHalvingPruner)
    assert halves if arm == "asha" else type(study.pruner) is optuna.pruners.NopPruner


def test_every_searching_arm_is_in_the_table_above() -> None:
    searching = {n for n, a in ARMS.items() if isinstance(a, BaselineArm) and a.sampler}
    assert searching | {"ift+tpe"} == set(SAMPLERS)


@pytest.mark.parametrize("arm", ["tpe", "gp", "cmaes", "ift+tpe"])
def test_a_sampler_that_learns_is_asked_and_not_just_drawn_at_random(
    arm: str, tmp_path: Path
) -> None:
    calls: Counter[str] = Counter()
    sampler = SAMPLERS[arm]
    with pytest.MonkeyPatch.context() as patch:
        original = sampler.sample_relative if arm != "ift+tpe" else sampler.sample_independent
        own = original.__name__

        def counting(self: Any, *arguments: Any) -> Any:
            calls[type(self).__name__] += 1
            return original(self, *arguments)

        patch.setattr(sampler, own, counting)
        run(comparison(33.0), tmp_path / "run", arm)
    assert set(calls) == {sampler.__name__}


def test_the_grid_takes_each_point_exactly_once(tmp_path: Path) -> None:
    whole = comparison(1e6, training_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        small = BaselineArm("grid", "a small grid", sampler="grid", grid_sizes=(3, 2))
        patch.setitem(ARMS, "grid", small)
        results = run(whole, tmp_path / "run", "grid", seeds=2)
    search = small.search(whole, make_clouds(CONFIG, CPU, 0).hyper)
    orders = []
    for seed in (0, 1):
        trials = of_cell(results.trials, "grid", seed)
        taken = list(zip(trials["knob.decay"], trials["inner_lr"], strict=True))
        assert not isinstance(search.sampler, str)
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


class Begins(Callback):
    """Does nothing."""


def begins(arm: str, seed: int, factory: Any, tmp_path: Path) -> list[str]:
    """Run a search, and return a hash of the initial weights and of all data for each trial."""
    seen: list[str] = []

    def noting(config: MetaConfig, device: torch.device, seed: int) -> Any:
        problem = factory(config, device, seed)
        data = [t for name in ("val", "test") for t in getattr(problem.splits, name).tensors]
        data += list(problem.splits.train.dataset.tensors)
        first = next(iter(make_clouds(config, device, seed).splits.train))
        seen.append(fingerprint([*problem.weights(), *data, *first]))
        return problem

    whole = comparison(11.0 if arm != "ift+tpe" else 33.0, problem_factory=noting, training_steps=3)
    folder = tmp_path / arm
    folder.mkdir()
    Cell(ARMS[arm], seed).run(
        whole,
        folder,
        {},
        Worker("me"),
        device="cpu",
        callbacks=[Begins()],
        interrupt=Interrupt(),
        on_done=lambda _: None,
    )
    return seen


def test_all_arms_see_the_same_data_and_initial_weights_for_a_seed(tmp_path: Path) -> None:
    seen = {arm: begins(arm, 5, make_clouds, tmp_path) for arm in ARMS}
    assert all(len(hashes) >= 2 for hashes in seen.values())  # the search's and its trials'
    assert len({h for hashes in seen.values() for h in hashes}) == 1
    other = tmp_path / "other"
    other.mkdir()
    assert set(begins("none", 6, make_clouds, other)).isdisjoint(seen["none"])


def test_the_first_plain_training_of_all_arms_is_the_same(tmp_path: Path) -> None:
    arms = [name for name in PLAIN_ARMS if name not in ("grid", "random+val")]
    results = run(comparison(11.0), tmp_path / "run", *arms)
    losses = [
        of_cell(results.steps, arm).query("trial == 0")["search_loss"].head(2).tolist()
        for arm in arms
    ]
    for row in losses:
        assert row == pytest.approx(losses[0], rel=1e-5)


def trial_of(arm: str, point: dict[str, Any], whole: Comparison, **changes: Any) -> ScoredTrial:
    search_state = SearchState(**(FRESH.__dict__ | changes))
    return ARMS[arm].trial(whole, point, search_state, seed=2, device="cpu")


def test_no_search_trains_with_the_hyperparameters_as_they_are() -> None:
    whole = comparison()
    trial = trial_of("none", {}, whole)
    trial.setup()
    fresh = make_clouds(CONFIG, CPU, 2)
    assert fingerprint(trial.joint.problem.hypers()) == fingerprint(fresh.hypers())
    assert fingerprint(trial.joint.problem.weights()) == fingerprint(fresh.weights())
    assert isinstance(trial, BaselineTrial)
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


@pytest.mark.parametrize("name", ARMS)
def test_arms_are_known_by_their_names_and_say_what_they_do(name: str) -> None:
    assert ARMS[name].name == name
    assert ARMS[name].summary
    assert "\n" not in ARMS[name].summary


@pytest.mark.parametrize("name", PLAIN_ARMS)
def test_a_task_without_knobs_is_searched_by_the_learning_rate_alone(
    name: str, tmp_path: Path
) -> None:
    for kind in ("examples", "own"):
        search = ARMS[name].search(comparison(), hypers()[kind])
        if name != "none":
            assert search.space is not None
            assert list(search.space.distributions) == [INNER_LR]
    results = run(comparison(12.0, problem_factory=make_weighted), tmp_path / "run", name)
    assert results.trials["best_value"].notna().any()
    assert not any(str(column).startswith("knob.") for column in results.trials)


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
