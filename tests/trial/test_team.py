"""Trials that several processes share: real ones, by Gloo, with the tables of one process."""

from __future__ import annotations

import functools
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from processes import finish, ift_tune, rows_in, wait_for
from shared_problems import NUMBERS, make
from small_problems import comparable

from ift_tune import (
    Budget,
    Callback,
    ConjugateGradient,
    Float,
    MetaConfig,
    MetaSpace,
    Neumann,
    UsageError,
    load_results,
    run_single,
    run_study,
)
from ift_tune.base.errors import EnvironmentFaultError
from ift_tune.joint.joint import JointOptimizer
from ift_tune.trial import runner
from ift_tune.trial.team import require_processes

CONFIG = MetaConfig(inverse=Neumann(terms=3), inner_steps=4, inner_lr=0.02, meta_lr=0.05)
BUDGET = Budget(outer_steps=3)


def run(out: Path, processes: int, kind: str = "decay", **changes: Any) -> None:
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu", "budget": BUDGET, **changes}
    budget = settings.pop("budget")
    factory = functools.partial(make, kind=kind)
    run_single(factory, budget, out=out, processes_per_trial=processes, **settings)


def assert_close_tables(one: Path, other: Path, tolerance: float = 1e-10) -> None:
    """Compare both tables: numbers to rounding, everything else as it is."""
    for mine, theirs in zip(load_results(one), load_results(other), strict=True):
        drop = [c for c in ("run_id", "learned_words") if c in mine]
        pd.testing.assert_frame_equal(
            comparable(mine).drop(columns=drop),
            comparable(theirs).drop(columns=drop),
            rtol=tolerance,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    ("kind", "processes", "config"),
    [
        ("decay", 2, CONFIG),
        ("examples", 3, CONFIG.updated({"inner_optimizer": "sgd", "accumulate": 2})),
        pytest.param(
            "examples",
            2,
            MetaConfig(inverse=ConjugateGradient(max_steps=4), inner_steps=3),
            marks=pytest.mark.nightly,
        ),
        ("mixed", 2, CONFIG.updated({"curvature": "gauss_newton", "clip_norm": 1.0})),
        pytest.param("domains", 2, CONFIG, marks=pytest.mark.nightly),
        pytest.param("weighed", 2, CONFIG, marks=pytest.mark.nightly),
        pytest.param("padding", 2, CONFIG.updated({"warm_start": True}), marks=pytest.mark.nightly),
        ("decay", 3, CONFIG.updated({"reinit_every": 1, "inner_schedule": "cosine"})),
        ("examples", 2, CONFIG.updated({"reinit_below": 0.999, "accumulate": 2})),
        ("mixed", 2, CONFIG.updated({"signal_every": 1, "signal_parts": 3})),
        pytest.param("lone", 2, CONFIG, marks=pytest.mark.nightly),
    ],
)
def test_the_tables_are_those_of_one_process(
    tmp_path: Path, kind: str, processes: int, config: MetaConfig
) -> None:
    budget = Budget(outer_steps=3, eval_every=2)
    for out, number in (("one", 1), ("several", processes)):
        run(tmp_path / out, number, kind, config=config, budget=budget, baseline=kind == "decay")
    assert_close_tables(tmp_path / "one", tmp_path / "several")


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, first: int, then: int
) -> None:
    run(tmp_path / "whole", 1, budget=Budget(outer_steps=4))
    run(tmp_path / "parts", first, budget=Budget(outer_steps=2))
    run(tmp_path / "parts", then, budget=Budget(outer_steps=4), resume=True)
    assert_close_tables(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dropout", r"train_loss must be a mean.*Dropout '1' draws random numbers.*leave it out"),
        ("batchnorm", r"BatchNorm1d '1' normalises over the batch.*GroupNorm"),
        ("ranked", r"train_loss must be.*take means over examples"),
        ("summed", r"val_loss must be.*leave out processes_per_trial"),
    ],
)
def test_a_loss_that_is_no_mean_over_examples_is_refused_before_anything_is_written(
    tmp_path: Path, kind: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", 2, kind)
    assert not (tmp_path / "run").exists()


def test_a_coupling_that_shows_later_is_refused_then(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train_loss must be a mean over examples"):
        run(tmp_path / "run", 2, "late", budget=Budget(outer_steps=30))
    assert 1 <= len(load_results(tmp_path / "run").steps) < 30


def test_the_first_error_ends_all_processes(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="a mistake in the second share"):
        run(tmp_path / "run", 2, "fails", budget=Budget(outer_steps=100))
    assert time.monotonic() - started < 60.0
    assert load_results(tmp_path / "run").trials["stop_reason"].tolist() == ["failed"]


def test_a_process_that_dies_interrupts_the_run_which_goes_on_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    budget = Budget(outer_steps=5)
    with pytest.raises(EnvironmentFaultError, match=r"process 2 of the 2.*--resume.*status -9"):
        run(tmp_path / "run", 2, "dies", budget=budget)
    assert 1 <= len(load_results(tmp_path / "run").steps) < 5
    run(tmp_path / "run", 1, "dies", budget=budget, resume=True)
    run(tmp_path / "whole", 1, budget=budget)
    found, wanted = (load_results(tmp_path / out).steps for out in ("run", "whole"))
    np.testing.assert_allclose(found["search_loss"], wanted["search_loss"], rtol=1e-10)


class Meddling(Callback):
    """Moves λ where nobody else does."""

    def on_hypergradient(self, joint: JointOptimizer, result: Any) -> None:
        with torch.no_grad():
            joint.problem.hypers()[0].add_(1e-12)


class Greedy(Callback):
    """Takes hypergradients of its own."""

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        joint.hypergradient()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Meddling(), r"must have the same λ.*leave weights and λ as they are in callbacks"),
        (Greedy(), r"a callback of a trial in several processes must leave.*hypergradient"),
    ],
)
def test_what_would_part_the_processes_is_refused(
    tmp_path: Path, callback: Callback, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", 2, callbacks=[callback])


def unlike(config: MetaConfig, device: torch.device, seed: int) -> Any:
    """Return other data in each process."""
    problem = make(config, device, seed)
    problem.splits.train.tensors[0].add_(time.monotonic())  # type: ignore[attr-defined]
    return problem


def test_processes_that_build_other_data_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must have the same train data: make a problem from"):
        run_single(unlike, BUDGET, out=tmp_path / "run", device="cpu", processes_per_trial=2)


def test_a_factory_that_cannot_travel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="to which this trial cannot travel"):
        run_single(
            lambda *given: make(*given), BUDGET, out=tmp_path, device="cpu", processes_per_trial=2
        )


