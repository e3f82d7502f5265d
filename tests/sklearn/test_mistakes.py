"""Mistakes are refused early, in a sentence that names the mend."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import has_fit_parameter
from torch import nn

import ift_tune
from ift_tune.sklearn import IFTClassifier, IFTRegressor

X = np.random.RandomState(0).randn(40, 3)
y = np.arange(40) % 2


class WideAndDeep(nn.Module):
    """Takes the columns in twice."""

    def __init__(self, columns: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.deep = nn.Linear(columns, outputs), nn.Linear(columns, outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.wide(rows) + self.deep(rows).tanh()
        return found


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tune": "feature"}, "did you mean 'features'"),
    ({"tune": ift_tune.WeightDecay}, "tune must be one of weight_decay, .* got <class"),
    ({"tune": []}, "at least one kind"),
    ({"tune": ["features", 3]}, "tune must be one of"),
    ({"tune": lambda model, X, y: model}, "must return a kind of hyperparameters"),
    ({"tune": ift_tune.ExampleWeights(40)}, "each of the 28 rows .* got 40"),
    (
        {
            "tune": "features",
            "module": nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 3), nn.Flatten()),
        },
        "first layer with an input for each column",
    ),
    ({"tune": "features", "module": WideAndDeep}, r"got wide\.weight and deep\.weight of the"),
    ({"module": nn.Linear(3, 2).requires_grad_(False)}, "weights to train"),
    ({"module": 3}, "module must be an nn.Module, a function"),
    ({"module": nn.Flatten()}, "weights to train"),
    ({"module": lambda columns, outputs: None}, "must return an nn.Module, got None"),
    ({"module": nn.Linear(3, 4)}, r"a logit a row for each of 2 classes.* \(28, 4\)"),
    ({"module": nn.Linear(5, 2)}, r"module must take rows of 3 numbers, .* got RuntimeError"),
    ({"module": nn.Conv2d(1, 2, 3)}, "or let it begin with nn.Unflatten"),
    ({"module": lambda columns: nn.Linear(columns, 2)}, r"takes \(n_features, n_outputs\), .* got"),
    ({"tune": ["features", "features"]}, "each kind once, got 'features' twice"),
    ({"tune": {"first.decay": "weight_decay"}}, "names without dots"),
    ({"search": 0}, "search must be an integer of at least 1"),
    ({"space": ift_tune.MetaSpace.default()}, "space goes with search"),
    ({"space": {"terms": 3}, "search": 2}, "space must be a MetaSpace"),
    ({"refit": 1}, "refit must be true or false"),
    ({"hidden_layer_sizes": 16}, r"a tuple such as \(64,\)"),
    ({"hidden_layer_sizes": (0,)}, "hidden_layer_sizes must be an integer of at least 1"),
    ({"config": {"tems": 3}}, "did you mean 'terms'"),
    ({"config": {"inner_lr": 0.1}}, "leave inner_lr to the parameter learning_rate"),
    ({"config": 3}, "config must be a mapping"),
    ({"validation_fraction": 1.0}, "validation_fraction must be below 1"),
    ({"validation_fraction": 0.99}, "must leave rows to train on"),
    ({"outer_steps": 0}, "outer_steps must be an integer"),
    ({"batch_size": 0}, "batch_size must be an integer"),
    ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0"),
    ({"verbose": "much"}, "verbose must be a number"),
    ({"run_dir": 3}, "run_dir must be a path"),
    ({"run_dir": __file__}, "run_dir must be a directory, but"),
    ({"device": "cuda:77"}, "cuda:77"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(k) for k in range(len(WRONG))])
def test_a_wrong_parameter_is_refused_by_fit(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"device": "cpu", "run_dir": tmp_path / "runs", **settings}
    estimator = IFTClassifier(**given)  # which only keeps them
    with pytest.raises(ValueError, match=message):
        estimator.fit(X, y)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (np.where(X > 2.0, np.nan, X), y, "NaN"),
        (X, np.zeros(40), "at least two classes"),
        (X, X[:, 0], "continuous|Unknown label type"),
        (X[:2], y[:2], "minimum of 3"),
        (X, np.arange(40) % 20, "each class must have at least 3 rows"),
        (X[:30], y, "inconsistent numbers of samples"),
        (np.array([["a", "b"]] * 40), y, "could not convert"),
    ],
)
def test_wrong_rows_are_refused(rows: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IFTClassifier(device="cpu").fit(rows, labels)


def test_sparse_rows_are_refused_with_the_mend() -> None:
    with pytest.raises(TypeError, match="toarray"):
        IFTClassifier(device="cpu").fit(sparse.csr_matrix(X), y)


def test_numbers_beyond_the_models_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"range of the model's torch.float32.*StandardScaler"):
        IFTClassifier(nn.Linear(3, 2), device="cpu").fit(X * 1e39, y)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (X, None, "X_val and y_val go together: give y_val"),
        (None, y, "X_val and y_val go together: give X_val"),
        (X, y + 1, "classes of y alone, got 2"),
        (X[:, :2], y, "2 features, but IFTClassifier is expecting 3"),
        (X[:1], y[:1], "minimum of 2"),
        (X[:2], [0, 1], "one to fit λ and one to choose steps by: give more rows"),
    ],
)
def test_wrong_validation_rows_are_refused(rows: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IFTClassifier(device="cpu").fit(X, y, rows, labels)


def test_validation_targets_have_the_form_of_the_targets() -> None:
    with pytest.raises(ValueError, match=r"form of y, \(N, 2\), got shape \(40,\)"):
        IFTRegressor(device="cpu").fit(X, X[:, :2], X, X[:, 0])


def test_class_weights_need_classes() -> None:
    with pytest.raises(ValueError, match="use IFTClassifier"):
        IFTRegressor(tune="class_weights", device="cpu").fit(X, X[:, 0])


@pytest.mark.parametrize("what", ["predict", "predict_proba", "audit_"])
def test_nothing_is_known_before_fit(what: str) -> None:
    with pytest.raises(NotFittedError):
        getattr(IFTClassifier(), what)(X) if what != "audit_" else IFTClassifier().audit_


def test_a_training_that_explodes_says_what_to_lower() -> None:
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3, 1), 10.0))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.exp(torch.exp(inputs @ self.weight))

    estimator = IFTRegressor(
        Exploding(), outer_steps=3, inner_steps=5, learning_rate=1.0, device="cpu", random_state=0
    )
    with pytest.raises(ift_tune.IFTTuneError, match=r"the training ended .* lower learning_rate"):
        estimator.fit(X, X[:, 0])


@pytest.mark.parametrize("estimator", [IFTClassifier, IFTRegressor])
def test_what_fit_does_not_take_is_named(estimator: Any) -> None:
    weights = np.linspace(0.5, 1.5, 40)
    with pytest.raises(ValueError, match="no sample_weight: repeat rows by their weights"):
        estimator().fit(X, y, sample_weight=weights)
    with pytest.raises(ValueError, match=r"did you mean 'X_val'.*got X_valid"):
        estimator().fit(X, y, X_valid=X)
    assert not has_fit_parameter(estimator(), "sample_weight")
    estimator(outer_steps=1, inner_steps=1, device="cpu").fit(X, y, sample_weight=None)


@pytest.mark.parametrize(
    ("outputs", "last", "warned"),
    [(2, nn.Softmax(dim=1), 1), (1, nn.Sigmoid(), 1), (2, nn.LogSoftmax(dim=1), 0)],
)
def test_a_module_that_returns_probabilities_is_said(
    outputs: int, last: nn.Module, warned: int
) -> None:
    module = nn.Sequential(nn.Linear(3, outputs), last)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        IFTClassifier(module, outer_steps=1, inner_steps=1, device="cpu").fit(X, y)
    told = [str(w.message) for w in caught if "module must return logits" in str(w.message)]
    assert len(told) == warned


def test_validation_rows_that_lack_a_class_are_said() -> None:
    small: dict[str, Any] = {"outer_steps": 1, "inner_steps": 1, "device": "cpu"}
    with pytest.warns(UserWarning, match="y_val has no row of class 0"):
        IFTClassifier(**small).fit(X, y, X[y == 1], y[y == 1])
    one = np.flatnonzero(y == 0)[:1]
    rows = np.concatenate([one, np.flatnonzero(y == 1)])
    with pytest.warns(UserWarning, match="of y_val fit λ, and no step is chosen by them"):
        IFTClassifier(**small).fit(X, y, X[rows], y[rows])
