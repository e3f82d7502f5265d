"""Label smoothing against PyTorch's own, and its laws."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ift_tune.base.errors import UsageError
from ift_tune.hyper import LabelSmoothing

LOSS = partial(F.cross_entropy, reduction="none")


def make(places: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of 4 classes and class numbers of 6 examples."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 4, *places, generator=generator, dtype=torch.float64)
    return logits, torch.randint(4, (6, *places), generator=generator)


def per_class(*epsilon: float, most: float = 0.5) -> LabelSmoothing:
    kind = LabelSmoothing(len(epsilon), per="class", most=most).double()
    with torch.no_grad():
        kind.raw.copy_(torch.logit(torch.tensor(epsilon, dtype=torch.float64) / most))
    return kind


@pytest.mark.parametrize("places", [(), (3,), (2, 3)])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.4])
def test_one_smoothing_is_that_of_pytorch(places: tuple[int, ...], epsilon: float) -> None:
    logits, targets = make(places)
    kind = LabelSmoothing(4, init=epsilon).double()
    truth = LOSS(logits, targets, label_smoothing=epsilon)
    found = kind.criterion(LOSS)(logits, targets)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)
    assert found.shape == targets.shape


def test_each_class_has_its_own_smoothing() -> None:
    logits, targets = make()
    epsilons = (0.05, 0.1, 0.2, 0.4)
    found = per_class(*epsilons).criterion(LOSS)(logits, targets)
    truth = torch.stack(
        [
            F.cross_entropy(logits[i : i + 1], targets[i : i + 1], label_smoothing=epsilons[k])
            for i, k in enumerate(targets.tolist())
        ]
    )
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("places", [(), (3,)])
def test_probabilities_are_smoothed_to_the_expected_smoothed_target(
    places: tuple[int, ...],
) -> None:
    logits, _ = make(places)
    known = torch.softmax(make(places, seed=1)[0], dim=1)
    kind = per_class(0.05, 0.1, 0.2, 0.4)
    soft = kind.soften(logits, known)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones_like(soft[:, 0]))
    numbers = torch.empty_like(known[:, 0], dtype=torch.int64)
    truth = sum(known[:, k : k + 1] * kind.soften(logits, numbers.fill_(k)) for k in range(4))
    torch.testing.assert_close(soft, truth)


def test_class_numbers_are_probabilities_of_one() -> None:
    logits, targets = make((2,))
    kind = per_class(0.05, 0.1, 0.2, 0.4)
    known = F.one_hot(targets, 4).movedim(-1, 1).double()
    torch.testing.assert_close(kind.soften(logits, targets), kind.soften(logits, known))


def test_derivative_by_the_raw_parameter_is_right() -> None:
    logits, targets = make()

    def loss(raw: Tensor) -> Tensor:
        kind = per_class(0.05, 0.1, 0.2, 0.4)
        del kind.raw
        kind.raw = raw  # type: ignore[assignment]
        return kind.criterion(LOSS)(logits, targets)

    start = per_class(0.05, 0.1, 0.2, 0.4).raw
    assert torch.autograd.gradcheck(loss, (start,))


@pytest.mark.parametrize("per", ["all", "class"])
def test_the_coarse_parameter_sets_all(per: Any) -> None:
    kind = LabelSmoothing(5, per=per, init=0.2)
    assert kind.count == (1 if per == "all" else 5)
    (parameter,) = kind.coarse_space().values()
    assert parameter.start == pytest.approx(0.2)
    for value in (parameter.low, 0.3, parameter.high):
        kind.set_coarse({"smoothing": value})
        torch.testing.assert_close(kind().detach(), torch.full_like(kind(), value))
        assert all(v == pytest.approx(value) for v in kind.summary().values())


def test_smoothing_stays_in_its_range() -> None:
    kind = LabelSmoothing(3, per="class", most=0.3)
    with torch.no_grad():
        kind.raw.copy_(torch.tensor([-9.0, 0.0, 9.0]))
    found = kind().detach()
    assert float(found.min()) > 0.0
    assert float(found.max()) < 0.3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"classes": 1}, "at least 2, got 1"),
        ({"classes": 2.5}, "integer of at least 2"),
        ({"per": "clas"}, "per must be 'all' or 'class', got 'clas'"),
        ({"most": 0.0}, "most must be above 0 and at most 1"),
        ({"most": 1.5}, "most must be above 0 and at most 1"),
        ({"init": 0.0}, "init must be a smoothing above 0 and below 0.5, got 0.0"),
        ({"init": 0.5}, "init must be a smoothing above 0 and below 0.5, got 0.5"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        LabelSmoothing(**({"classes": 3} | arguments))


def test_other_classes_and_other_targets_are_refused() -> None:
    logits, targets = make()
    with pytest.raises(UsageError, match=r"made for 3 classes, got logits of shape \(6, 4\)"):
        LabelSmoothing(3).criterion(LOSS)(logits, targets)
    for wrong in (targets[:5], targets.double(), logits[:, :3]):
        with pytest.raises(UsageError, match="targets must be class numbers"):
            LabelSmoothing(4).criterion(LOSS)(logits, wrong)
