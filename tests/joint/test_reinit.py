"""Weights that begin anew: what they are, what goes on, and that nothing else is disturbed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ift_tune import (
    Budget,
    ClassificationProblem,
    Compose,
    ConjugateGradient,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    Trial,
    UsageError,
    WeightDecay,
)
from ift_tune.base.randomness import derive_seed
from ift_tune.problem.factory import build_problem

CONFIG = MetaConfig(
    inverse=Neumann(terms=2), inner_steps=4, inner_lr=0.05, meta_lr=0.1, start_check=False
)


def make(
    _config: MetaConfig,
    _device: torch.device,
    seed: int,
    *,
    batch_size: int | None = None,
    normalised: bool = False,
    frozen: bool = False,
) -> ClassificationProblem:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(48, 5, generator=generator)
    targets = (inputs[:, :3] + 0.5 * torch.randn(48, 3, generator=generator)).argmax(1)
    between = [nn.BatchNorm1d(6)] if normalised else []
    model = nn.Sequential(nn.Linear(5, 6), *between, nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
    if frozen:
        model[0].requires_grad_(False)
    # What a model keeps of its training data must stay that of this run's split.
    model.register_buffer("centre", inputs[:24].mean(0))
    hyper = Compose(
        {"decay": WeightDecay(model, "tensor", init=0.01), "examples": ExampleWeights(24)}
    )
    sizes = {"train": 24, "val": 8, "search": 8, "test": 8}
    splits = Splits.from_arrays(
        inputs, targets, sizes=sizes, batch_size={"train": batch_size}, index=True, seed=seed
    )
    return ClassificationProblem(model, hyper, splits)


def begin(config: MetaConfig, **options: Any) -> JointOptimizer:
    factory: Callable[..., Any] = partial(make, **options)
    problem = build_problem(factory, config, "cpu", 3)
    return JointOptimizer(problem, config, seed=3, problem_factory=factory, total_steps=40)


def numbers(joint: JointOptimizer) -> list[float]:
    problem = joint.problem
    tensors = [*problem.model.state_dict().values(), *problem.hyper.state_dict().values()]
    return [float(x) for t in tensors for x in t.reshape(-1)]


def test_the_weights_are_the_factorys_at_another_seed_and_lambda_goes_on() -> None:
    config = CONFIG.updated({"reinit_every": 2})
    joint = begin(config, normalised=True, frozen=True)
    first = {n: t.clone() for n, t in joint.problem.model.state_dict().items()}
    for _ in range(2):
        joint.step()
    trained = {n: t.clone() for n, t in joint.problem.model.state_dict().items()}
    found = [h.detach().clone() for h in joint.problem.hypers()]
    joint.begin_anew()
    now = joint.problem.model.state_dict()
    other = make(config, torch.device("cpu"), 0, normalised=True, frozen=True)
    fresh = build_problem(
        partial(make, normalised=True, frozen=True), config, "cpu", derive_seed(3, "weights", 2)
    ).model.state_dict()
    for name in ("1.weight", "1.bias", "4.weight", "4.bias"):
        assert torch.equal(now[name], fresh[name])
    assert not torch.equal(now["4.weight"], first["4.weight"])
    assert not torch.equal(now["4.weight"], other.model.state_dict()["4.weight"])
    for name in ("0.weight", "centre", "1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(now[name], first[name])  # and not those of the other seed
    assert not torch.equal(trained["1.running_mean"], first["1.running_mean"])
    assert all(map(torch.equal, joint.problem.hypers(), found))
    joint.begin_anew()  # it has been done
    assert torch.equal(joint.problem.model.state_dict()["4.weight"], fresh["4.weight"])


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "nadam"])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_new_beginning_is_that_of_a_run_with_the_present_hyperparameters(
    optimizer: str, schedule: str
) -> None:
    changes = {"inner_optimizer": optimizer, "inner_schedule": schedule, "inner_warmup": 2}
    config = CONFIG.updated({"reinit_every": 2, **changes})
    factory = partial(make, normalised=True)
    joint = begin(config, normalised=True)
    for _ in range(2):
        joint.step()
    # Another run, from those weights and this λ, whose whole training is two outer steps long.
    problem = build_problem(factory, config, "cpu", 3)
    fresh = build_problem(factory, config, "cpu", derive_seed(3, "weights", 2))
    with torch.no_grad():
        for weight, other in zip(problem.weights(), fresh.weights(), strict=True):
            weight.copy_(other)
    problem.hyper.load_state_dict(joint.problem.hyper.state_dict())
    plain = CONFIG.updated(changes)
    alone = JointOptimizer(problem, plain, total_steps=2 * config.inner_steps)
    alone._random.load_state_dict(joint._random.state_dict())  # the same dropout masks
    rows = joint.step(), alone.step()
    # λ's own optimiser goes on, so that only the first of the two steps is comparable.
    assert all(map(torch.equal, joint.problem.weights(), problem.weights()))
    for name in ("train_loss", "val_loss", "hypergradient_norm", "relative_residual"):
        assert rows[0][name] == rows[1][name]


def test_what_the_weights_have_cost_is_counted() -> None:
    plain, anew = begin(CONFIG), begin(CONFIG.updated({"reinit_every": 1}))
    costs = []
    for joint in (plain, anew):
        costs.append([joint.step()["gradient_equivalents"] for _ in range(3)])
        assert joint.inner_steps == 12
    first = costs[0][0]
    # α is estimated from nothing again, as in the first step.
    assert costs[1] == pytest.approx([first, 2 * first, 3 * first])
    assert costs[0][2] < 3 * first
    bound = anew.max_step_cost()
    before = anew.cost.gradient_equivalents
    anew.step()
    assert anew.cost.gradient_equivalents - before <= bound


def test_the_vector_of_a_warm_start_is_dropped() -> None:
    config = CONFIG.updated({"reinit_every": 2, "warm_start": True})
    joint = begin(config)
    joint.step()
    joint.step()
    assert joint._outer.warm.solution is not None
    joint.begin_anew()
    assert joint._outer.warm.solution is None
    assert joint._outer.warm.eigenpair is None


def test_they_begin_anew_where_the_training_loss_has_fallen_so_far() -> None:
    config = CONFIG.updated({"reinit_below": 0.6, "inner_steps": 3})
    joint, ages = begin(config, batch_size=7), []
    losses = []
    for _ in range(12):
        row = joint.step()
        ages.append(joint.outer_steps - joint._fresh.outer_steps)
        losses.append(row["train_loss"] / (joint._fresh.first_loss or 0.0))
    assert max(ages) < 12
    for age, following, share in zip(ages, ages[1:], losses, strict=False):
        assert following == (1 if share < 0.6 else age + 1)
    assert 1 < ages.count(1) < 12


def test_the_first_loss_is_that_of_the_fresh_weights() -> None:
    joint = begin(CONFIG.updated({"reinit_every": 2}))
    joint.step()
    joint.step()
    joint.begin_anew()
    (batch,) = joint.problem.splits.train
    with joint._random.aside(), torch.no_grad():
        expected = float(joint.problem.train_loss(batch))
    joint.step()
    assert joint._fresh.first_loss == expected


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {"reinit_every": 2},
        {"reinit_every": 3, "inner_schedule": "linear", "warm_start": True},
        {"reinit_below": 0.8, "inner_steps": 3},
    ],
    ids=["every", "schedule", "below"],
)
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, changes: dict[str, Any], stop: int
) -> None:
    config = CONFIG.updated(changes)
    factory = partial(make, batch_size=7, normalised=True)

    def trial() -> Trial:
        made = Trial(factory, config, Budget(outer_steps=7, retrain=False), device="cpu", seed=5)
        made.setup()
        return made

    whole, rows = trial(), []
    while whole.stop_reason is None:
        rows.append(whole.step())
    assert whole.joint._fresh.outer_steps > 0
    begun, later = trial(), trial()
    for _ in range(stop):
        begun.step()
    begun.save(tmp_path / "checkpoint.pt")
    later.load(tmp_path / "checkpoint.pt")
    again = []
    while later.stop_reason is None:
        again.append(later.step())
    assert numbers(later.joint) == numbers(whole.joint)
    for row, other in zip(again, rows[stop:], strict=True):
        for name in ("train_loss", "val_loss", "hypergradient_norm", "gradient_equivalents"):
            assert (row or {})[name] == (other or {})[name]


def test_a_retraining_is_one_training() -> None:
    budget = Budget(outer_steps=4)
    config = CONFIG.updated({"reinit_every": 2})
    trial = Trial(make, config, budget, device="cpu")
    trial.setup()
    while trial.stop_reason is None:
        trial.step()
    found = trial.retrain()
    problem = build_problem(make, config, "cpu", 0)
    problem.hyper.load_state_dict(trial.found())
    plain = JointOptimizer(problem, CONFIG, seed=0)
    values = []
    for _ in range(16):
        plain.train_weights(1)
        values.append(plain.evaluate("search")["search_error"])
    assert found["retrained_search_error"] == min(values)


def test_an_heir_goes_on_with_the_age_of_its_weights() -> None:
    elder = begin(CONFIG.updated({"reinit_every": 3}))
    for _ in range(4):
        elder.step()
    heir = begin(CONFIG.updated({"reinit_every": 2, "meta_lr": 0.2}))
    heir.inherit(elder.state_dict())
    heir.step()
    assert heir._fresh.outer_steps == 3
    heir.step()
    assert heir._fresh.outer_steps == 5


def test_a_problems_own_optimiser_and_scheduler_begin_anew() -> None:
    class Own(ClassificationProblem):
        def configure_inner(self, weights: Any, config: MetaConfig) -> Any:
            optimizer = torch.optim.Adam(list(weights), config.inner_lr)
            return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)

    def factory(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        made = make(config, device, seed)
        return Own(made.model, made.hyper, made.splits)

    config = CONFIG.updated({"reinit_every": 2, "inner_steps": 3})
    joint = JointOptimizer(factory(config, torch.device("cpu"), 0), config, problem_factory=factory)
    rates = []
    for _ in range(4):
        joint.step()
        optimizer = joint._inner.descent.optimizer
        rates.append(optimizer.param_groups[0]["lr"] / config.inner_lr)
        counted = {float(optimizer.state[w]["step"]) for w in joint.problem.weights()}
        assert counted == {3.0 * (2 - joint.outer_steps % 2)}
    assert rates == [0.5, 0.25, 0.5, 0.25]


def test_without_a_factory_it_is_refused_at_the_first_step() -> None:
    config = CONFIG.updated({"reinit_every": 5})
    problem = make(config, torch.device("cpu"), 0)
    with pytest.raises(UsageError, match=r"problem_factory=.*got reinit_every=5"):
        JointOptimizer(problem, config).step()
    JointOptimizer(problem, config).train_weights(2)


def test_a_factory_with_another_model_for_another_seed_is_refused() -> None:
    def factory(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
        made = make(config, device, seed)
        width = 6 if seed == 0 else 7
        made.model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
        made.hyper = WeightDecay(made.model, "model", init=0.1)
        return made

    config = CONFIG.updated({"reinit_every": 1})
    joint = JointOptimizer(factory(config, torch.device("cpu"), 0), config, problem_factory=factory)
    joint.step()
    with pytest.raises(UsageError, match=r"every seed: .*got another 0\.bias"):
        joint.step()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"reinit_every": -1}, "reinit_every"),
        ({"reinit_every": 2.5}, "reinit_every"),
        ({"reinit_below": 1.0}, "reinit_below"),
        ({"reinit_below": -0.1}, "reinit_below"),
        ({"reinit_below": float("nan")}, "reinit_below"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        MetaConfig(**changes)


def test_the_flat_form_has_them_only_where_they_are_set() -> None:
    assert "reinit_every" not in MetaConfig().to_flat()
    flat = MetaConfig(reinit_every=5, inverse=ConjugateGradient()).to_flat()
    assert flat["reinit_every"] == 5
    assert MetaConfig.from_flat(flat | {"reinit_every": 5.0}).reinit_every == 5
    assert {"reinit_every", "reinit_below"} <= set(MetaConfig.flat_keys())
