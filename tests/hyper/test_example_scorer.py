"""A scorer's weights, what it sees, its loss against detached weights, and unseen examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune.base.errors import UsageError
from ift_tune.hyper import AffineColorAugmentation, Compose, ExampleScorer, HyperKind
from ift_tune.hyper.seen import quadrature
from ift_tune.implicit.vectors import flatten
from ift_tune.testing.contracts import check_kind

REAL = torch.empty(0, dtype=torch.float64)


def moved(*arguments: Any, seed: int = 0, **settings: Any) -> ExampleScorer:
    torch.manual_seed(seed)
    kind = ExampleScorer(*arguments, **{"like": REAL, **settings})
    with torch.no_grad():
        for parameter in kind.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return kind


class Own(nn.Module):
    """Scores pixels and a sum of them; its first weights are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 1)
        self.frozen = nn.Linear(32, 3).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.trained(torch.tanh(self.frozen(inputs.flatten(1))))
        return scores.squeeze(1)


def by_loss(_model: nn.Module, inputs: Tensor) -> HyperKind:
    return ExampleScorer(sees="loss", hidden=3, like=inputs)


def by_table(_model: nn.Module, inputs: Tensor) -> HyperKind:
    return ExampleScorer(features=torch.randn(len(inputs), 3), hidden=2, like=inputs)


def by_encoder(_model: nn.Module, inputs: Tensor) -> HyperKind:
    return ExampleScorer(2, features=lambda x: x.mean((2, 3)), hidden=2, like=inputs)


def by_module(_model: nn.Module, inputs: Tensor) -> HyperKind:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(inputs[0].numel(), 2), nn.Dropout(0.5))
    return ExampleScorer(2, features=encoder.to(inputs), hidden=2, like=inputs)


def by_two(_model: nn.Module, inputs: Tensor) -> HyperKind:
    return Compose({"own": ExampleScorer(Own(), like=inputs), "loss": by_loss(_model, inputs)})


@pytest.mark.parametrize("make", [by_loss, by_table, by_encoder, by_module, by_two])
def test_kind_keeps_the_laws(make: Callable[[nn.Module, Tensor], HyperKind]) -> None:
    check_kind(make)


def test_an_encoder_is_no_hyperparameter_and_sees_as_it_was_trained() -> None:
    encoder = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    kind = ExampleScorer(2, features=encoder, hidden=3)
    assert kind.count == ExampleScorer(2, hidden=3).count
    assert not any("0.weight" in name and "network" not in name for name in kind.state_dict())
    with torch.no_grad():
        for weight in kind.network.parameters():
            weight.normal_()
    inputs = torch.randn(50, 4)
    assert torch.equal(kind.scores(inputs), kind.scores(inputs))
    assert encoder.training


