"""Imbalanced tasks: how many examples of each class, and what the weights of classes do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from ift_tune import UsageError, tasks
from ift_tune.tasks.building import cut_classes
from ift_tune.tasks.datasets import Images, digits
from ift_tune.tasks.imbalance import Imbalance

SPLITS = ("train", "val", "search", "test")


def labels(problem: Any, split: str) -> list[int]:
    counts: list[int] = torch.bincount(getattr(problem.splits, split).tensors[1]).tolist()
    return counts


def test_the_training_classes_have_a_long_tail_and_the_others_are_balanced() -> None:
    task = tasks.get("digits-imbalanced")
    problem = task.make_problem(task.default_config, "cpu", 2)
    train = labels(problem, "train")
    assert train == sorted(train, reverse=True)
    assert (train[0], train[-1]) == (70, 4)
    ratios = [a / b for a, b in pairwise(train[:6])]
    assert ratios == pytest.approx([20 ** (1 / 9)] * 5, rel=0.05)
    assert [labels(problem, name) for name in SPLITS[1:]] == [[10] * 10, [30] * 10, [60] * 10]


@pytest.mark.parametrize("ratio", [1.0, 7.0])
def test_the_ratio_is_that_of_the_ends(ratio: float) -> None:
    counts = Imbalance(140, ratio, 1, 1, 1).counts()
    assert counts[0] / counts[-1] == pytest.approx(ratio)
    with pytest.raises(UsageError, match=r"ratio must be at least 1, got 0.5"):
        Imbalance(140, 0.5, 1, 1, 1).counts()


def test_splits_of_given_numbers_are_disjoint_and_test_images_are_the_data_sets_own() -> None:
    whole = digits()
    numbered = torch.arange(len(whole.targets)).view(-1, 1, 1, 1)
    no_test = Images(numbered, whole.targets, numbered[:0], whole.targets[:0], white=2)
    parts = cut_classes(no_test, [30, 4] + [9] * 8, 5, 6, 7, seed=1)
    used = torch.cat([inputs.flatten() for inputs, _ in parts])
    assert len(set(used.tolist())) == len(used) == 106 + 180
    own = Images(numbered, whole.targets, numbered + 5000, whole.targets, white=2)
    test, targets = cut_classes(own, [3] * 10, 1, 1, 8, seed=1)[3]
    assert float((test + 1.0).min()) >= 5000.0
    assert torch.bincount(targets).tolist() == [8] * 10


def test_too_few_of_a_class_are_refused_with_the_numbers() -> None:
    with pytest.raises(UsageError, match=r"of class 0 are needed, and there are 178: .* got \[170"):
        cut_classes(digits(), [170] * 10, 5, 5, 5, seed=0)
    whole = digits()
    own = Images(whole.pixels, whole.targets, whole.pixels[:40], whole.targets[:40])
    with pytest.raises(UsageError, match=r"5 test images of class .* lower test"):
        cut_classes(own, [2] * 10, 1, 1, 5, seed=0)


def test_learned_weights_favour_the_tail() -> None:
    from ift_tune import JointOptimizer

    task = tasks.get("digits-imbalanced")
    problem = task.make_problem(task.default_config, "cpu", 4)
    joint = JointOptimizer(problem, task.default_config)
    for _ in range(25):
        joint.step()
    weights = list(problem.summary().values())[:10]
    assert sum(weights[5:]) > 1.2 * sum(weights[:5])
