"""A user's callbacks reach every trial: which hooks run in which process, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from callback_probes import Display, Probe, check_hooks
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import Budget, Callback, IFTObjective, Trial, UsageError, load_results, testing
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import Outcome
from ift_tune.compare.comparison import Comparison
from ift_tune.compare.run import run_comparison
from ift_tune.joint.callbacks import CallbackList, RunFacts, during, joint_callbacks
from ift_tune.joint.joint import JointOptimizer
from ift_tune.search.study import run_study
from ift_tune.trial.session import run_single

TINY_COMPARISON = Comparison(
    make_tiny,
    Budget(gradient_equivalents=60.0),
    config=CONFIG,
    trial_budget=Budget(outer_steps=2),
    training_steps=10,
    device="cpu",
)


def test_in_a_single_run_all_hooks_run_here(tmp_path: Path) -> None:
    probe, display = Probe(tmp_path / "notes"), Display()
    out = tmp_path / "run"
    run_single(make_tiny, BUDGET, out=out, config=CONFIG, device="cpu", callbacks=[probe, display])
    check_hooks(tmp_path / "notes", load_results(out).steps, apart=False, resources=0)
    assert display.rows == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_study_the_hooks_of_the_optimisation_run_beside_the_trials(
    workers: int, tmp_path: Path
) -> None:
    probe, display, told = Probe(tmp_path / "notes"), Display(), []
    result = run_study(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=3,
        out=tmp_path / "run",
        config=CONFIG,
        device="cpu",
        workers=workers,
        callbacks=[probe, lambda _, trial: told.append(trial.number), display],
    )
    apart = workers > 1
    check_hooks(tmp_path / "notes", result.steps, apart=apart, resources=int(apart))
    assert (sorted(told), display.rows) == ([0, 1, 2], 12)


@pytest.mark.parametrize("workers", [1, 2])
def test_in_a_comparison_too(workers: int, tmp_path: Path) -> None:
    probe, display = Probe(tmp_path / "notes"), Display()
    arms = ["ift", "random"]
    results = run_comparison(
        TINY_COMPARISON,
        out=tmp_path / "run",
        arms=arms,
        seeds=2,
        workers=workers,
        callbacks=[probe, display],
    )
    outer_steps = int((results.steps["arm"] == "ift").sum())
    assert 0 < outer_steps < len(results.steps)
    apart = workers > 1
    check_hooks(
        tmp_path / "notes",
        results.steps,
        apart=apart,
        resources=int(apart),
        joint_steps=outer_steps,
    )
    assert display.rows == len(results.steps)


class Averages(Callback):
    """Keeps an average in the model."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        with torch.no_grad():
            next(joint.problem.model.parameters()).mul_(1.0)


