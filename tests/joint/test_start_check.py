"""The check at the start of a run: what is wrong is refused by name, what is right passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    ClassificationProblem,
    ExampleWeights,
    HyperKind,
    JointOptimizer,
    LabelSmoothing,
    MetaConfig,
    Neumann,
    Penalty,
    Splits,
    StartCheckError,
    WeightDecay,
)
from ift_tune.joint.start_check import DOUBT, MAX_GRADIENTS
from ift_tune.problem.batches import Batch
from ift_tune.testing import Quadratic

CONFIG = MetaConfig(inverse=Neumann(terms=2, alpha=0.1), inner_steps=3, inner_lr=0.01)


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.function(inputs)
        return outputs


def problem_of(
    *layers: nn.Module,
    shape: tuple[int, ...] = (6,),
    hyper: HyperKind | None = None,
    words: int | None = None,
    kind: type[ClassificationProblem] = ClassificationProblem,
) -> ClassificationProblem:
    """Return a classification of noise, in float32, by these layers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, *shape, generator=generator)
    if words is not None:
        inputs = torch.randint(words, (48, *shape), generator=generator)
    targets = torch.randint(3, (48,), generator=generator)
    rows = [Batches(inputs, targets, batch_size=24, seed=seed) for seed in range(4)]
    model = nn.Sequential(*layers)
    hyper = WeightDecay(model, "tensor") if hyper is None else hyper
    return kind(model, hyper, Splits(*rows))


class Encoder(nn.Module):
    """A small transformer with dropout, over words."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, activation, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.read = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        read: Tensor = self.read(self.layers(self.embed(words)).mean(1))
        return read


class Recurrent(nn.Module):
    """An LSTM of two layers with dropout between them, over words."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.LSTM(6, 7, num_layers=2, dropout=0.2, batch_first=True)
        self.read = nn.Linear(7, 3)

    def forward(self, words: Tensor) -> Tensor:
        read: Tensor = self.read(self.layers(self.embed(words))[0][:, -1])
        return read


def mlp(*between: nn.Module) -> list[nn.Module]:
    return [nn.Linear(6, 12), *between, nn.Linear(12, 3)]


def cnn(activation: nn.Module, pool: nn.Module) -> list[nn.Module]:
    first = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), activation, pool]
    return [*first, nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)]


RIGHT: dict[str, Callable[[], ClassificationProblem]] = {
    "linear": lambda: problem_of(nn.Linear(6, 3)),
    "relu": lambda: problem_of(*mlp(nn.ReLU())),
    "relu in place": lambda: problem_of(*mlp(nn.ReLU(inplace=True))),
    "deep": lambda: problem_of(*mlp(*[nn.Linear(12, 12), nn.ReLU()] * 5)),
    "gelu": lambda: problem_of(*mlp(nn.GELU(), nn.LayerNorm(12))),
    "batch norm, dropout": lambda: problem_of(*mlp(nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3))),
    "prelu": lambda: problem_of(*mlp(nn.PReLU(12))),
    "hardswish": lambda: problem_of(*mlp(nn.BatchNorm1d(12), nn.Hardswish())),
    "clamp of abs": lambda: problem_of(*mlp(Apply(lambda z: z.abs().clamp(max=1.0)))),
    "where": lambda: problem_of(*mlp(Apply(lambda z: torch.where(z > 0, z, 0.2 * z.exp())))),
    "max pool": lambda: problem_of(*cnn(nn.ReLU(), nn.MaxPool2d(2)), shape=(2, 8, 8)),
    "leaky": lambda: problem_of(*cnn(nn.LeakyReLU(0.1), nn.AvgPool2d(2)), shape=(2, 8, 8)),
    "transformer": lambda: problem_of(Encoder("relu"), shape=(5,), words=9),
    "gelu transformer": lambda: problem_of(Encoder("gelu"), shape=(5,), words=9),
    "lstm": lambda: problem_of(Recurrent(), shape=(5,), words=9),
    "label smoothing": lambda: problem_of(*mlp(nn.ReLU()), hyper=LabelSmoothing(3)),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("steps", [0, 40])
