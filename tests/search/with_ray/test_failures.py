"""Processes that are killed and code that fails: what is lost, and what is not."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from callback_probes import JOINT_HOOKS, Display, Probe, hooks_by_process
from ray import tune
from small_problems import BUDGET, CONFIG, kill_and_count, kill_once

from ift_tune.search.ray import ray_function, ray_trainable
from ift_tune.search.space import Float, MetaSpace
from with_ray.ray_problems import (
    assert_same_rows,
    fit,
    make_eventful_at,
    metrics_of,
    raise_once,
    rows_at,
    without_ray,
)

RATES = MetaSpace({"meta_lr": Float(1e-3, 0.3)})

# A killed process is a daily test of `run_ray`; this is what users' own trainables see of it.
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    probe = Probe(tmp_path_factory.mktemp("notes"))
    path = tmp_path_factory.mktemp("undisturbed")
    return without_ray(path, [0.05, 0.06, 0.07], callbacks=[probe])


class Killed(NamedTuple):
    path: Path
    deaths: int
    results: tune.ResultGrid


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """Three trials: one is killed once, in its third step, another whenever it gets so far."""
    path = tmp_path_factory.mktemp("killed")
    events = {
        0.06: functools.partial(kill_once, path / "marker"),
        0.07: functools.partial(kill_and_count, path / "deaths"),
    }
    factory = functools.partial(make_eventful_at, events=events)
    callbacks = [Probe(path / "notes"), Display()]
    kind = ray_trainable(factory, RATES, BUDGET, config=CONFIG, device="cpu", callbacks=callbacks)
    space = {"meta_lr": tune.grid_search([0.05, 0.06, 0.07])}
    results = fit(kind, path, space, run={"max_failures": 1})
    return Killed(path / "ray", len((path / "deaths").read_text()), results)


def test_a_killed_trial_goes_on_from_its_checkpoint_as_if_nothing_had_been(
    killed: Killed, undisturbed: Path
) -> None:
    (metrics,) = (m for m in metrics_of(killed.results) if m["config"]["meta_lr"] == 0.06)
    assert metrics["training_iteration"] == 4
    assert metrics["iterations_since_restore"] == 2
    assert_same_rows(killed.path, undisturbed, 0.06)


def test_a_trial_in_a_process_of_its_own_is_the_same_as_here(
    killed: Killed, undisturbed: Path
) -> None:
    assert_same_rows(killed.path, undisturbed, 0.05)


def test_a_trial_that_always_dies_is_given_up_after_its_retries(killed: Killed) -> None:
    assert killed.deaths == 2
    assert killed.results.num_errors == 1
    assert list(rows_at(killed.path, 0.07, "trials")["stop_reason"]) == ["failed"]
    rows = rows_at(killed.path, 0.07)
    assert list(rows["step"]) == [1, 2, 3]  # the second time it died while retraining
    assert set(rows["status"]) == {"failed"}


def test_a_function_gives_the_rows_of_the_class_also_after_a_failure(
    undisturbed: Path, tmp_path: Path
) -> None:
    events = {0.06: functools.partial(raise_once, tmp_path / "marker")}
    function = ray_function(
        functools.partial(make_eventful_at, events=events),
        RATES,
        BUDGET,
        config=CONFIG,
        device="cpu",
        checkpoint_every=2,
        callbacks=[Probe(tmp_path / "notes"), Display()],
    )
    space = {"meta_lr": tune.grid_search([0.05, 0.06])}
    results = fit(function, tmp_path, space, run={"checkpoint_every": None, "max_failures": 1})
    assert not results.errors
    assert (tmp_path / "marker").exists()
    assert_same_rows(tmp_path / "ray", undisturbed, 0.05, 0.06)
    for metrics in metrics_of(results):
        assert metrics["done"]
        failed = metrics["config"]["meta_lr"] == 0.06
        assert metrics["iterations_since_restore"] == (4 - 2 if failed else 4)
    found = hooks_by_process(tmp_path / "notes")
    assert os.getpid() not in found
    once = dict.fromkeys(JOINT_HOOKS, 8) | {"on_outer_step_begin": 9}  # one step raised
    assert dict(sum(found.values(), Counter())) == once
