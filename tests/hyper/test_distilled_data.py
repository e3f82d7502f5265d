"""Distilled data: what the model is given, where it starts, and the hypergradient of its pixels."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.base.views import ImageGrid
from ift_tune.hyper import Compose, DistilledData, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.hypergradient import hypergradient
from ift_tune.implicit.inverse import Dense
from ift_tune.problem.problem import Splits
from ift_tune.testing import check_hypergradient

LIKE = torch.empty(0, dtype=torch.float64)
SHAPE = (1, 2, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def given(images: Tensor, **arguments: Any) -> DistilledData:
    return DistilledData(len(images), images.shape[1:], init=images, like=LIKE, **arguments)


def test_the_model_is_given_the_images_at_the_index_whatever_the_loader_says() -> None:
    images, index = random(4, *SHAPE), torch.tensor([3, 0, 3])
    kind = given(images)
    assert torch.equal(kind.inputs(random(3, *SHAPE, seed=1), index), images[index])
    assert torch.equal(kind.inputs(random(3, 6, seed=2), index), images[index].flatten(1))
    assert torch.equal(kind(), images)
    assert kind.count == 24


def test_tanh_keeps_pixels_in_bounds_and_starts_from_the_images_given() -> None:
    images = 0.9 * random(4, *SHAPE).tanh()
    kind = given(images, transform="tanh")
    torch.testing.assert_close(kind(), images)
    with torch.no_grad():
        kind.raw.mul_(100.0)
    assert float(kind().detach().abs().max()) <= 1.0


def test_starts_as_faint_noise_or_as_one_value_or_by_a_function() -> None:
    torch.manual_seed(0)
    faint = DistilledData(10, (1, 8, 8))
    assert 0.0 < float(faint().detach().abs().mean()) < 0.1
    grey = DistilledData(2, SHAPE, init=0.25, transform="tanh")
    torch.testing.assert_close(grey(), torch.full((2, *SHAPE), 0.25))
    filled = DistilledData(2, SHAPE, init=partial(nn.init.constant_, val=2.0), transform="tanh")
    torch.testing.assert_close(filled(), torch.full((2, *SHAPE), 2.0).tanh())


def least_squares() -> tuple[DistilledData, Tensor, Tensor, Tensor, Tensor]:
    """Two distilled rows of three pixels, their targets, and a validation example (x, y)."""
    images = random(2, 1, 1, 3)
    targets, x = random(2, seed=1), random(3, seed=2)
    return given(images), targets, x, torch.tensor(0.7, dtype=torch.float64), images.flatten(1)


def test_hypergradient_of_ridge_regression_is_that_of_its_closed_form() -> None:
    """w* = (XᵀX + c)⁻¹Xᵀt in closed form, differentiated by autograd through the solution."""
    kind, targets, x, y, rows = least_squares()
    free = rows.clone().requires_grad_()
    identity = torch.eye(3, dtype=torch.float64)
    solved = torch.linalg.solve(free.T @ free + 0.3 * identity, free.T @ targets)
    (expected,) = torch.autograd.grad((solved @ x - y).square(), free)
    weights = solved.detach().requires_grad_()
    inputs = kind.inputs(torch.zeros(2, 3, dtype=torch.float64), torch.arange(2))
    result = hypergradient(
        (inputs @ weights - targets).square().sum() + 0.3 * weights.square().sum(),
        (weights @ x - y).square(),
        [weights],
        kind,
        inverse=Dense(),
    )
    torch.testing.assert_close(result.grads[0].flatten(1), expected)


TRAIN = (torch.zeros(3, 6, dtype=torch.float64), torch.arange(3), torch.arange(3))
VAL = (random(12, 6, seed=3), torch.arange(12) % 3)
IMAGES = 0.5 * random(3, *SHAPE).tanh()
DECAY = 0.05


def softmax_regression(transform: str) -> tuple[nn.Linear, ClassificationProblem]:
    """Three distilled images of six pixels, a decay, twelve validation rows."""
    model = nn.Linear(6, 3).double()
    hyper = Compose(
        {
            "images": given(IMAGES, transform=transform),
            "decay": WeightDecay(model, "model", init=DECAY, transform="exp"),
        }
    )
    return model, ClassificationProblem(model, hyper, Splits([TRAIN], [VAL], [VAL], [VAL]))


def test_hypergradient_of_bounded_pixels_and_the_decay_passes_the_check() -> None:
    torch.manual_seed(0)
    _, problem = softmax_regression("tanh")
    report = check_hypergradient(problem, directions=2, unrolled_steps=3)
    assert report.passed
    assert report.hypers == 19


def with_ones(rows: Tensor) -> Tensor:
    """The rows with a column of ones, for the bias."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def newton(rows: Tensor) -> Tensor:
    """Weights and bias (3, 7) of softmax regression on one row a class, by hand."""
    inputs, labels = with_ones(rows), torch.eye(3, dtype=torch.float64)
    weights = torch.zeros(3, 7, dtype=torch.float64)
    for _ in range(12):
        chances = (inputs @ weights.T).softmax(dim=1)
        slope = (chances - labels).T @ inputs / 3 + 2 * DECAY * weights
        inner = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        curvature = torch.einsum("nab,ni,nj->aibj", inner, inputs, inputs).reshape(21, 21) / 3
        curvature = curvature + 2 * DECAY * torch.eye(21, dtype=torch.float64)
        weights = weights - torch.linalg.solve(curvature, slope.flatten()).view(3, 7)
    assert float(slope.norm()) < 1e-12
    return weights