def test_processes_are_a_number_and_have_a_gpu_each() -> None:
    with pytest.raises(UsageError, match="processes_per_trial must be an integer of at least 1"):
        require_processes(0)
    with pytest.raises(UsageError, match=r"a GPU of its own, from cuda:1 on.*2 processes and"):
        require_processes(2, torch.device("cuda", max(1, torch.cuda.device_count() - 1)))


def test_a_study_of_shared_trials_has_the_tables_of_one_process(tmp_path: Path) -> None:
    space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
    for out, processes in (("one", 1), ("two", 2)):
        run_study(
            make,
            space,
            Budget(outer_steps=2),
            n_trials=2,
            out=tmp_path / out,
            config=CONFIG,
            device="cpu",
            pruner="median",
            processes_per_trial=processes,
        )
    assert_close_tables(tmp_path / "one", tmp_path / "two")


@pytest.mark.nightly
def test_workers_whose_trials_are_shared_on_the_command_line(tmp_path: Path) -> None:
    command = ["search", "shared_problems:make", "--n-trials", "2", "--outer-steps", "1"]
    command += ["--vary", "meta_lr=0.01:0.1", "--device", "cpu", "--no-baseline", "--quiet"]
    command += ["--set", "inner_steps=2", "--workers", "2", "--processes-per-trial", "2"]
    assert finish(*command, "--out", str(tmp_path / "run")) == 0
    assert load_results(tmp_path / "run").trials["status"].tolist() == ["complete"] * 2


@pytest.mark.nightly
def test_ctrl_c_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    command = ["run", "shared_problems:make", "--outer-steps", "40", "--device", "cpu"]
    command += [
        "--set",
        "inner_steps=2",
        "--no-baseline",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--processes-per-trial", "2"]
    folder = tmp_path / "run" / "trial-00000"
    with ift_tune(*command) as running:
        ended = running.hit(signal.SIGINT, lambda: rows_in(folder) > 2)
    assert ended.status == 130, ended
    assert load_results(tmp_path / "run").trials["stop_reason"].tolist() == ["interrupted"]
    assert finish(*command, "--resume") == 0
    assert load_results(tmp_path / "run").steps["step"].tolist() == list(range(1, 41))


@pytest.mark.nightly
def test_who_follows_ends_with_its_leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NUMBERS, str(tmp_path / "numbers"))
    command = ["run", "shared_problems:make", "--outer-steps", "100000", "--device", "cpu"]
    command += ["--quiet", "--out", str(tmp_path / "run"), "--processes-per-trial", "2"]
    with ift_tune(*command) as running:
        leader = running.pid
        running.hit(signal.SIGKILL, lambda: rows_in(tmp_path / "run" / "trial-00000") > 2)
    (follower,) = {int(n) for n in (tmp_path / "numbers").read_text().split()} - {leader}
    wait_for(lambda: not Path("/proc", str(follower)).exists(), "it goes on alone")


def test_ray_refuses_shared_trials_with_the_mend(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    command = ["search", "shared_problems:make", "--backend", "ray", "--out", str(tmp_path / "run")]
    assert finish(*command, "--processes-per-trial", "2") != 0
    assert not (tmp_path / "run").exists()