class Looks(Callback):
    """Only looks on."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        metrics["sum"] = float(next(joint.problem.model.parameters()).detach().sum())


@pytest.mark.parametrize("trials", [0, 2])
def test_a_callback_that_changes_the_model_is_warned_of_once(
    trials: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callbacks = [Averages(), Looks()]
    if trials:
        run_study(
            *(make_tiny, SPACE, BUDGET),
            n_trials=trials,
            out=tmp_path,
            config=CONFIG,
            callbacks=callbacks,
        )
    else:
        run_single(make_tiny, BUDGET, out=tmp_path, config=CONFIG, callbacks=callbacks)
    said = [r.getMessage() for r in caplog.records if "changes the model" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("Averages.on_outer_step_end changes the model")


def test_in_a_loop_of_ones_own_it_is_said_once_too(caplog: pytest.LogCaptureFixture) -> None:
    joint = JointOptimizer(testing.Quadratic(), CONFIG, callbacks=[Averages()])
    for _ in range(3):
        joint.step()
    assert caplog.text.count("changes the model") == 1


def test_a_run_that_has_begun_is_ended_whatever_happens(tmp_path: Path) -> None:
    told: list[str] = []

    class Told(Callback):
        def on_run_begin(self, run: RunFacts) -> None:
            told.append(f"begin {run.task} {run.finished} of {run.total} {run.varied}")

        def on_run_end(self) -> None:
            told.append("end")

    class Breaks(Callback):
        def on_trial_end(self, number: int, outcome: Outcome) -> None:
            raise RuntimeError("a mistake of the user's")

    def study(resume: bool, n_trials: int, *others: Callback) -> None:
        run_study(
            make_tiny,
            SPACE,
            BUDGET,
            n_trials=n_trials,
            out=tmp_path / "run",
            task="toy",
            config=CONFIG,
            device="cpu",
            resume=resume,
            callbacks=[Told(), *others],
        )

    study(False, 1)
    with pytest.raises(RuntimeError, match="a mistake of the user's"):
        study(True, 3, Breaks())
    with pytest.raises(UsageError, match="already holds files"):
        study(False, 3)
    varied = ("alpha", "meta_lr", "inner_steps")
    assert told == [f"begin toy 0 of 1 {varied}", "end", f"begin toy 1 of 3 {varied}", "end"]


def test_a_run_whose_beginning_fails_is_ended_for_those_that_have_begun() -> None:
    told: list[str] = []

    class Told(Callback):
        def on_run_end(self) -> None:
            told.append("end")

    class Breaks(Told):
        def on_run_begin(self, run: RunFacts) -> None:
            raise RuntimeError("a mistake of the user's")

    facts = RunFacts(Path(), "toy", BUDGET, Objectives.of(None, None), 1)
    with (
        pytest.raises(RuntimeError, match="a mistake"),
        during([CallbackList([Told(), Told()]), Breaks()], facts),
    ):
        raise AssertionError("nothing runs")
    assert told == ["end", "end"]


def test_an_objective_takes_them_into_any_study(tmp_path: Path) -> None:
    probe = Probe(tmp_path / "notes")
    objective = IFTObjective(
        make_tiny, SPACE, BUDGET, config=CONFIG, device="cpu", callbacks=[probe]
    )
    trial = optuna.create_study().ask()
    objective(trial)
    found = (tmp_path / "notes").iterdir()
    lines = next(found).read_text().split()
    assert lines.count("on_outer_step_end") == lines.count("on_trial_step") == 4


def test_a_trial_by_itself_calls_the_hooks_of_the_optimisation(tmp_path: Path) -> None:
    trial = Trial(make_tiny, CONFIG, BUDGET, device="cpu", callbacks=[Probe(tmp_path)])
    trial.setup()
    row = trial.step()
    assert row is not None
    assert row["ten_steps"] == 10.0
    lines = next(tmp_path.iterdir()).read_text().split()
    assert lines == ["on_outer_step_begin", "on_hypergradient", "on_outer_step_end"]


def test_an_addition_may_be_any_number_and_a_checkpoint_with_it_is_read(tmp_path: Path) -> None:
    class AddNumpy(Callback):
        def on_outer_step_end(self, joint: Any, metrics: dict[str, float]) -> None:
            metrics["norm"] = joint.problem.hypers()[0].detach().norm()

    trial = Trial(make_tiny, CONFIG, BUDGET, device="cpu", callbacks=[AddNumpy()])
    trial.setup()
    row = trial.step()
    assert row is not None
    assert type(row["norm"]) is float
    trial.save(tmp_path / "checkpoint.pt")
    trial.load(tmp_path / "checkpoint.pt")
    assert trial.metrics["norm"] == row["norm"]


def test_only_callbacks_with_hooks_of_the_optimisation_travel() -> None:
    probe, display = Probe(Path()), Display()
    assert joint_callbacks([display, CallbackList([display, CallbackList([probe])])]) == (probe,)
    assert joint_callbacks([display]) == ()


@pytest.mark.parametrize("wrong", [Display, print, "display"])
def test_what_is_no_callback_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"instances of ift_tune\.Callback"):
        Trial(make_tiny, CONFIG, BUDGET, device="cpu", callbacks=[wrong])


def test_a_callback_with_such_hooks_that_cannot_travel_is_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    class Local(Callback):
        def on_outer_step_begin(self, joint: Any) -> None:
            """Cannot be found by another process."""

    with pytest.raises(UsageError, match="callbacks with hooks of the optimisation"):
        run_study(
            make_tiny,
            SPACE,
            BUDGET,
            n_trials=1,
            out=tmp_path / "run",
            device="cpu",
            workers=2,
            callbacks=[Local()],
        )
    assert not (tmp_path / "run").exists()
