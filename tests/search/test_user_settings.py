"""Settings of the user's own: from spaces and the command line to the factory and the tables."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ift_tune import (
    Batches,
    Budget,
    Choice,
    ClassificationProblem,
    Float,
    Int,
    MetaConfig,
    MetaSpace,
    Splits,
    UsageError,
    WeightDecay,
    load_results,
    run_study,
)
from ift_tune.cli.options import find_job
from ift_tune.trial.session import run_single

pytest.importorskip("optuna")


def make_problem(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    torch.manual_seed(seed)
    width = config.user["width"]
    assert isinstance(width, int)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))
    rows = Batches(torch.randn(20, 3), torch.randint(2, (20,)))
    problem = ClassificationProblem(model, WeightDecay(model, "tensor"), Splits(*[rows] * 4))
    problem.summary = lambda: {  # type: ignore[method-assign]
        "weights": float(sum(p.numel() for p in model.parameters()))
    }
    return problem


SPACE = MetaSpace(
    {
        "user.width": Int(2, 9),
        "user.act": Choice(("tanh", "relu")),
        "user.p": Float(0.1, 0.5),
        "terms": Int(0, 3),
    }
)


def test_they_reach_the_factory_and_the_tables(tmp_path: Path) -> None:
    budget = Budget(outer_steps=1, retrain=False)
    found = run_study(make_problem, SPACE, budget, n_trials=5, out=tmp_path / "run", device="cpu")
    for trials in (found.trials, load_results(tmp_path / "run").trials):
        width = trials["user.width"].astype(int)
        assert set(trials["user.act"]) <= {"tanh", "relu"}
        assert trials["user.p"].between(0.1, 0.5).all()
        # What was built is what was drawn: 3·w + w + 2·w + 2 weights.
        assert trials["learned_weights"].tolist() == (6 * width + 2).tolist()
        assert width.nunique() > 1
    assert {"user.width", "user.act", "user.p", "terms"} == set(found.study.best_params)


def test_a_single_run_has_them_as_columns(tmp_path: Path) -> None:
    config = MetaConfig(user={"width": 4}, inner_steps=2)
    budget = Budget(outer_steps=2, retrain=False)
    run_single(make_problem, budget, out=tmp_path / "run", config=config, device="cpu")
    assert load_results(tmp_path / "run").steps["user.width"].tolist() == [4, 4]


def test_the_plain_training_beside_a_run_tells_them_too(tmp_path: Path) -> None:
    config = MetaConfig(user={"width": 4})
    run_single(
        *(make_problem, Budget(outer_steps=2, retrain=False)),
        out=tmp_path / "run",
        config=config,
        device="cpu",
        baseline=True,
    )
    facts = json.loads((tmp_path / "run" / "baseline" / "trial.json").read_text())
    assert facts["user.width"] == 4
    assert facts["meta_lr"] is None


def test_flat_and_back() -> None:
    config = MetaConfig().updated({"user.width": 64, "user.name": "a", "terms": 2})
    assert config.user == {"width": 64, "name": "a"}
    flat = config.to_flat()
    assert (flat["user.width"], flat["user.name"]) == (64, "a")
    assert MetaConfig.from_flat(flat) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(MetaConfig.from_flat(flat))
    assert config != config.updated({"user.width": 65})
    assert config.updated({"inner_steps": 3}).user == config.user


def test_what_is_given_stays_the_callers() -> None:
    mine: dict[str, Any] = {"width": 1}
    config = MetaConfig(user=mine)
    mine["width"] = 2
    assert config.user == {"width": 1}


def test_the_command_line_reads_them() -> None:
    space = MetaSpace.parse({"user.width": "16:128:log", "user.p": "0.1:0.5", "user.act": "a,b"})
    assert dict(space.distributions) == {
        "user.width": Int(16, 128, log=True),
        "user.p": Float(0.1, 0.5),
        "user.act": Choice(("a", "b")),
    }
    job = find_job("digits-weight-decay", ["user.width=64"], None, False, False, None)
    assert job.config.user == {"width": 64}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"a b": 1}, "named like a variable, got 'a b'"),
        ({1: 1}, "named like a variable"),
        ({"width": [1]}, "must be a number, a word"),
        ({"width": None}, "must be a number, a word"),
        ([1], "settings by name"),
    ],
)
def test_what_is_no_setting_is_refused(user: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MetaConfig(user=user)


@pytest.mark.parametrize("key", ["width", "user.", "user.a-b", "users.width"])
def test_a_key_that_is_neither_is_refused_with_the_mend(key: str) -> None:
    with pytest.raises(UsageError, match=r"keys of your own are written user\.NAME"):
        MetaSpace({key: Int(1, 2)})
