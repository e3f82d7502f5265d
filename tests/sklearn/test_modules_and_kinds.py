"""Modules and kinds of the user's own, as instances, classes and functions."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import make_classification
from torch import Tensor, nn

import ift_tune
from ift_tune.sklearn import IFTClassifier, IFTRegressor

SHORT: dict[str, Any] = {
    "outer_steps": 3,
    "inner_steps": 10,
    "learning_rate": 3e-2,
    "random_state": 0,
    "device": "cpu",
}
X, y = make_classification(120, 8, n_informative=5, n_classes=3, random_state=0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def by_channel(model: nn.Module, inputs: Tensor, targets: Tensor) -> ift_tune.HyperKind:
    assert inputs.shape == (len(targets), 8)
    return ift_tune.WeightDecay(model, "channel", init=1e-2)


class Spoken(nn.Module):
    """A model whose logits stand in an object."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, outputs)

    def forward(self, inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(inputs), hidden=inputs)


@pytest.mark.parametrize("copied", [False, True])
def test_a_kind_made_for_a_module_acts_on_the_copy_that_is_trained(copied: bool) -> None:
    module = net()
    decay = ift_tune.WeightDecay(module, "channel", init=1e-2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    estimator = IFTClassifier(module, tune=decay, **SHORT)
    if copied:  # which copies module and kind each by itself
        estimator = clone(estimator)
    estimator.fit(X, y)
    by_function = IFTClassifier(net(), tune=by_channel, **SHORT).fit(X, y)
    found = list(estimator.hyper_.values())
    expected = list(by_function.hyper_.values())
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    assert all((array != 1e-2).all() for array in found)
    # what the user gave stays as it was
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all((raw == raw.flatten()[0]).all() for raw in decay.raw)


def test_a_kind_for_a_part_of_the_module_acts_on_that_part() -> None:
    module = net()
    estimator = IFTClassifier(module, tune=ift_tune.WeightDecay(module[2], "tensor"), **SHORT)
    assert list(clone(estimator).fit(X, y).hyper_) == ["weight_decay.weight", "weight_decay.bias"]
    twins = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))
    unclear = clone(IFTClassifier(twins, tune=ift_tune.WeightDecay(twins[0]), **SHORT))
    with pytest.raises(ValueError, match=r"kind for a Linear of which .* has 2: give a function"):
        unclear.fit(X, y)


def test_learned_dropout_of_a_module_is_bound_too() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    tune = ift_tune.DropoutRates(module, {"1": ift_tune.DropoutSite()})
    estimator = clone(IFTClassifier(module, tune=tune, **SHORT)).fit(X, y)
    (rate,) = estimator.hyper_.values()
    assert 0.0 < float(rate) < 1.0
    assert float(rate) != pytest.approx(float(next(iter(tune.learned().values()))))


@pytest.mark.parametrize("module", [nn.Linear, Spoken, lambda columns, outputs: net()])
def test_classes_and_functions_make_modules(module: Any) -> None:
    estimator = IFTClassifier(module, tune="weight_decay", **SHORT).fit(X, y)
    assert estimator.predict_proba(X).shape == (120, 3)
    assert estimator.score(X, y) > 0.4


def test_a_module_starts_from_the_weights_that_it_has() -> None:
    module = net()
    with torch.no_grad():
        module.get_parameter("2.bias").copy_(torch.tensor([0.0, 50.0, 0.0]))
    slow = {**SHORT, "learning_rate": 1e-6}
    estimator = IFTClassifier(module, tune="weight_decay", **slow).fit(X, y)
    assert set(estimator.predict(X)) == {1}


@pytest.mark.parametrize("shape", [(0,), (0, 1)])
def test_one_logit_is_that_of_the_second_class(shape: tuple[int, ...]) -> None:
    module = nn.Sequential(nn.Linear(8, 1), *([nn.Flatten(0)] if len(shape) == 1 else []))
    names = np.where(y == 0, "zero", "other")
    estimator = IFTClassifier(module, tune="weight_decay", **{**SHORT, "outer_steps": 15})
    estimator.fit(X, names)
    probabilities = estimator.predict_proba(X)
    assert probabilities.shape == (120, 2)
    assert estimator.classes_.tolist() == ["other", "zero"]
    assert probabilities[names == "zero", 1].mean() > probabilities[names == "other", 1].mean()
    assert estimator.score(X, names) > 0.7


@pytest.mark.parametrize("last", [[], [nn.Flatten(0)]])
def test_a_regressor_takes_one_column_for_one_target(last: list[nn.Module]) -> None:
    target = X[:, 0] - X[:, 1]
    module = nn.Sequential(nn.Linear(8, 1), *last)
    estimator = IFTRegressor(module, tune="features", **{**SHORT, "outer_steps": 15})
    assert estimator.fit(X, target).predict(X).shape == (120,)
    assert estimator.score(X, target) > 0.5


def test_weights_in_float64_are_trained_and_asked_in_float64() -> None:
    estimator = IFTClassifier(net().double(), tune="class_weights", **SHORT).fit(X, y)
    assert estimator.hyper_["class_weights"].dtype == np.float64
    assert estimator.predict_proba(X).dtype == np.float64
    assert estimator.predict_proba(X.astype(np.float32)).dtype == np.float64


def test_several_kinds_have_the_names_that_they_are_given() -> None:
    named = {"smooth": ift_tune.LabelSmoothing(3), "decay": "weight_decay", "own": by_channel}
    estimator = IFTClassifier(net(), tune=named, **SHORT).fit(X, y)
    assert {name.split(".")[0] for name in estimator.hyper_} == set(named)
    words = IFTClassifier(tune=["class_weights", "features"], **SHORT).fit(X, y)
    assert next(iter(words.hyper_)) == "class_weights"
    assert words.hyper_["features.features"].shape == (8,)
    assert "class_weights" in repr(words.hyper_)
    with pytest.raises(ValueError, match="read-only"):
        words.hyper_["class_weights"][0] = 1.0


def test_a_model_that_normalises_batches_is_used_in_evaluation_mode() -> None:
    module = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    estimator = IFTClassifier(module, tune="weight_decay", **SHORT).fit(X, y)
    alone = np.concatenate([estimator.predict_proba(X[[k]]) for k in range(20)])
    assert np.allclose(alone, estimator.predict_proba(X)[:20], atol=1e-5)


def test_a_class_with_too_few_rows_is_trained_on_and_said() -> None:
    few = np.where(np.arange(120) < 2, 3, y)
    with pytest.warns(UserWarning, match="2 rows of 1 classes with fewer than 3 rows"):
        estimator = IFTClassifier(**SHORT).fit(X, few)
    assert {0, 1} <= set(estimator.split_["train"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IFTClassifier(**SHORT).fit(X, y)
