"""What leaving out an example changes is predicted: held against training without it, densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ift_tune import (
    Batches,
    BilevelProblem,
    ClassificationProblem,
    Compose,
    ExampleWeights,
    JointOptimizer,
    MetaConfig,
    RegressionProblem,
    SolveStatus,
    Splits,
    UsageError,
    WeightDecay,
)
from ift_tune.base.statistics import relation
from ift_tune.studies.influence import influence
from ift_tune.testing.frozen import minimise

EXAMPLES = 150  # first order: what one of so many does is small


def classifier(*, batch_size: int | None = None, scale: float = 1.0) -> ClassificationProblem:
    """Softmax regression in double precision, all weights different, some saturated."""
    generator = torch.Generator().manual_seed(3)
    targets = torch.arange(EXAMPLES) % 3
    centres = torch.eye(3, dtype=torch.float64)[targets]
    noise = torch.randn(4, EXAMPLES, 3, generator=generator, dtype=torch.float64)
    train, val, search, test = scale * (centres + noise)
    index = torch.arange(EXAMPLES)
    splits = Splits(
        Batches(train, targets, index, batch_size=batch_size),
        Batches(val, targets),
        Batches(search, targets, batch_size=batch_size),
        Batches(test, targets),
    )
    model = nn.Linear(3, 3).double()
    weights = ExampleWeights(EXAMPLES, like=model.weight)
    with torch.no_grad():
        weights.raw.copy_(3.0 * torch.randn(EXAMPLES, generator=generator, dtype=torch.float64))
        weights.raw[:2] = 60.0  # where the sigmoid has no slope left
    decay = WeightDecay(model, "model", init=0.02, transform="exp")
    return ClassificationProblem(model, Compose({"w": weights, "decay": decay}), splits)


def regression() -> RegressionProblem:
    """Least squares with a ridge, weights above 1."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(3, 120, 4, generator=generator, dtype=torch.float64)
    truth = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, 120, 1, generator=generator, dtype=torch.float64)
    parts = [(x, x @ truth + e) for x, e in zip(inputs, noise, strict=True)]
    rest = [Batches(*part) for part in parts[1:]]
    model = nn.Linear(4, 1, bias=False).double()
    weights = ExampleWeights(120, transform="softplus", init=2.0, like=model.weight)
    kinds = {"w": weights, "decay": WeightDecay(model, "model", init=0.1, transform="exp")}
    splits = Splits(Batches(*parts[0], torch.arange(120)), rest[0], rest[1], rest[1])
    return RegressionProblem(model, Compose(kinds), splits)


def test_the_order_of_the_data_does_not_matter() -> None:
    drawn = classifier(batch_size=5)
    in_order = classifier(batch_size=5)
    order = torch.arange(EXAMPLES).view(-1, 3).T.reshape(-1)  # by class
    rows = [tensor[order] for tensor in _rows(in_order.splits.train)]
    in_order.splits = replace(in_order.splits, train=Batches(*rows, batch_size=5))
    kinds = [weights_of(problem) for problem in (drawn, in_order)]
    with torch.no_grad():
        kinds[1].raw.copy_(kinds[0].raw[order])
    rows[2] = torch.arange(EXAMPLES)
    in_order.splits = replace(in_order.splits, train=Batches(*rows, batch_size=5))
    ours, theirs = (
        influence(at_the_minimum(problem), kind).changes
        for problem, kind in zip((drawn, in_order), kinds, strict=True)
    )
    whole = classifier()
    exact = influence(at_the_minimum(whole), weights_of(whole)).changes
    # Of 40 examples drawn, each time others; of the first 40 by class there were but one class.
    for changes in (ours[order], theirs):
        assert relation(changes.numpy(), exact[order].numpy()).rank.mean > 0.9


def weights_of(problem: BilevelProblem) -> ExampleWeights:
    return next(m for m in problem.hyper.modules() if isinstance(m, ExampleWeights))


def minimum(problem: BilevelProblem, factors: Sequence[float]) -> list[Tensor]:
    """Return the weights of the model where the weights of the examples are multiplied by factors.

    By hand, from the definition alone: no loss, batch or product of the package's.
    """
    changed = weights_of(problem)().detach() * torch.tensor(factors, dtype=torch.float64)
    (inputs, targets, _), penalty = _rows(problem.splits.train), problem.penalty()
    assert penalty is not None

    def objective(w: list[Tensor]) -> Tensor:
        loss: Tensor = (changed * _losses(w, inputs, targets)).mean() + penalty.value(w)
        return loss

    found, size, _ = minimise(objective, [w.detach() for w in problem.weights()])
    assert size < 1e-8
    return found


def retrained(problem: BilevelProblem, factors: Sequence[float]) -> float:
    """Return the search loss after training with such factors."""
    inputs, targets = _rows(problem.splits.search)
    return float(_losses(minimum(problem, factors), inputs, targets).mean())


def _rows(loader: object) -> tuple[Tensor, ...]:
    assert isinstance(loader, Batches)
    return tuple(loader.tensors)


