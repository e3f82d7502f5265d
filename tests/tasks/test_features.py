"""A decay for each feature: which are kept, and how that is said."""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer

from ift_tune import JointOptimizer, tasks
from ift_tune.tasks import datasets
from ift_tune.tasks.problems import FeatureProblem


def test_columns_are_standardised_and_named() -> None:
    table = datasets.load("breast-cancer")
    assert table.inputs.shape == (569, 30)
    assert table.names == tuple(load_breast_cancer().feature_names)
    torch.testing.assert_close(table.inputs.mean(dim=0), torch.zeros(30), atol=1e-5, rtol=0.0)
    assert table.targets.unique().tolist() == [0, 1]


def test_features_are_ranked_by_their_decay_and_noise_comes_last() -> None:
    """Of columns of noise beside the measurements, none is among those that matter most."""
    table = datasets.load("breast-cancer")
    noise = torch.randn(569, 10, generator=torch.Generator().manual_seed(0))
    names = (*table.names[20:], *(f"noise {k}" for k in range(10)))
    mixed = datasets.Tabular(torch.cat([table.inputs[:, 20:], noise], 1), table.targets, names)
    task = tasks.get("breast-cancer-features")
    torch.manual_seed(0)
    problem = task.build(mixed, torch.device("cpu"), 1)
    assert isinstance(problem, FeatureProblem)
    joint = JointOptimizer(problem, task.default_config)
    for _ in range(60):
        joint.step()
    ranked = problem.ranked()
    decays = [decay for _, decay in ranked]
    assert decays == sorted(decays)
    assert {name for name, _ in ranked} == set(names)
    places = [place for place, (name, _) in enumerate(ranked) if name.startswith("noise")]
    assert sum(places) / len(places) > 11.0  # 9.5 if nothing were found
    words = problem.words()
    assert words.startswith(f"features that matter most, by their decay: {ranked[0][0]} (")
    assert f"; least: {ranked[-1][0]} (" in words