def test_ordinary_nets_pass_within_the_cost_that_is_stated(name: str, steps: int) -> None:
    torch.manual_seed(3)
    joint = JointOptimizer(RIGHT[name](), CONFIG)
    joint.train_weights(steps)
    joint.step()
    found = joint.start_check
    assert found is not None
    assert found.status == "passed"
    assert found.gradients <= MAX_GRADIENTS
    assert found.error < 0.15
    # Where nothing is decided, a difference differs by rounding alone.
    assert found.kinks or found.error < 0.01


@pytest.mark.parametrize("name", ["batch norm, dropout", "lstm", "max pool", "label smoothing"])
def test_the_numbers_of_a_run_are_the_same_bits_with_and_without_it(name: str) -> None:
    states, rows = [], []
    for start_check in (True, False):
        torch.manual_seed(3)
        joint = JointOptimizer(RIGHT[name](), CONFIG.updated({"start_check": start_check}))
        rows.append([joint.step() for _ in range(3)])
        states.append(joint.state_dict())
        assert (joint.start_check is not None) == start_check
    assert rows[0] == rows[1]  # the cost too
    for part in ("model", "hyper"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name])
    assert torch.equal(states[0]["random"]["torch"], states[1]["random"]["torch"])


class Half(torch.autograd.Function):
    """A square that autograd differentiates as if half of its input were a constant."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        square: Tensor = z * z
        return square

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        product: Tensor = (z + z.detach()) * gradient
        return product


class Right(torch.autograd.Function):
    """A sine as it should be."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        product: Tensor = z.cos() * gradient
        return product


def applied(function: Any) -> Apply:
    return Apply(function.apply)


def hooked(limit: float) -> list[nn.Module]:
    layers = mlp(nn.Tanh())
    for parameter in nn.Sequential(*layers).parameters():
        parameter.register_hook(lambda g: g.clamp(-limit, limit))  # type: ignore[no-untyped-call]
    return layers


