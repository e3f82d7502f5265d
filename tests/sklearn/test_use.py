"""In scikit-learn's company: pipelines, searches, copies, other processes, and the file system."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import nn

import ift_tune
from ift_tune import Choice, Float, MetaSpace
from ift_tune.sklearn import IFTClassifier, IFTRegressor, base

SHORT: dict[str, Any] = {
    "hidden_layer_sizes": (6,),
    "outer_steps": 4,
    "inner_steps": 20,
    "learning_rate": 3e-2,
    "random_state": 0,
    "device": "cpu",
}
X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]


@pytest.mark.nightly
def test_folds_in_processes_give_what_one_process_gives() -> None:
    pipeline = make_pipeline(StandardScaler(), IFTClassifier(**SHORT))
    alone = cross_val_score(pipeline, X, NAMES, cv=3)
    side_by_side = cross_val_score(pipeline, X, NAMES, cv=3, n_jobs=2)
    assert alone.tolist() == side_by_side.tolist()
    assert alone.min() > 0.7


def test_a_grid_search_chooses_what_is_tuned() -> None:
    grid = {"tune": ["weight_decay", "features"], "hidden_layer_sizes": [(), (4,)]}
    search = GridSearchCV(IFTClassifier(**SHORT), grid, cv=2).fit(X, NAMES)
    assert len(search.cv_results_["params"]) == 4
    assert search.best_params_.items() <= search.best_estimator_.get_params().items()
    assert search.predict(X[:2]).tolist() == search.best_estimator_.predict(X[:2]).tolist()


def test_mixed_columns_of_a_frame_go_through_a_transformer_of_the_users_own() -> None:
    frame = pd.DataFrame({"length": X[:, 2], "colour": np.where(X[:, 3] > 1.0, "blue", "white")})
    columns = make_column_transformer(
        (OneHotEncoder(sparse_output=False), ["colour"]), (StandardScaler(), ["length"])
    ).set_output(transform="pandas")
    model = make_pipeline(columns, IFTClassifier(tune="features", **SHORT)).fit(frame, NAMES)
    names = model[-1].feature_names_in_
    assert len(model[-1].hyper_["features"]) == len(names) == 3
    assert model.score(frame, NAMES) > 0.6


def test_the_same_random_state_gives_the_same_and_another_another() -> None:
    before: Any = np.random.get_state()
    state = torch.get_rng_state()
    first, second = (IFTClassifier(**SHORT).fit(X, NAMES) for _ in range(2))
    assert (first.predict_proba(X) == second.predict_proba(X)).all()
    assert dict(first.hyper_) == dict(second.hyper_)
    other = IFTClassifier(**{**SHORT, "random_state": 1}).fit(X, NAMES)
    assert (first.predict_proba(X) != other.predict_proba(X)).any()
    after: Any = np.random.get_state()
    assert torch.equal(torch.get_rng_state(), state)
    assert (after[1] == before[1]).all()


@pytest.mark.nightly
def test_a_fitted_one_predicts_in_another_process(tmp_path: Path) -> None:
    model = IFTClassifier(tune="example_weights", **SHORT).fit(X, NAMES)
    joblib.dump(model, tmp_path / "model.joblib")
    code = (
        "import sys, joblib, numpy; model = joblib.load(sys.argv[1]); "
        "print(model.predict(numpy.array([[6.0, 3.0, 5.0, 2.0]]))[0], len(model.hyper_), "
        "len(model.audit_))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.joblib")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = model.predict([[6.0, 3.0, 5.0, 2.0]])[0]
    assert found.stdout.split() == [expected, "1", str(len(model.split_["train"]))]
    assert found.stderr == ""


def test_an_audit_can_be_asked_of_copies_and_pickles() -> None:
    model = IFTClassifier(tune="example_weights", **SHORT).fit(X, NAMES)
    pickled = pickle.dumps(model)
    twice = pickle.dumps(pickle.loads(pickled))
    others = [copy.copy(model), copy.deepcopy(model), pickle.loads(pickled), pickle.loads(twice)]
    table = model.audit_
    for other in others:
        pd.testing.assert_frame_equal(other.audit_, table)
    asked = pickle.dumps(model)
    assert len(asked) < len(pickled)  # the rows are no longer in it
    pd.testing.assert_frame_equal(pickle.loads(asked).audit_, table)


def test_an_audit_of_many_rows_stays_where_it_was_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_MOST_AWAITED", 2**20)
    model = IFTClassifier(tune="example_weights", **SHORT)
    model.fit(np.repeat(X, 300, axis=1), NAMES)
    copied = pickle.loads(pickle.dumps(model))
    with pytest.raises(AttributeError, match=r"ask the fitted one for it before, got . MB"):
        _ = copied.audit_
    assert len(model.audit_) == len(model.split_["train"])
    assert len(copied.fit(X, NAMES).audit_) == len(copied.split_["train"])


def test_an_audit_needs_a_weight_for_each_row() -> None:
    with pytest.raises(AttributeError, match=r"tune='example_weights'.* got tune='features'"):
        _ = IFTClassifier(tune="features", **SHORT).fit(X, NAMES).audit_


def test_nothing_is_printed_or_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    model = IFTClassifier(search=2, **SHORT).fit(X, NAMES)
    assert model.run_dir_ is None
    assert not list(temporary.iterdir())
    weighed = IFTClassifier(tune="example_weights", **SHORT).fit(X, NAMES)
    assert len(list(temporary.iterdir())) == 1  # until it is known whether an audit is wanted
    weighed.fit(X, NAMES)
    assert len(list(temporary.iterdir())) == 1
    del weighed
    gc.collect()
    assert not list(temporary.iterdir())
    with pytest.raises(ValueError, match="3 classes"):
        IFTClassifier(nn.Linear(4, 2), **SHORT).fit(X, NAMES)
    assert not list(temporary.iterdir())
    assert not list(work.iterdir())
    assert capfd.readouterr() == ("", "")


def test_verbose_prints_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    IFTClassifier(**SHORT, refit=False, verbose=1).fit(X, NAMES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("[ift_tune] trial 0, step 1: train ")
    assert "ended done" in lines[-1]


def test_a_directory_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced.append)
        IFTClassifier(**SHORT).fit(X, NAMES)
        assert not synced  # nobody will want a temporary folder after a power cut
        model = IFTClassifier(**SHORT, run_dir=tmp_path / "runs").fit(X, NAMES)
    assert synced
    assert model.run_dir_ == tmp_path / "runs" / "fit-0"
    trials, _ = ift_tune.load_results(model.run_dir_)
    assert trials["search_loss"].tolist() == model.trials_["search_loss"].tolist()


@pytest.mark.nightly
def test_fits_in_other_processes_have_folders_of_their_own(tmp_path: Path) -> None:
    model = IFTClassifier(**SHORT, run_dir=tmp_path / "runs")
    scores = cross_val_score(model, X, NAMES, cv=2, n_jobs=2)
    assert len(scores) == 2
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["fit-0", "fit-1"]


def test_a_clone_and_new_parameters_begin_anew() -> None:
    model = IFTRegressor(**SHORT).fit(X[:, :3], X[:, 3])
    twin = clone(model).set_params(outer_steps=2, tune="features")
    assert not hasattr(twin, "hyper_")
    assert twin.fit(X[:, :3], X[:, 3]).hyper_["features"].shape == (3,)
    assert len(twin.steps_) == 2
    assert len(model.steps_) == 4


def test_several_targets_are_predicted_at_once() -> None:
    targets = np.column_stack([100.0 + 10.0 * X[:, 3], -X[:, 2]])
    model = IFTRegressor(**{**SHORT, "outer_steps": 15}).fit(X[:, :2], targets)
    assert model.predict(X[:5, :2]).shape == (5, 2)
    assert model.score(X[:, :2], targets) > 0.5


def test_columns_far_from_zero_are_seen_as_they_are() -> None:
    """In float32 these columns would be constants."""
    far = 1e9 + X
    model = IFTClassifier(**SHORT)
    near = model.fit(X, NAMES).predict_proba(X)
    assert np.allclose(model.fit(far, NAMES).predict_proba(far), near, atol=1e-3)


@pytest.mark.parametrize("kind", [IFTClassifier, IFTRegressor])
def test_a_fit_that_fails_leaves_the_estimator_as_it_was(kind: Any) -> None:
    targets = NAMES if kind is IFTClassifier else X[:, 0]
    model = kind(tune="example_weights", **SHORT)
    with pytest.raises(ValueError, match="outer_steps"):
        kind(**{**SHORT, "outer_steps": -1}).fit(X, targets).predict(X)
    before = model.fit(X, targets).predict(X)
    model.set_params(outer_steps=-1)
    with pytest.raises(ValueError, match="outer_steps"):
        model.fit(100.0 * X[:, ::-1], np.roll(targets, 1))
    assert model.predict(X).tolist() == before.tolist()
    assert len(model.audit_) == len(model.split_["train"])


def test_before_a_fit_that_succeeds_nothing_is_fitted() -> None:
    model = IFTClassifier(**{**SHORT, "outer_steps": -1})
    with pytest.raises(ValueError, match="outer_steps"):
        model.fit(X, NAMES)
    with pytest.raises(NotFittedError):
        model.predict(X)


@pytest.mark.parametrize(
    ("space", "given", "first"),
    [
        (None, {"inner_steps": 2, "meta_lr": 1.0}, {"inner_steps": 2, "meta_lr": 1.0}),
        (None, {"config": {"terms": 30}}, {"terms": 30}),
        (
            {"inner_steps": Choice((10, 30)), "meta_lr": Float(0.01, 0.2)},
            {"inner_steps": 20, "meta_lr": 0.05},
            {"meta_lr": 0.05},
        ),
        ({"inverse": Choice(("identity", "conjugate_gradient"))}, {}, {}),
    ],
)
def test_a_search_begins_with_what_its_space_holds_of_the_settings(
    space: Any, given: dict[str, Any], first: dict[str, Any]
) -> None:
    chosen = None if space is None else MetaSpace(space)
    model = IFTClassifier(search=1, space=chosen, **{**SHORT, "outer_steps": 1, **given})
    trial = model.fit(X, NAMES).trials_.iloc[0]
    assert {name: trial[name] for name in first} == first
    for name, each in (space or {}).items():
        assert not isinstance(each, Choice) or trial[name] in each.options
