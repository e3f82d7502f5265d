"""Weights of sources against their formula, their bounds, and the mixture that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune.base.errors import UsageError
from ift_tune.base.views import Histogram
from ift_tune.hyper import Compose, DomainWeights, ExampleWeights, HyperKind, LabelSmoothing
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense
from ift_tune.testing.contracts import check_kind

REAL = torch.empty(0, dtype=torch.float64)
SOURCES = torch.tensor([2, 0, 0, 1, 0, 1, 0, 0])
START: dict[float, Any] = {0.2: "uniform"}  # the smallest share, 1/8, is below that floor
SHARES = torch.tensor([5, 2, 1], dtype=torch.float64) / 8


def moved(seed: int = 0, spread: float = 2.0, **arguments: Any) -> DomainWeights:
    kind = DomainWeights(SOURCES, **{"like": REAL, **arguments})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        kind.raw.copy_(spread * torch.randn(3, generator=generator, dtype=torch.float64))
    return kind


def test_without_bounds_proportions_are_the_softmax() -> None:
    kind = moved()
    torch.testing.assert_close(kind(), kind.raw.softmax(dim=0))
    torch.testing.assert_close(kind.weights(), kind.raw.softmax(dim=0) / SHARES)


@pytest.mark.parametrize("bounds", [{}, {"floor": 0.1}, {"max_repetition": 1.7, "floor": 0.02}])
def test_the_training_loss_is_the_mixture_of_the_sources_mean_losses(bounds: Any) -> None:
    kind, losses = moved(**bounds), torch.rand(8, dtype=torch.float64)
    found = kind.weigh(losses, torch.arange(8)).mean()
    means = torch.stack([losses[k == SOURCES].mean() for k in range(3)])
    torch.testing.assert_close(found, kind() @ means)
    # The mean weight over the split is 1: λ changes the mixture, not how much data counts.
    torch.testing.assert_close(
        kind.weigh(torch.ones_like(losses), torch.arange(8)).mean(), found.new_ones(())
    )


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(("floor", "cap"), [(0.2, None), (0.0, 1.2), (0.05, 2.5), (0.11, 1.01)])
def test_bounds_hold_however_far_lambda_goes(
    spread: float, floor: float, cap: float | None
) -> None:
    for seed in range(20):
        kind = moved(
            seed, spread, floor=floor, max_repetition=cap, init=START.get(floor, "proportional")
        )
        proportions = kind().detach()
        torch.testing.assert_close(proportions.sum(), proportions.new_ones(()))
        assert float(proportions.min()) >= floor - 1e-12
        if cap is not None:
            assert float(kind.weights().detach().max()) <= cap + 1e-9


@pytest.mark.parametrize("bounds", [{"floor": 0.1}, {"max_repetition": 1.4, "floor": 0.01}])
def test_the_derivative_of_the_solved_proportions_is_that_of_differences(bounds: Any) -> None:
    kind = moved(**bounds)
    jacobian = torch.func.jacrev(lambda raw: torch.func.functional_call(kind, {"raw": raw}, ()))(
        kind.raw.detach()
    )
    for k in range(3):
        step = 1e-6 * torch.eye(3, dtype=torch.float64)[k]
        ends = [
            torch.func.functional_call(kind, {"raw": kind.raw.detach() + s * step}, ())
            for s in (1.0, -1.0)
        ]
        torch.testing.assert_close(jacobian[:, k], (ends[0] - ends[1]) / 2e-6, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 12.0, 75.0, 350.0, 1200.0, 2e4])
def test_proportions_sum_to_one_however_far_apart_the_logits_are(
    dtype: torch.dtype, spread: float
) -> None:
    """The first source is at its cap, the last at the floor, and the second has what is left."""
    kind = DomainWeights(
        shares=[4, 3, 3], floor=0.04, max_repetition=1.6, like=torch.ones(0, dtype=dtype)
    )
    kind.raw.data.copy_(torch.tensor([spread, 0.0, -spread]))
    proportions: Tensor = kind()
    torch.testing.assert_close(proportions.sum(), torch.ones((), dtype=dtype))
    if spread > 50.0:
        expected = torch.tensor([0.64, 0.32, 0.04], dtype=dtype)
        torch.testing.assert_close(proportions.detach(), expected, rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(proportions[1], kind.raw)
    assert bool(slope.isfinite().all())
    torch.testing.assert_close(slope.sum(), torch.zeros((), dtype=dtype), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("bounds", [{"floor": 0.1}, {"max_repetition": 1.4, "floor": 0.01}])
@pytest.mark.parametrize("width", [1.0, 7.0])
def test_second_derivatives_are_those_of_differences(bounds: Any, width: float) -> None:
    kind = moved(**bounds)
    raw = (width * kind.raw.detach()).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda raw: torch.func.functional_call(kind, {"raw": raw}, ()), (raw,)
    )


def test_a_far_cap_leaves_the_softmax_and_a_near_one_its_order() -> None:
    sources = torch.arange(6).repeat_interleave(50)
    raw = torch.linspace(-2.0, 1.0, 6, dtype=torch.float64)
    far, near = (DomainWeights(sources, max_repetition=cap, like=REAL) for cap in (1e6, 1.3))
    for kind in (far, near):
        kind.raw.data.copy_(raw)
    torch.testing.assert_close(far(), raw.softmax(dim=0), rtol=1e-4, atol=0.0)
    assert near().argsort().tolist() == list(range(6))


@pytest.mark.parametrize(
    ("init", "proportions"),
    [
        ("proportional", SHARES.tolist()),
        ("uniform", [1 / 3] * 3),
        ((0.5, 0.3, 0.2), [0.5, 0.3, 0.2]),
        ({"source_1": 0.3, "source_0": 0.5, "source_2": 0.2}, [0.5, 0.3, 0.2]),
    ],
)
@pytest.mark.parametrize("bounds", [{}, {"floor": 0.06, "max_repetition": 3.0}])
def test_init_says_where_the_proportions_start(init: Any, proportions: Any, bounds: Any) -> None:
    kind = DomainWeights(SOURCES, init=init, like=REAL, **bounds)
    torch.testing.assert_close(kind().tolist(), proportions)
    if init == "proportional":
        torch.testing.assert_close(kind.weights(), torch.ones(3, dtype=torch.float64))


def test_hypergradient_of_a_mixture_is_the_closed_form() -> None:
    """w* = Σ_d p_d·m_d, so dL_val/dλ_d = L_val′(w*)·p_d·(m_d − w*)."""
    kind, values = moved(), torch.randn(8, dtype=torch.float64)
    means = torch.stack([values[k == SOURCES].mean() for k in range(3)])
    centre = (kind() @ means).detach().requires_grad_()
    loss = kind.weigh((centre - values).square(), torch.arange(8)).mean()
    result = hypergradient(loss, centre.pow(3), [centre], kind, inverse=Dense())
    mean: Tensor = centre.detach()
    expected = 3.0 * mean.square() * kind().detach() * (means - mean)
    torch.testing.assert_close(result.grads[0], expected)


def by_table(_model: nn.Module, inputs: Tensor) -> HyperKind:
    return DomainWeights(["a", "b", "b"] * (len(inputs) // 3), init="uniform", like=inputs)


def by_batch(_model: nn.Module, inputs: Tensor) -> HyperKind:
    shares = {"one": 2.0, "two": 1.0, "three": 5.0}
    kind = DomainWeights(shares=shares, floor=0.01, max_repetition=4.0, like=inputs)
    return Compose({"sources": Numbered(kind), "smoothing": LabelSmoothing(3, like=inputs)})


class Numbered(HyperKind):
    """Gives a kind sources in place of positions, as a loader would."""

    name = "numbered"

    def __init__(self, kind: HyperKind) -> None:
        super().__init__()
        self.kind = kind

    def weigh(self, losses: Tensor, index: Tensor | None) -> Tensor:
        return self.kind.weigh(losses, None if index is None else index % 3)

    def summary(self) -> dict[str, float]:
        return self.kind.summary()


@pytest.mark.parametrize("make", [by_table, by_batch])
def test_kind_keeps_the_laws(make: Callable[[nn.Module, Tensor], HyperKind]) -> None:
    check_kind(make)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_with_a_cap_begins(spread: float, seed: int) -> None:
    """The check at the start holds choices between numbers as they were: the cap makes none."""
    torch.manual_seed(seed)
    sources = torch.arange(24) % 5 % 3
    hyper = DomainWeights(sources, max_repetition=1.8).double()
    with torch.no_grad():
        hyper.raw.add_(spread * torch.randn(3))
    rows = torch.randn(24, 4).double(), torch.randint(2, (24,)), torch.arange(24)
    model = nn.Linear(4, 2).double()
    splits = ift_tune.Splits(*[ift_tune.Batches(*rows)] * 4)
    problem = ift_tune.ClassificationProblem(model, hyper, splits)
    joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(inner_steps=3))
    joint.step()
    assert joint.start_check is not None
    assert joint.start_check.status == "passed"


def test_a_loader_that_tells_sources_needs_no_index() -> None:
    """Many examples of a batch then have one third entry, and none is a position."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    model = nn.Linear(4, 3)
    kinds = [DomainWeights(SOURCES, init="uniform"), DomainWeights(shares=(5, 2, 1))]
    kinds[1].load_state_dict(kinds[0].state_dict())
    assert [kind.takes_index for kind in kinds] == [True, False]
    losses = []
    for kind, third in zip(kinds, (torch.arange(8), SOURCES), strict=True):
        splits = ift_tune.Splits(*[ift_tune.Batches(inputs, targets, third)] * 4)
        problem = ift_tune.ClassificationProblem(model, kind, splits)
        losses.append(problem.train_loss((inputs, targets, third)))
    each = F.cross_entropy(model(inputs), targets, reduction="none")
    mixture = torch.stack([each[k == SOURCES].mean() for k in range(3)]).mean()
    torch.testing.assert_close(losses, [mixture, mixture])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "got neither"),
        ({"sources": [0, 1], "shares": [1, 1]}, "got both"),
        ({"sources": [0, 2, 2]}, "leave out source 'source_1', got a share of 0"),
        ({"sources": [0, -1]}, r"numbered from 0 to 0.* got -1 to 0"),
        ({"sources": [0.0, 1.0]}, "must be integers from 0, or names"),
        ({"sources": []}, "must be integers"),
        ({"sources": [[0, 1]]}, r"of shape \(1, 2\)"),
        ({"sources": ["a", 1]}, "numbers, or all names"),
        ({"sources": ["a", "a"]}, "at least 2 sources to weigh, got 1"),
        ({"sources": ["a", "b"], "names": ["a", "c"]}, "got none for 'b'"),
        ({"sources": [0, 1, 2], "names": ["a", "b"]}, "numbered from 0 to 1"),
        ({"sources": [0, 10**12]}, "without gaps"),
        ({"sources": [0, 1], "names": ["a", "a"]}, "different lines"),
        ({"sources": [0, 1], "names": "ab"}, "the one 'ab'"),
        ({"shares": [1.0, 0.0]}, "leave out source 'source_1'"),
        ({"shares": [1.0, float("nan")]}, "got a share of nan"),
        ({"shares": {"a": 1, "b": 1}, "names": ["a", "b"]}, "where shares have them"),
        ({"shares": [1, 1], "names": ["a", "b", "c"]}, "one for each share, got 3"),
        ({"shares": [1, 1], "floor": 0.5}, "below 1/2"),
        ({"shares": [1, 1], "floor": -0.1}, r"floor must be .* got -0.1"),
        ({"shares": [1, 1], "max_repetition": 1.0}, "above 1, where every weight would be 1"),
        ({"shares": [1, 1], "max_repetition": 1.0 + 1e-9}, "clearly above 1"),
        ({"shares": [1, 1], "max_repetition": "2"}, "max_repetition must be a finite number"),
        ({"shares": [1, 1], "floor": "low"}, "floor must be a finite number .* got 'low'"),
        ({"shares": 2}, "shares must be a list of .* got 2"),
        ({"shares": ["web", "code"]}, "shares must be a number for each source"),
        ({"sources": 3}, "sources must be numbers from 0, or names, .* got 3"),
        ({"sources": "abba"}, "give a list or a tensor, got 'abba'"),
        ({"sources": ["a", None]}, "all names, one for each training example, got"),
        ({"shares": [1, 1], "init": 0.5}, "init must be a list of proportions, got 0.5"),
        ({"shares": [1, 1], "init": ["x", "y"]}, "init must be a number for each source"),
        ({"shares": [1, 99], "floor": 0.1, "max_repetition": 2.0}, "'source_0' 0.02: lower floor"),
        ({"shares": [1, 99], "floor": 0.1}, "'source_0' above 0.1 and below 1: .* got 0.01"),
        (
            {"shares": [1, 3], "init": "uniform", "max_repetition": 1.5},
            "'source_0' above 0 and below 0.375: .* got 0.5",
        ),
        ({"shares": [1, 1], "init": "equal"}, "got 'equal'"),
        ({"shares": [1, 1], "init": (0.5, 0.6)}, "sum to 1"),
        ({"shares": [1, 1], "init": {"source_0": 1.0}}, "a share for each"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        DomainWeights(**arguments)


@pytest.mark.parametrize(
    ("kind", "third", "text"),
    [
        (moved(), None, r"yield \(inputs, targets, index\), got no index"),
        (moved(), torch.tensor([0, 8]), "the sources of 8 training examples are known: .* 0 to 8"),
        (moved(), torch.tensor([0.0, 1.0]), "must be integers of shape"),
        (DomainWeights(shares=[1, 1]), None, r"\(inputs, targets, source\), got no source"),
        (DomainWeights(shares=[1, 1]), torch.tensor([0, 2]), "lie in 0 to 1, for there are 2 sour"),
        (DomainWeights(shares=[1, 1]), torch.tensor([-1, 0]), "third entry of a batch .* -1 to 0"),
        (DomainWeights(shares=[1, 1]), torch.tensor([0]), r"of shape \(2,\)"),
    ],
)
def test_wrong_sources_of_a_batch_are_refused(kind: HyperKind, third: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        kind.weigh(torch.ones(2), third)


def test_sources_of_examples_with_weights_of_their_own_are_told_by_position() -> None:
    inputs, targets = torch.randn(6, 2), torch.tensor([0, 1, 0, 1, 1, 1])
    both = Compose({"domains": DomainWeights(shares=[1, 1]), "examples": ExampleWeights(6)})
    splits = ift_tune.Splits(*[ift_tune.Batches(inputs, targets)] * 4)
    problem = ift_tune.ClassificationProblem(nn.Linear(2, 2), both, splits)
    with pytest.raises(UsageError, match="two examples of a batch have one index"):
        problem.train_loss((inputs, targets, torch.tensor([0, 0, 1, 1, 0, 1])))


def test_what_it_shows_names_the_sources_largest_first() -> None:
    kind = DomainWeights(["web"] * 6 + ["code"] * 2, init={"code": 0.75, "web": 0.25}, like=REAL)
    assert kind.summary() == pytest.approx({"code": 0.75, "web": 0.25, "largest_repetition": 3.0})
    assert kind.words() == (
        "domain weights: code 0.75 (3 times its share), web 0.25 (0.333 times its share)"
    )
    assert kind.views() == []
    many = DomainWeights(shares=[1.0] * 40)
    assert set(many.summary()) == {"min", "median", "mean", "max", "largest_repetition"}
    assert many.words().endswith(", and 28 others")
    assert many.coarse_space() == {}
    (view,) = many.views()
    assert isinstance(view, Histogram)


def test_the_coarse_space_has_a_factor_for_each_source() -> None:
    kind = moved()
    kind.set_coarse({"source_0": 1.0, "source_1": 2.0, "source_2": 4.0})
    unscaled = SHARES * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(kind(), unscaled / unscaled.sum())
    assert kind.coarse_space()["source_1"].start == pytest.approx(2.0)