class OwnNoise(nn.Module):
    """Dropout from a generator that nobody holds still."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, inputs: Tensor) -> Tensor:
        kept: Tensor = torch.rand(inputs.shape, generator=self.generator) > 0.3
        return inputs * kept


class Noisy(ClassificationProblem):
    """Its validation loss changes from call to call."""

    calls = 0

    def val_loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        return super().val_loss(batch) * (1.0 + 0.01 * self.calls)


def unit_length(z: Tensor) -> Tensor:
    lengths: Tensor = z.norm(dim=1, keepdim=True)
    return z / lengths.detach()


WRONG: dict[str, tuple[Callable[[], ClassificationProblem], str]] = {
    "custom": (lambda: problem_of(*mlp(applied(Half))), "Half.*got a difference at 0"),
    "deep in a net": (
        lambda: problem_of(*mlp(nn.ReLU(), nn.Linear(12, 2), applied(Half), nn.Linear(2, 12))),
        "Half",
    ),
    "hook at work": (lambda: problem_of(*hooked(1e-3)), "gradient hook on 0.weight"),
    "hook that waits": (lambda: problem_of(*hooked(1.0)), "gradient hook on 0.weight"),
    "own generator": (lambda: problem_of(*mlp(OwnNoise())), "train_loss must be the same"),
    "own state": (lambda: problem_of(*mlp(nn.Tanh()), kind=Noisy), "val_loss must be the same"),
    "detached": (lambda: problem_of(*mlp(Apply(unit_length))), r"\.detach\(\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_by_name_before_the_hyperparameters_move(name: str) -> None:
    make, named = WRONG[name]
    torch.manual_seed(3)
    problem = make()
    before = [h.detach().clone() for h in problem.hypers()]
    with pytest.raises(StartCheckError, match=named):
        JointOptimizer(problem, CONFIG).step()
    assert all(map(torch.equal, problem.hypers(), before))
    JointOptimizer(problem, CONFIG.updated({"start_check": False})).step()


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_biases_whose_gradients_are_rounding_alone_pass(seed: int) -> None:
    """A shift before batch normalisation does nothing, but rounding leaves it some gradient."""
    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(pixels[:200], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    targets = torch.tensor(labels[:200])
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    second = [nn.Conv2d(16, 28, 3, padding=1), nn.BatchNorm2d(28), nn.ReLU()]
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(28, 10)]
    model = nn.Sequential(*first, *second, *last)
    rows = Splits(*[Batches(inputs, targets, batch_size=50, seed=seed) for _ in range(4)])
    problem = ClassificationProblem(model, WeightDecay(model, "tensor"), rows)
    joint = JointOptimizer(problem, MetaConfig(inner_steps=20))
    joint.step()
    assert joint.start_check is not None
    assert joint.start_check.error < 0.15


def test_a_custom_function_that_is_right_passes() -> None:
    joint = JointOptimizer(problem_of(*mlp(applied(Right))), CONFIG)
    joint.step()
    assert joint.start_check is not None
    assert joint.start_check.error < 0.01


class Ridge(Penalty):
    """e^λ·‖w‖², with closed forms that can be made wrong."""

    def __init__(self, raw: Tensor, curved: float, mixed: float) -> None:
        self.hypers, self.decay = [raw], raw.detach().exp()
        self.factors = curved, mixed

    def value(self, weights: Any) -> Tensor:
        total: Tensor = self.hypers[0].exp() * sum(w.square().sum() for w in weights)
        return total

    def add_gradient_(self, gradient: Any, weights: Any) -> None:
        for g, w in zip(gradient, weights, strict=True):
            g.add_(2.0 * self.decay * w.detach())

    def hvp(self, weights: Any, vector: Any) -> list[Tensor]:
        return [2.0 * self.factors[0] * self.decay * v for v in vector]

    def mixed(self, weights: Any, vector: Any) -> list[Tensor]:
        products = [(w.detach() * v).sum() for w, v in zip(weights, vector, strict=True)]
        return [2.0 * self.factors[1] * self.decay * torch.stack(products).sum()]


class Ridged(Quadratic):
    """With a penalty of its own."""

    factors = 1.0, 1.0

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros((), dtype=self.weights()[0].dtype))
        self.hyper.register_parameter("strength", self.raw)

    def penalty(self) -> Penalty:
        return Ridge(self.raw, *self.factors)


@pytest.mark.parametrize(("factors", "what"), [((1.3, 1.0), "product H·v"), ((1.0, 0.7), "mixed")])
def test_the_closed_forms_of_a_penalty_are_held_to_it(
    factors: tuple[float, float], what: str
) -> None:
    problem = Ridged()
    JointOptimizer(problem, CONFIG).step()
    problem.factors = factors
    with pytest.raises(StartCheckError, match=f"{what}.*penalty.*correct `Penalty"):
        JointOptimizer(problem, CONFIG).step()


class Halved(Quadratic):
    """Autograd sees half of its mixed derivative."""

    def train_loss(self, batch: Batch) -> Tensor:
        hidden: Tensor = self.model() @ self.coupling @ self.hyper().detach()
        return super().train_loss(batch) - hidden


def test_a_mixed_product_that_is_not_whole_is_refused() -> None:
    with pytest.raises(StartCheckError, match="mixed product by λ of the training loss"):
        JointOptimizer(Halved(), CONFIG).step()


class Autocast(ClassificationProblem):
    """A bfloat16 forward in the training loss."""

    def train_loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(self.model(batch[0]).float(), batch[1])


def test_low_precision_inside_the_loss_is_compared_roughly_and_said() -> None:
    joint = JointOptimizer(problem_of(*mlp(nn.Tanh()), kind=Autocast), CONFIG)
    joint.step()
    assert joint.start_check is not None
    assert joint.start_check.status == "coarse"


def test_a_resumed_run_remembers_and_does_not_check_again(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = JointOptimizer(RIGHT["relu"](), CONFIG)
    joint.step()
    state = joint.state_dict()
    resumed = JointOptimizer(RIGHT["relu"](), CONFIG)
    resumed.load_state_dict(state)
    assert resumed.start_check == joint.start_check
    monkeypatch.setattr("ift_tune.joint.outer_loop.check_start", None)
    resumed.step()
    del state["start_check"]  # as in checkpoints of before there was one
    older = JointOptimizer(RIGHT["relu"](), CONFIG)
    older.load_state_dict(state)
    older.step()
    assert older.start_check is None


def test_plain_training_is_not_checked() -> None:
    joint = JointOptimizer(problem_of(*mlp(applied(Half))), CONFIG)
    joint.baseline_step()
    assert joint.start_check is None


def test_a_configuration_of_before_there_was_a_check_is_the_same_one() -> None:
    assert "start_check" not in CONFIG.to_flat()
    assert MetaConfig.from_flat(CONFIG.to_flat()) == CONFIG
    off = CONFIG.updated({"start_check": False})
    assert off.to_flat()["start_check"] is False
    assert MetaConfig.from_flat(off.to_flat()) == off
    assert off.updated({"start_check": True}) == CONFIG


def a_net_of_many_sums(seed: int) -> ClassificationProblem:
    """Biases before batch normalisation, and gradients that are sums over 28,800 terms."""
    torch.manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(digits)
    wrong = torch.arange(800) < 240
    labels = torch.where(wrong, (y[:800] + torch.randint(1, 10, (800,))) % 10, y[:800])
    index = torch.arange(800)
    blocks: list[nn.Module] = []
    for channels in (1, 16):
        blocks += [nn.Conv2d(channels, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 10))
    clean = Batches(x[800:1000], y[800:1000])
    splits = Splits(
        Batches(x[:800], labels, index, batch_size=50, seed=seed),
        clean,
        clean,
        clean,
        Batches(x[:800], labels, index),
    )
    return ClassificationProblem(model, ExampleWeights(800), splits)


@pytest.mark.parametrize("seed", range(8))
def test_gradients_that_cancel_to_their_rounding_are_no_wrong_ones(seed: int) -> None:
    config = MetaConfig(inner_lr=0.01, inner_steps=10, meta_lr=0.3)
    joint = JointOptimizer(a_net_of_many_sums(seed), config, seed=seed)
    joint.step()
    assert joint.start_check is not None
    assert joint.start_check.status == "passed"
    assert joint.start_check.gradients <= MAX_GRADIENTS + DOUBT


@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_product_is_found_in_such_a_net_too(seed: int) -> None:
    class HalfSeen(ExampleWeights):  # by the mixed product alone
        def forward(self, index: Tensor | None = None) -> Tensor:
            weights = super().forward(index)
            return 0.5 * (weights + weights.detach())

    problem = a_net_of_many_sums(seed)
    problem.hyper = HalfSeen(800)
    joint = JointOptimizer(problem, MetaConfig(inner_lr=0.01, inner_steps=10), seed=seed)
    with pytest.raises(StartCheckError, match="the mixed product by λ of the training loss"):
        joint.step()


def fitted_by_many_weights(columns: int, steps: int) -> JointOptimizer:
    """Return a linear model of more columns than rows, after so many inner steps from nothing."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(24, columns, generator=generator)
    rows = Batches(inputs, (inputs[:, 0] > 0).long())
    with torch.random.fork_rng():
        torch.manual_seed(steps)
        model = nn.Linear(columns, 2)
    problem = ClassificationProblem(model, WeightDecay(model, "input"), Splits(*[rows] * 4))
    config = MetaConfig(inverse=Neumann(terms=2, alpha_scale=1.0), inner_steps=steps, inner_lr=0.03)
    return JointOptimizer(problem, config)


@pytest.mark.parametrize("columns", [300, 2000, 6000])
@pytest.mark.parametrize("steps", [2, 4, 8, 16, 40])
def test_what_rounding_leaves_of_a_fit_to_few_examples_is_no_wrong_derivative(
    columns: int, steps: int
) -> None:
    optimiser = fitted_by_many_weights(columns, steps)
    row = optimiser.step()
    check = optimiser.start_check
    assert check is not None
    if row["train_loss"] > 0.1:
        assert check.status == "passed"
    if row["train_loss"] < 1e-6:
        assert check.status == "coarse"


class Vanishing(Quadratic):
    """Its training loss is 0 wherever it is taken, and its gradient is not."""

    def train_loss(self, batch: Batch) -> Tensor:
        loss = super().train_loss(batch)
        return loss - loss.detach()


def test_a_loss_that_is_0_by_its_definition_is_judged_by_its_gradient() -> None:
    with pytest.raises(StartCheckError, match="where the loss changes by 0"):
        JointOptimizer(Vanishing(weights=4, seed=1), CONFIG).step()
