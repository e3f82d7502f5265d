"""The augmentation tasks: the same start for all augmenters, pictures that disturb nobody."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ift_tune import UsageError, tasks
from ift_tune.base.views import ImageGrid
from ift_tune.tasks.augmentation import AUGMENTERS, HAND_SET
from ift_tune.tasks.building import small_cnn
from ift_tune.tasks.problems import AugmentationProblem


def make(augmenter: str, classifier: str = "cnn") -> AugmentationProblem:
    options = {"augmenter": augmenter, "classifier": classifier}
    task = tasks.get("digits-augment", options=options)
    problem = task.make_problem(task.default_config, "cpu", 0)
    assert isinstance(problem, AugmentationProblem)
    return problem


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 5, 7)])
def test_small_cnn_fits_any_image_size(shape: tuple[int, int, int]) -> None:
    assert small_cnn(shape, classes=4, width=3)(torch.zeros(2, *shape)).shape == (2, 4)


def test_all_augmenters_start_from_the_same_weights_splits_and_order() -> None:
    problems = [make(name) for name in AUGMENTERS]

    def content(problem: AugmentationProblem) -> list[Tensor]:
        first = [t for name in ("train", "val") for t in next(iter(getattr(problem.splits, name)))]
        return [*problem.weights(), *first]

    reference = content(problems[0])
    for problem in problems[1:]:
        assert all(torch.equal(a, b) for a, b in zip(reference, content(problem), strict=True))


def test_a_fixed_augmentation_acts_and_is_not_tuned() -> None:
    problem = make("fixed")
    assert sum(h.numel() for h in problem.hypers()) == 1  # the decay
    summary = problem.summary()
    for name, value in HAND_SET.items():
        assert summary[f"augmentation.{name}"] == pytest.approx(value)
    assert summary["mean_change"] > 0.1


def test_without_augmentation_nothing_changes() -> None:
    summary = make("none").summary()
    assert (summary["mean_change"], summary["spread"]) == (0.0, 0.0)


def test_augmentation_acts_in_training_alone() -> None:
    problem, plain = make("fixed"), make("none")
    batch = next(iter(problem.splits.train))
    assert float(problem.train_loss(batch).detach()) != float(plain.train_loss(batch).detach())
    assert torch.equal(problem.val_loss(batch), plain.val_loss(batch))
    assert problem.metrics(batch) == plain.metrics(batch)


@pytest.mark.parametrize("augmenter", ["network", "affine"])
def test_views_show_originals_augmentations_and_their_spread(augmenter: str) -> None:
    problem = make(augmenter)
    before = torch.get_rng_state()
    samples, spread = problem.views()
    assert isinstance(samples, ImageGrid)
    assert isinstance(spread, ImageGrid)
    assert torch.equal(torch.get_rng_state(), before)
    again, _ = problem.views()
    assert isinstance(again, ImageGrid)
    assert samples.images.tolist() == again.images.tolist()
    columns = torch.as_tensor(samples.images).view(-1, samples.columns, *samples.images.shape[1:])
    originals = problem.splits.train.tensors[0][: len(columns)]  # type: ignore[attr-defined]
    assert torch.equal(columns[:, 0], originals)
    assert not torch.equal(columns[:, 1], columns[:, 2])
    assert spread.images.shape == originals.shape
    assert spread.high == pytest.approx(float(spread.images.max()))
    expected = problem.summary()["spread"]
    assert float(spread.images.mean()) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.0


def test_drawing_leaves_the_order_of_batches_alone() -> None:
    one, other = make("network"), make("network")
    one.views()
    one.summary()
    assert torch.equal(next(iter(one.splits.train))[2], next(iter(other.splits.train))[2])


@pytest.mark.parametrize(
    ("options", "near"),
    [({"augmenter": "netwrk"}, "'network'"), ({"classifier": "resnet"}, "'resnet18'")],
)
def test_unknown_options_are_refused_with_the_nearest(options: dict[str, str], near: str) -> None:
    with pytest.raises(UsageError, match=near):
        make(**{"augmenter": "none", "classifier": "cnn"} | options)
