"""Inner training as people do it: optimisers, schedules, clipping, accumulation, precision."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, StepLR

from ift_tune import (
    Batches,
    BilevelProblem,
    Budget,
    Dense,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    Trial,
    UsageError,
    WeightDecay,
)
from ift_tune.base.errors import CheckpointError
from ift_tune.joint.optimizers import OPTIMIZERS, schedule_factor

TOTAL = 12
DECAY = 0.05


class Small(BilevelProblem):
    """A net of a few weights with a decay, on batches that come in order."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.hyper = WeightDecay(self.model, "model", init=DECAY)
        self.inputs = torch.randn(24, 4, dtype=dtype)
        self.targets = torch.randint(3, (24,))
        rows = Batches(self.inputs, self.targets)
        train = [(self.inputs[i : i + 4], self.targets[i : i + 4]) for i in range(0, 24, 4)]
        self.splits = Splits(train, rows, rows, rows, curvature=rows)

    def train_loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    val_loss = train_loss

    def penalty(self) -> Any:
        assert isinstance(self.hyper, WeightDecay)
        return self.hyper.penalty()


def by_hand(config: MetaConfig, dtype: torch.dtype, steps: int) -> list[Tensor]:
    """Return the weights after plain training, written as people write it."""
    problem = Small(dtype)
    weights = problem.weights()
    kinds: dict[str, Any] = {
        "sgd": partial(optim.SGD, momentum=config.inner_momentum or 0.0),
        "nadam": partial(optim.NAdam, betas=(config.inner_momentum or 0.9, 0.999)),
        "adagrad": optim.Adagrad,
        "rmsprop": partial(optim.RMSprop, momentum=config.inner_momentum or 0.0),
    }
    optimizer = kinds[config.inner_optimizer](weights, lr=config.inner_lr, foreach=False)
    left = TOTAL - config.inner_warmup

    def factor(i: int) -> float:
        share = max(0, i - config.inner_warmup) / left
        falls = {
            "constant": 1.0,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
            "linear": 1.0 - share,
        }
        return falls[config.inner_schedule] * min(1.0, (i + 1) / max(1, config.inner_warmup))

    scheduler = LambdaLR(optimizer, factor)
    batches = itertools.cycle(problem.splits.train)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(config.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = problem.train_loss(next(batches))
            (loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        decay = DECAY * torch.stack([w.square().sum() for w in weights]).sum()
        decay.backward()  # type: ignore[no-untyped-call]
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(weights, config.clip_norm)
        optimizer.step()
        scheduler.step()
    return [w.detach() for w in weights]


AXES: dict[str, tuple[Any, ...]] = {
    "inner_optimizer": ("sgd", "nadam", "adagrad", "rmsprop"),
    "inner_schedule": ("constant", "cosine", "linear"),
    "inner_warmup": (0, 3),
    "clip_norm": (None, 0.1),
    "accumulate": (1, 3),
    "precision": ("float32", "bfloat16"),
    "inner_momentum": (None, 0.7),
}


def pairwise() -> list[dict[str, Any]]:
    """Return points in which each pair of values of any two axes occurs, found greedily."""
    names = list(AXES)
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*AXES.values())]
    every = [p for p in every if p["inner_optimizer"] != "adagrad" or p["inner_momentum"] is None]

    def pairs(point: dict[str, Any]) -> set[Any]:
        return {((a, point[a]), (b, point[b])) for a, b in itertools.combinations(names, 2)}

    left, chosen = set().union(*map(pairs, every)), []
    while left:
        best = max(every, key=lambda point: len(pairs(point) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


POINTS = pairwise()


def config_of(point: dict[str, Any], **more: Any) -> MetaConfig:
    return MetaConfig(inverse=Dense(damping=1.0), inner_lr=0.05, inner_steps=4, **point, **more)


@pytest.mark.parametrize("point", POINTS, ids=lambda p: "-".join(str(v) for v in p.values()))
def test_inner_steps_are_those_of_a_loop_written_by_hand(point: dict[str, Any]) -> None:
    low = point["precision"] == "bfloat16"
    dtype = torch.float32 if low else torch.float64
    config, problem = config_of(point), Small(dtype)
    joint = JointOptimizer(problem, config, total_steps=TOTAL)
    joint.train_weights(5)
    joint.train_weights(4)
    rtol, atol = (1e-5, 1e-6) if low else (1e-12, 1e-13)
    for mine, theirs in zip(problem.weights(), by_hand(config, dtype, 9), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("point", POINTS[::2], ids=lambda p: "-".join(str(v) for v in p.values()))
def test_a_resumed_run_has_the_same_bits(point: dict[str, Any]) -> None:
    dtype = torch.float32 if point["precision"] == "bfloat16" else torch.float64
    whole = JointOptimizer(Small(dtype), config_of(point), total_steps=TOTAL)
    rows = [whole.step() for _ in range(3)]
    begun = JointOptimizer(Small(dtype), config_of(point), total_steps=TOTAL)
    begun.step()
    resumed = JointOptimizer(Small(dtype), config_of(point), total_steps=TOTAL)
    resumed.load_state_dict(begun.state_dict())
    assert [resumed.step() for _ in range(2)] == rows[1:]


def test_the_schedule_ends_at_zero_and_the_warm_up_at_one() -> None:
    for schedule in ("cosine", "linear"):
        factors = [schedule_factor(schedule, 4, i, 20) for i in range(21)]
        assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
        assert factors == sorted(factors[:5]) + sorted(factors[5:], reverse=True)
        assert factors[20] == pytest.approx(0.0, abs=1e-15)
        assert schedule_factor(schedule, 4, 99, 20) == pytest.approx(0.0, abs=1e-15)
    assert schedule_factor("constant", 0, 10**6, None) == 1.0


def test_a_trial_tells_its_length_and_the_clock_does_not() -> None:
    config = MetaConfig(inner_schedule="cosine", inner_steps=3, inner_lr=0.1)

    def problem(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        return Small()

    trial = Trial(problem, config, Budget(outer_steps=5, retrain=False), device="cpu")
    trial.setup()
    assert trial.joint.total_steps == 15
    counted = Trial(problem, config, Budget(gradient_equivalents=200.0), device="cpu")
    counted.setup()
    steps = counted.joint.total_steps
    assert steps is not None
    assert steps % 3 == 0
    while counted.stop_reason is None:
        counted.step()
    assert counted.joint.inner_steps == steps
    clock = Trial(problem, config, Budget(seconds=60.0), device="cpu")
    clock.setup()
    with pytest.raises(UsageError, match="must know the end of the training"):
        clock.step()


@pytest.mark.parametrize("signal_every", [0, 1, 3])
def test_a_schedule_ends_with_a_counted_budget_whatever_the_first_step_costs(
    signal_every: int,
) -> None:
    config = MetaConfig(
        inverse=Neumann(terms=4), inner_schedule="cosine", inner_steps=3, signal_every=signal_every
    )

    def problem(config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        return Small()

    trial = Trial(problem, config, Budget(gradient_equivalents=2000.0), device="cpu")
    trial.setup()
    planned = trial.joint.total_steps
    assert planned is not None
    while trial.stop_reason is None:
        trial.step()
    assert trial.joint.inner_steps == pytest.approx(planned, rel=0.2)  # a bound on each step


def test_the_norms_of_gradient_and_update_are_those_of_the_last_inner_step() -> None:
    problem = Small()
    config = MetaConfig(inner_steps=1, inner_lr=0.1, inner_optimizer="sgd", clip_norm=1e-3)
    before = [w.detach().clone() for w in problem.weights()]
    batch = problem.splits.train[0]  # type: ignore[index]
    penalty = DECAY * torch.stack([w.square().sum() for w in problem.weights()]).sum()
    gradient = torch.autograd.grad(problem.train_loss(batch) + penalty, problem.weights())
    row = JointOptimizer(problem, config).step()
    length = float(torch.cat([g.flatten() for g in gradient]).norm())
    assert row["inner_gradient_norm"] == pytest.approx(length)
    moved = [(w - b).flatten() for w, b in zip(problem.weights(), before, strict=True)]
    assert row["inner_update_norm"] == pytest.approx(float(torch.cat(moved).detach().norm()))
    assert row["inner_update_norm"] == pytest.approx(1e-4, rel=1e-2)


class Own(Small):
    """Brings groups of its own with a scheduler, and one meta learning rate a tensor of λ."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper = WeightDecay(self.model, "tensor", init=DECAY)

    def configure_inner(self, weights: list[Tensor], config: MetaConfig) -> Any:
        groups = [{"params": weights[:2], "lr": 0.2}, {"params": weights[2:], "lr": 0.02}]
        optimizer = optim.SGD(groups, lr=config.inner_lr, momentum=0.8, nesterov=True)
        return optimizer, OneCycleLR(optimizer, max_lr=[0.2, 0.02], total_steps=40)

    def configure_outer(self, hypers: list[Tensor], config: MetaConfig) -> Any:
        return optim.SGD([{"params": [h], "lr": 0.1 * i} for i, h in enumerate(hypers)], lr=0.1)


def test_a_problem_brings_its_own_and_both_are_resumed_to_the_bit() -> None:
    config = MetaConfig(inverse=Dense(damping=1.0), inner_steps=4)
    twin = Own()
    optimizer, scheduler = twin.configure_inner(twin.weights(), config)
    batches = itertools.cycle(twin.splits.train)
    for _ in range(4):
        optimizer.zero_grad()
        decays = twin.hyper.decays()  # type: ignore[operator]
        loss = twin.train_loss(next(batches))
        pairs = zip(decays, twin.weights(), strict=True)
        decay = torch.stack([(c.detach() * w.square()).sum() for c, w in pairs]).sum()
        (loss + decay).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    problem = Own()
    start = [h.detach().clone() for h in problem.hypers()]
    joint = JointOptimizer(problem, config)
    kept = []

    class Keep:
        def on_outer_step_begin(self, joint: JointOptimizer) -> None: ...
        def on_hypergradient(self, joint: JointOptimizer, result: Any) -> None:
            kept.extend(result.grads)

        def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None: ...

    joint.callbacks.append(Keep())
    joint.step()
    for mine, theirs in zip(problem.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    for i, (now, was, grad) in enumerate(zip(problem.hypers(), start, kept, strict=True)):
        torch.testing.assert_close(now.detach(), was - 0.1 * i * grad)
    state = joint.state_dict()
    rows = [joint.step() for _ in range(2)]
    resumed = JointOptimizer(Own(), config)
    resumed.load_state_dict(state)
    assert [resumed.step() for _ in range(2)] == rows
    with pytest.raises(CheckpointError, match="optimisers are configure_inner: SGD"):
        JointOptimizer(Small(), config).load_state_dict(state)


def waiting(weights: list[Tensor]) -> tuple[optim.Optimizer, Any]:
    """Return a scheduler that waits for a loss."""
    optimizer = optim.SGD(weights, lr=0.1)
    return optimizer, optim.lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda w: optim.SGD(w[:1], lr=0.1), "each of the 4 tensors .* got 1 of them"),
        (lambda w: optim.SGD([*w, nn.Parameter(torch.ones(1))], lr=0.1), "and 1 others"),
        (lambda w: optim.AdamW(w), "weight_decay of the optimiser's own .got 0.01."),
        (lambda w: optim.SGD(w, lr=0.1, weight_decay=0.1), "got 0.1. is not in the training loss"),
        (lambda w: optim.LBFGS(w), "several times in a step"),
        (lambda w: "adam", "must return a torch.optim optimiser"),
        (lambda w: (optim.SGD(w, lr=0.1), 0.1), "a pair with its scheduler"),
        (waiting, "goes by its steps alone.*got ReduceLROnPlateau"),
    ],
)
def test_what_cannot_train_the_weights_is_refused(returned: Any, message: str) -> None:
    problem = Small()
    problem.configure_inner = lambda weights, config: returned(weights)  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=message):
        JointOptimizer(problem, MetaConfig())


def test_an_optimiser_of_ones_own_excludes_the_configurations_schedule() -> None:
    with pytest.raises(UsageError, match="return a scheduler with it"):
        JointOptimizer(Own(), MetaConfig(inner_schedule="cosine"), total_steps=9)


def test_adamw_without_its_decay_may_be_brought() -> None:
    problem, twin = Small(), Small()
    problem.configure_inner = (  # type: ignore[method-assign]
        lambda weights, config: optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    )
    JointOptimizer(problem, MetaConfig()).train_weights(3)
    JointOptimizer(twin, MetaConfig(inner_lr=1e-2)).train_weights(3)
    for mine, theirs in zip(problem.weights(), twin.weights(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_optimizer": "adamw"}, "beside the loss.* use 'adam'"),
        ({"inner_optimizer": optim.AdamW}, "cannot be 'AdamW'"),
        pytest.param(
            {"inner_optimizer": "muon"},
            "beside the loss",
            marks=pytest.mark.skipif(not hasattr(optim, "Muon"), reason="of PyTorch 2.9"),
        ),
        ({"inner_optimizer": "LBFGS"}, "several times in a step"),
        ({"meta_optimizer": "sparseadam"}, "sparse gradients"),
        ({"inner_optimizer": "nadm"}, "did you mean 'nadam'"),
        ({"inner_optimizer": partial(optim.SGD, momentum=0.5)}, "configure_inner"),
        ({"inner_optimizer": "adagrad", "inner_momentum": 0.5}, "adagrad has no momentum"),
        ({"inner_momentum": 1.0}, "below 1"),
        ({"inner_momentum": -0.1}, "of at least 0"),
        ({"inner_schedule": "step"}, "one of constant, cosine, linear"),
        ({"inner_warmup": -1}, "inner_warmup"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"accumulate": 0}, "accumulate"),
        ({"precision": "float16"}, "one of float32, bfloat16"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MetaConfig(**settings)


def test_a_class_is_its_name_and_flat_is_whole() -> None:
    config = MetaConfig(inner_optimizer=optim.NAdam, clip_norm=1.0)  # type: ignore[arg-type]
    assert config == MetaConfig(inner_optimizer="nadam", clip_norm=1.0)
    assert MetaConfig.from_flat(config.to_flat()) == config
    assert "inner_momentum" not in config.to_flat()
    assert {"adam", "momentum", "nadam", "radam", "rprop", "adafactor"} <= set(OPTIMIZERS)


def test_accumulated_batches_are_counted() -> None:
    config = MetaConfig(inner_steps=2, accumulate=3)
    joint = JointOptimizer(Small(), config)
    joint.train_weights(2)
    assert joint.cost.gradient_equivalents == 6.0
    bound = joint.max_step_cost()
    before = joint.cost.gradient_equivalents
    joint.step()
    assert joint.cost.gradient_equivalents - before <= bound


# Inheriting: the moments are another's, the settings one's own

PLAIN = MetaConfig(inverse=Dense(damping=1.0), inner_steps=3, inner_lr=0.01, inner_momentum=0.9)


class Brought(Small):
    """Brings an optimiser and a scheduler, all of whose numbers come from the configuration."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def configure_inner(self, weights: list[Tensor], config: MetaConfig) -> Any:
        return self._make(weights, config)


def in_groups(weights: list[Tensor], config: MetaConfig) -> Any:
    """Return two groups, the second at a tenth of the learning rate."""
    rates = (config.inner_lr, 0.1 * config.inner_lr)
    groups = [{"params": weights[i::2], "lr": rate} for i, rate in enumerate(rates)]
    return optim.SGD(groups, lr=1.0, momentum=config.inner_momentum or 0.0)


def falling(weights: list[Tensor], config: MetaConfig) -> Any:
    optimizer = in_groups(weights, config)
    return optimizer, StepLR(optimizer, 2, gamma=config.inner_momentum or 0.0)


def waving(weights: list[Tensor], config: MetaConfig) -> Any:
    optimizer = optim.Adam(weights, config.inner_lr, betas=(config.inner_momentum or 0.0, 0.99))
    return optimizer, CosineAnnealingLR(optimizer, 20, eta_min=0.1 * config.inner_lr)


HEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (Small, {"inner_optimizer": "sgd"}),
    "adam": (Small, {"inner_optimizer": "adam"}),
    "nadam, with a schedule": (
        Small,
        {"inner_optimizer": "nadam", "inner_schedule": "cosine", "inner_warmup": 2},
    ),
    "one's own": (partial(Brought, in_groups), {}),
    "one's own, falling": (partial(Brought, falling), {}),
    "one's own, waving": (partial(Brought, waving), {}),
}


@pytest.mark.parametrize("case", HEIRS)
def test_an_heirs_steps_are_those_of_its_own_settings_from_the_donors_moments(case: str) -> None:
    make, settings = HEIRS[case]
    config = PLAIN.updated(settings)
    own = config.updated({"inner_lr": 0.04, "inner_momentum": 0.3})
    donor = JointOptimizer(make(), config, total_steps=TOTAL)
    for _ in range(2):
        donor.step()
    heir = JointOptimizer(make(), own, total_steps=TOTAL)
    heir.inherit(donor.state_dict())
    # The twin has come as far by itself, and is given the donor's weights, λ and moments there.
    twin, state = JointOptimizer(make(), own, total_steps=TOTAL), donor.state_dict()
    twin.train_weights(donor.inner_steps)
    twin.problem.model.load_state_dict(state["model"])
    twin.problem.hyper.load_state_dict(state["hyper"])
    optimizer = twin._inner.descent.optimizer
    for number, weight in enumerate(w for g in optimizer.param_groups for w in g["params"]):
        optimizer.state[weight] = state["inner_optimizer"]["state"][number]
    assert donor.inner_steps == 6  # batches in an epoch: both go on with the first
    for _ in range(5):
        heir.train_weights(1)
        twin.train_weights(1)
        for one, other in zip(heir.problem.weights(), twin.problem.weights(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("before", "after"), [(None, 0.9), (0.9, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_momentum_is_switched_on_and_off_by_an_exploit(
    name: str, before: float | None, after: float
) -> None:
    config = PLAIN.updated({"inner_optimizer": name, "inner_momentum": before})
    donor = JointOptimizer(Small(), config)
    donor.step()
    heir = JointOptimizer(Small(), config.updated({"inner_momentum": after}))
    heir.inherit(donor.state_dict())
    heir.step()
    (group,) = heir.state_dict()["inner_optimizer"]["param_groups"]
    assert group["momentum"] == after


def test_a_schedule_goes_on_with_another_kind_of_optimiser() -> None:
    def chosen(weights: list[Tensor], config: MetaConfig) -> Any:
        kind: Any = optim.Adam if config.user["kind"] == "adam" else optim.SGD
        optimizer = kind(weights, lr=config.inner_lr)
        return optimizer, StepLR(optimizer, 2, gamma=0.5)

    config = PLAIN.updated({"user.kind": "adam"})
    donor = JointOptimizer(Brought(chosen), config)
    for _ in range(2):
        donor.step()
    heir = JointOptimizer(Brought(chosen), config.updated({"user.kind": "sgd", "inner_lr": 0.8}))
    heir.inherit(donor.state_dict())
    (group,) = heir.state_dict()["inner_optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.8 * 0.5**3)  # after six steps


def test_the_optimiser_of_other_groups_cannot_be_inherited() -> None:
    donor = JointOptimizer(Brought(in_groups), PLAIN)
    heir = JointOptimizer(Brought(lambda w, c: optim.SGD(w, lr=c.inner_lr, momentum=0.9)), PLAIN)
    with pytest.raises(CheckpointError, match="belongs to another problem"):
        heir.inherit(donor.state_dict())