def _losses(w: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    outputs: Tensor = inputs @ w[0].T + (w[1] if len(w) > 1 else 0.0)
    if targets.is_floating_point():
        squares: Tensor = (outputs - targets).square()
        return squares.squeeze(1)
    chances: Tensor = outputs.log_softmax(dim=1)
    found: Tensor = -chances[torch.arange(len(targets)), targets]
    return found


def at_the_minimum(problem: BilevelProblem) -> JointOptimizer:
    found = minimum(problem, [1.0] * len(weights_of(problem).raw))
    with torch.no_grad():
        for weight, value in zip(problem.weights(), found, strict=True):
            weight.copy_(value)
    return JointOptimizer(problem, MetaConfig())


@pytest.mark.parametrize("make", [classifier, regression])
def test_slopes_are_those_of_dense_retraining(make: type[BilevelProblem]) -> None:
    problem = make()
    kind = weights_of(problem)
    found = influence(at_the_minimum(problem), kind, products=300)
    assert found.status is SolveStatus.CONVERGED
    step = 1e-4
    for i in (0, 1, 2, 7, 13, 23):  # the first two are saturated: λ has no slope there, c has
        ends = []
        for sign in (1.0, -1.0):
            factors = [1.0 + sign * step * (j == i) for j in range(len(kind.raw))]
            ends.append(retrained(problem, factors))
        slope = (ends[0] - ends[1]) / (2.0 * step)
        # −c·dL/dc, and the slope along the factor is c·dL/dc.
        assert float(found.changes[i]) == pytest.approx(-slope, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("make", [classifier, regression])
def test_changes_are_those_of_leaving_out(make: type[BilevelProblem]) -> None:
    problem = make()
    kind = weights_of(problem)
    found = influence(at_the_minimum(problem), kind, products=300).changes
    size = len(kind.raw)
    base = retrained(problem, [1.0] * size)
    without = [[float(j != i) for j in range(size)] for i in range(size)]
    truth = [retrained(problem, factors) - base for factors in without]
    found_relation = relation(found.numpy(), truth)
    assert found_relation.rank.mean > 0.97
    assert found_relation.slope.mean == pytest.approx(1.0, abs=0.25)
    large = [i for i in range(size) if abs(truth[i]) > 0.3 * max(map(abs, truth))]
    assert all(float(found[i]) * truth[i] > 0.0 for i in large)


def test_everything_is_as_before_afterwards() -> None:
    problem = classifier()
    kind, joint = weights_of(problem), at_the_minimum(problem)
    before = kind.raw.detach().clone(), kind.transform, [w.clone() for w in problem.weights()]
    influence(joint, kind)
    assert torch.equal(kind.raw, before[0])
    assert kind.transform is before[1]
    assert all(torch.equal(w, b) for w, b in zip(problem.weights(), before[2], strict=True))


def test_mini_batches_come_to_the_same_as_the_whole_split() -> None:
    whole, cut = classifier(), classifier(batch_size=50)
    joint = at_the_minimum(whole)
    cut.model.load_state_dict(whole.model.state_dict())
    found = influence(joint, weights_of(whole), products=300).changes
    parts = influence(JointOptimizer(cut, MetaConfig()), weights_of(cut), products=300).changes
    torch.testing.assert_close(parts, found, rtol=1e-3, atol=1e-9)


def test_where_the_hessian_is_not_positive_gauss_newton_steps_in() -> None:
    problem = classifier()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    kind = ExampleWeights(EXAMPLES, like=next(model.parameters()))
    bent = ClassificationProblem(model, kind, problem.splits)
    found = influence(JointOptimizer(bent, MetaConfig()), kind)
    assert found.gauss_newton
    assert bool(found.changes.isfinite().all())


def test_examples_that_no_batch_brings_are_not_known() -> None:
    problem = classifier()
    rows = _rows(problem.splits.train)
    part = Batches(*(tensor[:100] for tensor in rows))
    val = problem.splits.val
    splits = Splits(problem.splits.train, val, val, val, curvature=part)
    partly = ClassificationProblem(problem.model, problem.hyper, splits)
    found = influence(JointOptimizer(partly, MetaConfig()), weights_of(partly)).changes
    assert bool(found[:100].isfinite().all())
    assert bool(found[100:].isnan().all())


def test_batches_that_do_not_tell_are_refused() -> None:
    problem = classifier()
    rows = _rows(problem.splits.train)

    class Own(BilevelProblem):
        def __init__(self) -> None:
            self.model, self.hyper = problem.model, ExampleWeights(EXAMPLES, like=rows[0])
            self.splits = Splits(Batches(*rows[:2]), *[problem.splits.val] * 3)

        def train_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
            losses = nn.functional.cross_entropy(self.model(batch[0]), batch[1], reduction="none")
            found: Tensor = (self.hyper() * losses).mean()
            return found

        def val_loss(self, batch: tuple[Tensor, ...]) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    own = Own()
    with pytest.raises(UsageError, match="must tell which examples they hold"):
        influence(JointOptimizer(own, MetaConfig()), weights_of(own))