def test_all_examples_start_at_init_and_are_then_weighed_by_the_network() -> None:
    inputs, losses = torch.randn(6, 3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    start = ExampleScorer(3, init=0.8, like=REAL)
    torch.testing.assert_close(start.weigh_seen(losses, inputs, None), 0.8 * losses)
    kind = moved(3, init=0.8)
    expected = torch.sigmoid(kind.network(inputs).squeeze(1) + torch.logit(REAL.new_tensor(0.8)))
    torch.testing.assert_close(kind.weigh_seen(losses, inputs, None), losses * expected)
    torch.testing.assert_close(kind.scores(inputs), expected.detach())
    assert not kind.scores(inputs).requires_grad


def test_the_loss_it_sees_is_weighed_as_if_detached_with_exact_derivatives() -> None:
    """The gradient is s(ℓ)·∇ℓ; its derivative is that of differences, which detaching loses."""
    kind = moved(sees="loss", hidden=4, init=0.4)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    targets = 2.0 * torch.randn(5, dtype=torch.float64)

    def losses(w: Tensor) -> Tensor:
        return (inputs @ w - targets).square()

    def loss(w: Tensor) -> Tensor:
        return kind.weigh(losses(w), None).mean()

    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(w), w)
    (expected,) = torch.autograd.grad((kind.scores(losses(w).detach()) * losses(w)).mean(), w)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    hessian = torch.autograd.functional.hessian(loss, w.detach())  # type: ignore[no-untyped-call]
    for k in range(3):
        step = 1e-6 * torch.eye(3, dtype=torch.float64)[k]
        ends = [
            torch.autograd.grad(loss(v), v)[0]
            for v in ((w.detach() + s * step).requires_grad_() for s in (1.0, -1.0))
        ]
        torch.testing.assert_close(hessian[k], (ends[0] - ends[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    detached = torch.autograd.functional.hessian(  # type: ignore[no-untyped-call]
        lambda v: (kind.scores(losses(v).detach()) * losses(v)).mean(), w.detach()
    )
    assert float((hessian - detached).norm() / hessian.norm()) > 0.01


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 20.0])
def test_the_weight_of_any_loss_is_the_score_that_is_shown(scale: float) -> None:
    kind = moved(sees="loss", seed=3)
    losses = (scale * torch.rand(50, dtype=torch.float64)).requires_grad_()
    (slopes,) = torch.autograd.grad(kind.weigh(losses, None).sum(), losses)
    torch.testing.assert_close(slopes, kind.scores(losses.detach()), rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("change", [5.0, 20.0, 50.0, 100.0])
def test_the_weight_of_a_steep_scorer_swings_about_the_score(change: float) -> None:
    """As the docstring says: the weight is the quadrature's sum, and its bounds are met."""
    worst, least = 0.0, 1.0
    for slope in (change, -change):
        for middle in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
            network = nn.Linear(1, 1)
            kind = ExampleScorer(network, sees="loss", like=REAL)
            with torch.no_grad():
                network.weight.fill_(slope)
                network.bias.fill_(-slope * middle)
            loss = torch.ones(1, dtype=torch.float64, requires_grad=True)
            (weight,) = torch.autograd.grad(kind.weigh(loss, None).sum(), loss)
            nodes, shares = quadrature(loss.detach())
            s = torch.sigmoid(slope * (nodes - middle))
            torch.testing.assert_close(
                weight, (shares * (s + nodes * slope * s * (1.0 - s))).sum().reshape(1)
            )
            worst = max(worst, float((weight - kind.scores(loss.detach())).abs()))
            least = min(least, float(weight))
    assert (worst <= 0.001) == (change <= 20.0)
    if change > 20.0:
        most, lowest = {50.0: (0.13, -0.01), 100.0: (0.42, -0.09)}[change]
        assert worst == pytest.approx(most, abs=5e-3)
        assert least == pytest.approx(lowest, abs=5e-3)


def test_it_sees_the_inputs_as_the_loader_gives_them() -> None:
    """Whatever is done to the inputs later, seen and unseen examples are scored alike."""
    torch.manual_seed(0)
    inputs, targets = torch.rand(4, 1, 6, 6).double(), torch.tensor([0, 1, 1, 0])
    scorer, model = moved(36), nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    augment = AffineColorAugmentation(like=inputs)
    splits = ift_tune.Splits(*[ift_tune.Batches(inputs, targets)] * 4)
    both = Compose({"augment": augment, "scorer": scorer})
    assert not both["scorer"].takes_index
    losses = []
    for kind in (both, Compose({"augment": augment})):
        problem = ift_tune.ClassificationProblem(model, kind, splits)
        torch.manual_seed(1)
        changed = augment.inputs(inputs, None)
        torch.manual_seed(1)
        losses.append(problem.train_loss((inputs, targets)))
    each = F.cross_entropy(model(changed), targets, reduction="none")
    torch.testing.assert_close(losses, [(each * scorer.scores(inputs)).mean(), each.mean()])


def test_named_inputs_are_given_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 1)

        def forward(self, ids: Tensor) -> Tensor:
            scores: Tensor = self.embedding(ids).mean(dim=1)
            return scores

    kind, ids = ExampleScorer(Named()), torch.randint(5, (3, 4))
    found = kind.weigh_seen(torch.ones(3), {"ids": ids, "mask": torch.ones(3, 4)}, None)
    torch.testing.assert_close(found.detach(), kind.scores(ids))


def test_frozen_weights_are_no_hyperparameters_and_dropout_does_not_disturb_scores() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    network[1].requires_grad_(False)
    kind = ExampleScorer(network)
    inputs = torch.randn(3, 4)
    before = torch.get_rng_state()
    torch.testing.assert_close(kind.scores(inputs), kind.scores(inputs), rtol=0.0, atol=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.training
    splits = ift_tune.Splits(*[ift_tune.Batches(inputs, torch.tensor([0, 1, 0]))] * 4)
    problem = ift_tune.ClassificationProblem(nn.Linear(4, 2), kind, splits)
    assert len(flatten(problem.hypers())) == kind.count == 9


def test_what_it_shows() -> None:
    by_loss = moved(sees="loss")
    assert list(by_loss.summary()) == [f"at_loss_{x}" for x in ("0", "0.5", "1", "2", "5")]
    expected = by_loss.scores(torch.tensor([0.5], dtype=torch.float64))
    assert by_loss.summary()["at_loss_0.5"] == pytest.approx(float(expected))
    shown = moved(2, shown=torch.randn(7, 2, dtype=torch.float64))
    assert set(shown.summary()) == {"min", "median", "mean", "max"}
    assert len(shown.views()) == 1
    assert "network_mean" in moved(2).summary()
    assert moved(2).views() == []
    table = moved(features=torch.randn(5, 2))
    assert table.summary()["max"] == pytest.approx(float(table.scores(table.table).max()))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "network must be a module, or the number of values"),
        ({"network": 0}, "got 0"),
        ({"network": 2, "sees": "loss"}, "for the 1 values of an example, got 2"),
        ({"network": 2, "features": torch.ones(4, 3)}, "for the 3 values of an example, got 2"),
        ({"network": 2, "sees": "targets"}, "'inputs' or 'loss', got 'targets'"),
        ({"sees": "loss", "features": torch.ones(4, 3)}, "does not see the loss"),
        ({"features": torch.ones(4)}, "a row for each training example"),
        ({"network": 2, "init": 1.0}, "between 0 and 1, got 1.0"),
        ({"network": 2, "hidden": 0}, "hidden must be"),
        ({"network": nn.Flatten()}, "weights to train"),
        ({"network": nn.Linear(2, 1).requires_grad_(False)}, "weights to train"),
        ({"network": nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))}, "normalisation in '1'"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        ExampleScorer(**arguments)


@pytest.mark.parametrize(
    ("kind", "inputs", "index", "text"),
    [
        (ExampleScorer(3), None, None, r"call weigh_seen\(losses, inputs, index\)"),
        (ExampleScorer(3), torch.ones(2, 4), None, "examples of 3 .* got .*4"),
        (
            ExampleScorer(3),
            torch.ones(2, 3).long(),
            None,
            "floating-point values: .* got torch.int",
        ),
        (ExampleScorer(3), {"a": torch.ones(2, 3), "b": 0}, None, "one tensor"),
        (ExampleScorer(nn.Linear(3, 2)), torch.ones(2, 3), None, r"\(B, 1\), got \(2, 2\)"),
        (ExampleScorer(features=torch.ones(4, 3)), torch.ones(2, 9), None, "got no index"),
        (ExampleScorer(features=torch.ones(4, 3)), None, torch.tensor([1, 4]), "of 4 examples"),
    ],
)
def test_what_cannot_be_seen_is_refused(
    kind: ExampleScorer, inputs: Any, index: Any, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        kind.weigh_seen(torch.ones(2), inputs, index)
