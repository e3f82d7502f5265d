"""A user's callbacks in Ray's processes: the hooks of the optimisation there, the others here."""

from __future__ import annotations

import os
from pathlib import Path

from callback_probes import JOINT_HOOKS, Display, Probe, check_hooks, hooks_by_process
from ray import tune
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import Budget, load_results
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.run import run_comparison
from ift_tune.search.ray import ray_function, ray_trainable, recommended_run_config, run_ray


def test_a_search_with_ray_calls_each_hook_once_where_it_belongs(tmp_path: Path) -> None:
    probe, display = Probe(tmp_path / "notes"), Display()
    result = run_ray(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=3,
        out=tmp_path / "run",
        config=CONFIG,
        device="cpu",
        callbacks=[probe, display],
    )
    check_hooks(tmp_path / "notes", result.steps, apart=True, resources=1)
    assert display.rows == 12


def test_a_comparison_on_ray_too(tmp_path: Path) -> None:
    probe, display = Probe(tmp_path / "notes"), Display()
    comparison = Comparison(
        make_tiny,
        Budget(gradient_equivalents=60.0),
        config=CONFIG,
        trial_budget=Budget(outer_steps=2),
        training_steps=10,
        device="cpu",
    )
    steps = run_comparison(
        comparison,
        out=tmp_path / "run",
        arms=["ift", "random"],
        seeds=2,
        backend="ray",
        callbacks=[probe, display],
    ).steps
    outer_steps = int((steps["arm"] == "ift").sum())
    check_hooks(tmp_path / "notes", steps, apart=True, resources=1, joint_steps=outer_steps)
    assert display.rows == len(steps)


def test_a_tuner_of_ones_own_has_those_of_the_optimisation(tmp_path: Path) -> None:
    for name, make in (("class", ray_trainable), ("function", ray_function)):
        notes = tmp_path / name / "notes"
        trainable = make(
            make_tiny,
            SPACE,
            Budget(outer_steps=2),
            config=CONFIG,
            device="cpu",
            callbacks=[Probe(notes), Display()],
        )
        every = 1 if name == "class" else None
        tune.Tuner(
            trainable,
            param_space=SPACE.to_ray(),
            run_config=recommended_run_config(tmp_path / name, checkpoint_every=every, verbose=0),
        ).fit()
        found = hooks_by_process(notes)
        assert os.getpid() not in found
        assert [dict(hooks) for hooks in found.values()] == [dict.fromkeys(JOINT_HOOKS, 2)]
        steps = load_results(tmp_path / name / "ray").steps
        assert list(steps["ten_steps"]) == [10.0, 20.0]
