"""Every pruner of Optuna, by name and as an object, over studies that are killed and resumed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna import pruners
from optuna.trial import FrozenTrial, TrialState
from small_problems import assert_same_tables, make_quadratic

from ift_tune import Budget, Callback, Float, Int, MetaConfig, MetaSpace, Neumann, run_study
from ift_tune.search.pruners import PRUNERS
from ift_tune.search.result import StudyResult

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
SPACE = MetaSpace({"meta_lr": Float(1e-3, 0.3, log=True)})

MEDIAN = {"n_startup_trials": 1, "n_warmup_steps": 1}
OBJECTS: dict[str, Callable[[], pruners.BasePruner]] = {
    "NopPruner": pruners.NopPruner,
    "MedianPruner": lambda: pruners.MedianPruner(**MEDIAN),
    "PercentilePruner": lambda: pruners.PercentilePruner(25.0, **MEDIAN),
    "PatientPruner": lambda: pruners.PatientPruner(pruners.MedianPruner(**MEDIAN), patience=1),
    "ThresholdPruner": lambda: pruners.ThresholdPruner(upper=3.9),
    "SuccessiveHalvingPruner": lambda: pruners.SuccessiveHalvingPruner(2, reduction_factor=2),
    "HyperbandPruner": lambda: pruners.HyperbandPruner(1, 8, reduction_factor=2),
    "WilcoxonPruner": lambda: pruners.WilcoxonPruner(p_threshold=0.5, n_startup_steps=2),
}
NEVER = ("NopPruner", "none", "median")  # the last one waits for more trials
SAMPLE = ("SuccessiveHalvingPruner", "hyperband")


def study(out: Path, pruner: Any, **more: Any) -> StudyResult:
    return run_study(
        make_quadratic,
        SPACE,
        Budget(outer_steps=8, retrain=False),
        n_trials=8,
        out=out,
        config=MetaConfig(inverse=Neumann(terms=1, alpha=0.1), inner_steps=1, start_check=False),
        device="cpu",
        sampler="random",
        pruner=pruner,
        **more,
    )


class DieAtStep(Callback):
    def on_trial_step(self, number: int, row: Mapping[str, Any]) -> None:
        if (number, row["step"]) == (3, 1):
            raise KeyboardInterrupt


def die_when_told(_: optuna.Study, trial: FrozenTrial) -> None:
    if trial.number == 4:
        raise KeyboardInterrupt


def test_every_pruner_of_optuna_is_walked() -> None:
    known = [getattr(pruners, name) for name in pruners.__all__]
    assert {kind.__name__ for kind in known if not inspect.isabstract(kind)} == set(OBJECTS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in SAMPLE else pytest.mark.nightly)
        for n in [*OBJECTS, *PRUNERS]
    ],
)
def test_a_killed_and_resumed_study_prunes_as_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    def make() -> Any:
        return OBJECTS[name]() if name in OBJECTS else name

    undisturbed = study(tmp_path / "undisturbed", make())
    states = [trial.state for trial in undisturbed.study.trials]
    assert set(states) == ({COMPLETE} if name in NEVER else {COMPLETE, PRUNED})
    hooks: list[Any] = [DieAtStep(), die_when_told]
    for again, hook in enumerate(hooks):
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "killed", make(), callbacks=[hook], resume=bool(again))
    resumed = study(tmp_path / "killed", make(), resume=True)
    assert [trial.state for trial in resumed.study.trials] == states
    assert_same_tables(tmp_path / "killed", tmp_path / "undisturbed")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["hyperband", "halving"])
def test_trials_of_several_lengths_are_pruned_in_a_resumed_study_as_in_an_undisturbed_one(
    name: str, tmp_path: Path
) -> None:
    """The longest trial so far is another one whenever a process asks."""
    given = name if name in PRUNERS else pruners.SuccessiveHalvingPruner()
    space = MetaSpace({"inner_steps": Int(1, 100, log=True)} | dict(SPACE.distributions))

    def search(out: str, n_trials: int, *, resume: bool = False) -> StudyResult:
        return run_study(
            make_quadratic,
            space,
            Budget(gradient_equivalents=700.0, retrain=False),
            n_trials=n_trials,
            out=tmp_path / out,
            device="cpu",
            seed=3,
            sampler="random",
            pruner=given,
            resume=resume,
        )

    undisturbed = search("undisturbed", 16)
    search("resumed", 7)
    search("resumed", 16, resume=True)
    assert PRUNED in {trial.state for trial in undisturbed.study.trials}
    assert_same_tables(tmp_path / "resumed", tmp_path / "undisturbed")
