"""What is learned: the numbers of the run beneath, and what was planted in the data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler
from torch import nn

import ift_tune
from ift_tune import Batches, Budget, MetaConfig, Splits, WeightDecay
from ift_tune.sklearn import IFTClassifier, IFTRegressor


def rows(number: int, columns: int, seed: int) -> tuple[Any, Any]:
    """Return rows of three classes, told apart by the first two columns."""
    random = np.random.RandomState(seed)
    X = 3.0 * random.randn(number, columns) + 10.0
    return X, np.digitize(X[:, 0] - X[:, 1], [-3.0, 3.0])


def test_the_estimator_adds_nothing_to_the_run_beneath_it(tmp_path: Path) -> None:
    X, y = rows(90, 4, 0)
    seed = int(np.random.RandomState(7).randint(2**31 - 1))
    estimator = IFTClassifier(
        tune="weight_decay",
        hidden_layer_sizes=(5,),
        outer_steps=6,
        inner_steps=4,
        learning_rate=1e-2,
        batch_size=16,
        random_state=7,
        device="cpu",
    ).fit(X, y)

    inputs = torch.tensor(StandardScaler().fit_transform(X), dtype=torch.float32)
    targets = torch.tensor(y)

    def problem(config: MetaConfig, device: Any, seed: int) -> ift_tune.ClassificationProblem:
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        train, val, search = (
            (inputs[place], targets[place])
            for place in (estimator.split_[name] for name in ("train", "val", "search"))
        )
        ordered = Batches(*search, shuffle=False)
        splits = Splits(
            train=Batches(*train, batch_size=16, seed=seed),
            val=Batches(*val, batch_size=16, seed=seed + 1),
            search=ordered,
            test=ordered,
        )
        decay = WeightDecay(model, "tensor", init=1e-2, transform="exp", exclude="bias")
        return ift_tune.ClassificationProblem(model, decay, splits)

    outcome = ift_tune.run_single(
        problem,
        Budget(outer_steps=6, retrain=False),
        out=tmp_path / "run",
        config=MetaConfig(inner_steps=4, inner_lr=1e-2, meta_lr=0.1),
        seed=seed,
        device="cpu",
        metric="search_loss",
    )
    best = ift_tune.load_best(tmp_path / "run", problem, device="cpu")
    assert estimator.trials_["best_value"].item() == outcome.value
    assert isinstance(best.hyper, WeightDecay)
    expected = {name: value.numpy() for name, value in best.hyper.learned().items()}
    found = {name.removeprefix("weight_decay."): v for name, v in estimator.hyper_.items()}
    assert found == expected
    assert len(set(map(float, found.values())) | {1e-2}) == 3  # they have moved, each by itself
    final = ift_tune.refit(tmp_path / "run", problem, "train+val", device="cpu")
    probabilities = torch.softmax(final.model.double()(inputs.double()), dim=1)
    assert np.allclose(estimator.predict_proba(X), probabilities.detach(), rtol=1e-5)


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_columns_that_say_nothing_have_larger_decays(hidden: tuple[int, ...]) -> None:
    """Judged by many validation rows: few of them would have their own opinion of each column."""
    random = np.random.RandomState(1)
    X = pd.DataFrame(random.randn(360, 10), columns=[f"column_{k}" for k in range(10)])
    y = 40.0 + 5.0 * (X["column_2"] - 2.0 * X["column_5"] + X["column_7"])
    y += 3.5 * random.randn(len(y))
    estimator = IFTRegressor(
        tune="features",
        hidden_layer_sizes=hidden,
        outer_steps=40,
        inner_steps=20,
        learning_rate=1e-2,
        refit=False,
        random_state=0,
        device="cpu",
    ).fit(X[:60], y[:60], X[60:], y[60:])
    decays = pd.Series(estimator.hyper_["features"], index=estimator.feature_names_in_)
    telling = decays.index.isin(["column_2", "column_5", "column_7"])
    logs = np.log(decays)
    assert logs[~telling].mean() > logs[telling].mean() + np.log(3.0)
    assert decays[telling].min() < 0.2 * decays[~telling].min()


def test_wrong_labels_have_small_weights_and_come_first_in_the_audit() -> None:
    X, y = load_digits(return_X_y=True)
    X, random = X / 16.0, np.random.RandomState(3)
    names = np.array(
        [["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]
    )[0]
    order = random.permutation(len(X))
    train, val = order[:300], order[300:450]
    wrong = random.rand(len(train)) < 0.3
    given = np.where(wrong, (y[train] + random.randint(1, 10, len(train))) % 10, y[train])
    estimator = IFTClassifier(
        tune="example_weights",
        hidden_layer_sizes=(),
        outer_steps=25,
        inner_steps=20,
        learning_rate=1e-2,
        random_state=0,
        device="cpu",
    ).fit(X[train], names[given], X[val], names[y[val]])
    weights = estimator.hyper_["example_weights"]
    assert weights.shape == (len(train),)
    assert roc_auc_score(wrong, -weights) > 0.85
    audit = estimator.audit_
    assert sorted(audit["row"]) == list(range(len(train)))
    assert wrong[audit["row"].head(40)].mean() > 0.85
    assert (audit["given_label"] == names[given[audit["row"]]]).all()
    right = audit["suggested_label"] == names[y[train][audit["row"]]]
    assert right.mean() > 0.8
    assert estimator.audit_ is audit  # once


def test_the_audit_says_which_rows_of_all_it_is_of() -> None:
    X, y = rows(80, 3, 5)
    estimator = IFTRegressor(
        tune="example_weights", hidden_layer_sizes=(), outer_steps=3, random_state=0, device="cpu"
    ).fit(X, 100.0 + y)
    audit = estimator.audit_.sort_values("index")
    assert audit["row"].tolist() == estimator.split_["train"].tolist()
    assert np.allclose(audit["given_label"], 100.0 + y[audit["row"]], atol=1e-3)


def test_rare_classes_weigh_more_where_validation_rows_are_balanced() -> None:
    random = np.random.RandomState(0)
    y = np.repeat(["common", "rare"], [400, 20])
    X = random.randn(420, 2) + np.where(y == "rare", 1.0, 0.0)[:, None]
    y_val = np.repeat(["common", "rare"], 100)
    X_val = random.randn(200, 2) + np.where(y_val == "rare", 1.0, 0.0)[:, None]
    settings: dict[str, Any] = {"hidden_layer_sizes": (), "outer_steps": 40, "learning_rate": 3e-2}
    settings |= {"random_state": 0, "device": "cpu"}
    weighed = IFTClassifier(tune="class_weights", **settings).fit(X, y, X_val, y_val)
    common, rare = weighed.hyper_["class_weights"]
    assert rare > 5.0 * common
    plain = IFTClassifier(tune="weight_decay", **settings).fit(X, y)
    assert weighed.score(X_val, y_val) > plain.score(X_val, y_val) + 0.1


def test_a_search_begins_with_the_settings_given_and_keeps_the_best() -> None:
    X, y = rows(90, 4, 2)
    settings: dict[str, Any] = {
        "hidden_layer_sizes": (4,),
        "outer_steps": 3,
        "inner_steps": 7,
        "refit": False,
        "learning_rate": 0.02,
        "random_state": 0,
        "device": "cpu",
    }
    alone = IFTClassifier(**settings).fit(X, y)
    searched = IFTClassifier(search=3, **settings).fit(X, y)
    trials = searched.trials_.set_index("trial")
    first = trials[["inner_lr", "inner_steps", "meta_lr"]].iloc[0]
    assert first.tolist() == [0.02, 7, 0.1]
    assert len(trials) == 3
    assert len(set(trials["inner_lr"])) == 3
    assert set(searched.steps_["trial"]) == {0, 1, 2}
    found = -searched_loss(searched, X, y)
    assert found == pytest.approx(trials["best_value"].min(), rel=1e-4)
    assert trials["best_value"].min() <= alone.trials_["best_value"].item() + 1e-9


def searched_loss(estimator: Any, X: Any, y: Any) -> float:
    """Return the mean log-likelihood of the rows by which the best trial was chosen."""
    place = estimator.split_["search"]
    probabilities = estimator.predict_proba(X[place])
    return float(np.log(probabilities[np.arange(len(place)), y[place]]).mean())


def test_an_audit_of_several_targets_ranks_rows_and_suggests_no_one_label() -> None:
    random = np.random.RandomState(3)
    rows = random.randn(80, 3)
    targets = rows @ random.randn(3, 2)
    targets[:6] *= -1.0
    model = IFTRegressor(
        tune="example_weights",
        hidden_layer_sizes=(),
        outer_steps=15,
        learning_rate=3e-2,
        random_state=0,
        device="cpu",
    )
    table = model.fit(rows[:60], targets[:60], rows[60:], targets[60:]).audit_
    assert set(table["row"][:6]) == set(range(6))
    assert table[["given_label", "suggested_label"]].isna().all(axis=None)


def test_a_fit_that_learns_no_hyperparameter_says_so() -> None:
    random = np.random.RandomState(1)
    rows = random.randn(40, 1500)  # which are told apart by any of many weights
    classes = (rows[:, 0] > 0.0).astype(int)
    settings: dict[str, Any] = {
        "hidden_layer_sizes": (),
        "outer_steps": 8,
        "learning_rate": 3e-2,
        "random_state": 0,
        "device": "cpu",
    }
    with pytest.warns(ConvergenceWarning, match=r"no hyperparameter was learned.*memorised"):
        IFTClassifier(tune="example_weights", **settings).fit(rows, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IFTClassifier(tune="example_weights", **settings).fit(rows[:, :3], classes)