def test_every_pixel_has_the_hypergradient_of_central_differences() -> None:
    """With the inner problem solved anew, by Newton's method, for each pixel moved."""

    def val_loss(rows: Tensor) -> float:
        return float(F.cross_entropy(with_ones(VAL[0]) @ newton(rows).T, VAL[1]))

    model, problem = softmax_regression("none")
    start = IMAGES.flatten(1)
    solved = newton(start)
    with torch.no_grad():
        model.weight.copy_(solved[:, :6])
        model.bias.copy_(solved[:, 6])
    result = hypergradient(
        problem.train_loss(TRAIN),
        problem.val_loss(VAL),
        model,
        problem.hyper,
        inverse=Dense(),
        penalty=problem.penalty(),
    )
    steps = 1e-5 * torch.eye(18, dtype=torch.float64).view(18, 3, 6)
    differences = [(val_loss(start + step) - val_loss(start - step)) / 2e-5 for step in steps]
    expected = torch.tensor(differences, dtype=torch.float64)
    torch.testing.assert_close(result.grads[0].flatten(), expected, rtol=1e-6, atol=1e-9)


def test_pictures_are_the_images_with_their_labels() -> None:
    images = random(3, 3, 4, 5)
    (view,) = given(images, labels=["cat", 4, "dog"]).views()
    assert isinstance(view, ImageGrid)
    assert view.images.tolist() == images.tolist()
    assert view.captions == ("cat", "4", "dog")
    assert view.low == -view.high
    share = float((images.abs() > view.high).double().mean())
    assert 0.0 < share < 0.02
    assert given(random(3, 6)).views() == []  # rows are no images
    (empty,) = DistilledData(1, SHAPE, init=0.0).views()
    assert isinstance(empty, ImageGrid)
    assert empty.high > empty.low


def test_of_many_images_some_are_shown_evenly() -> None:
    images = torch.arange(6000.0).reshape(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    kind = DistilledData(6000, (3, 32, 32), init=images, labels=range(6000))
    (view,) = kind.views()
    assert isinstance(view, ImageGrid)
    assert view.title == "distilled images, 100 of 6,000"
    assert view.images[:, 0, 0, 0].tolist() == [float(number) for number in view.captions]
    assert (view.captions[0], view.captions[50], view.captions[-1]) == ("0", "3030", "5999")


def test_images_of_more_pixels_than_quantile_takes_are_shown() -> None:
    (view,) = DistilledData(1, (1, 4097, 4097), init=2.0).views()
    assert isinstance(view, ImageGrid)
    assert view.high == 2.0


def test_the_summary_tells_range_and_spread() -> None:
    images = torch.tensor([[[[0.0, 1.0]]], [[[3.0, -1.0]]]], dtype=torch.float64)
    assert given(images).summary() == {
        "min": -1.0,
        "median": 0.0,
        "mean": 0.75,
        "max": 3.0,
        "spread": 2.5,
    }


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"examples": 0}, "at least 1, got 0"),
        ({"shape": ()}, r"shape must be that of one image, .* got \(\)"),
        ({"shape": (1, 0, 3)}, "shape must be an integer of at least 1, got 0"),
        ({"labels": ["one"]}, "each of the 2 images, got 1"),
        ({"init": torch.zeros(2, 6)}, r"must have shape \(2, 1, 2, 3\), got \(2, 6\)"),
        ({"init": torch.ones(2, *SHAPE), "transform": "tanh"}, "scale them, as by 0.9"),
        ({"init": 1.0, "transform": "tanh"}, r"a pixel in \(-1, 1\), got 1.0"),
        ({"transform": "sigmoid"}, "unknown transform 'sigmoid'"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    valid: dict[str, Any] = {"examples": 2, "shape": SHAPE}
    with pytest.raises(UsageError, match=text):
        DistilledData(**(valid | arguments))


def test_batches_that_do_not_fit_are_refused_with_the_mend() -> None:
    kind = DistilledData(4, SHAPE)
    with pytest.raises(UsageError, match=r"yield \(inputs, targets, index\)"):
        kind.inputs(torch.zeros(2, 6), None)
    with pytest.raises(UsageError, match="make the DistilledData of as many pixels"):
        kind.inputs(torch.zeros(2, 7), torch.arange(2))
