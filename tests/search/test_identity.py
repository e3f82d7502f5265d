"""What a study or a run was begun with is compared before anything is added to it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import optuna
import pytest
from small_problems import BUDGET, CONFIG, SPACE, make_nothing, make_quadratic, make_tiny

from ift_tune import Budget, Float, IFTObjective, MetaSpace, UsageError, load_results, run_study
from ift_tune.base.errors import RunExistsError
from ift_tune.base.identity import factory_name, require_same
from ift_tune.search.result import StudyResult
from ift_tune.trial.tables import RunDirectory

SHORT = Budget(outer_steps=2, retrain=False)


def search(out: Path, factory: Any = make_tiny, **changes: Any) -> StudyResult:
    named: dict[str, Any] = {
        "space": SPACE,
        "budget": SHORT,
        "n_trials": 1,
        "config": CONFIG,
        "device": "cpu",
        "storage": f"sqlite:///{out.parent / 'study.db'}",
        "study_name": "shared",
    }
    return run_study(factory, out=out, **named | changes)


def everything_in(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    search(path / "first")
    return path


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metric": "search_loss"}, "metric; .*has metric None, got metric search_loss"),
        ({"budget": Budget(outer_steps=3, retrain=False)}, "budget; .*budget.outer_steps 2"),
        ({"config": CONFIG.updated({"inner_lr": 0.5})}, "config; .*got config.inner_lr 0.5"),
        ({"space": MetaSpace({"meta_lr": Float(0.1, 0.2)})}, "space"),
        ({"seed": 3}, "seed; .*has seed 0, got seed 3"),
        ({"task": "other"}, "task"),
        ({"factory": make_quadratic}, "factory; .*got factory small_problems:make_quadratic"),
    ],
)
def test_a_study_is_not_joined_with_other_settings(
    changes: dict[str, Any], named: str, begun: Path
) -> None:
    out = begun / "second"
    with pytest.raises(UsageError, match=f"'shared' was begun with another {named}"):
        search(out, n_trials=2, **changes)
    assert not out.exists()
    study = optuna.load_study(study_name="shared", storage=f"sqlite:///{begun / 'study.db'}")
    assert len(study.trials) == 1


def test_a_study_is_joined_with_the_same_settings(begun: Path) -> None:
    result = search(begun / "third", n_trials=3)
    assert len(result.study.trials) == 3
    assert len(result.trials) == 2


def test_a_run_goes_on_with_a_factory_of_another_name_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search(tmp_path / "a")
    corrected = functools.partial(_renamed, width=3)
    with caplog.at_level("WARNING", logger="ift_tune"):
        assert len(search(tmp_path / "a", corrected, n_trials=2, resume=True).trials) == 2
    assert "make_tiny and goes on with test_identity:_renamed(width=3)" in caplog.text


def _renamed(config: Any, device: Any, seed: int, *, width: int) -> Any:
    return make_tiny(config, device, seed)


def test_values_of_another_program_are_not_ranked_with_these(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="shared")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(UsageError, match=r"values of another program.*another study_name"):
        search(tmp_path / "a", make_tiny, storage=storage)


def test_a_study_of_one_s_own_that_is_empty_is_joined(tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="shared")
    study.enqueue_trial({"meta_lr": 0.123})
    assert search(tmp_path / "a", storage=storage).trials["meta_lr"].tolist() == [0.123]


def objective(**changes: Any) -> IFTObjective:
    named: dict[str, Any] = {"space": SPACE, "budget": BUDGET, "config": CONFIG, "device": "cpu"}
    return IFTObjective(changes.pop("factory", make_tiny), **named | changes)


@pytest.mark.parametrize("changes", [{"metric": "search_loss"}, {"budget": SHORT}, {"seed": 1}])
def test_objectives_of_other_settings_do_not_share_a_study(changes: dict[str, Any]) -> None:
    study = optuna.create_study()
    study.optimize(objective(), n_trials=1)
    with pytest.raises(UsageError, match=f"begun with another {next(iter(changes))}; join it"):
        study.optimize(objective(factory=make_tiny, **changes), n_trials=1)
    study.optimize(objective(), n_trials=1)
    assert len([t for t in study.trials if t.value is not None]) == 2


def test_an_objective_and_run_study_compare_each_other(begun: Path) -> None:
    study = optuna.load_study(study_name="shared", storage=f"sqlite:///{begun / 'study.db'}")
    with pytest.raises(UsageError, match="another budget"):
        study.optimize(objective(), n_trials=1)


def test_a_second_study_does_not_write_over_the_trials_of_the_first(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    optuna.create_study().optimize(objective(run=run), n_trials=1)
    before = (tmp_path / "trial-00000" / "steps.csv").read_bytes()
    for again in (run, RunDirectory(tmp_path, resume=True)):
        with pytest.raises(RunExistsError, match="already holds a trial 0: give each study"):
            optuna.create_study().optimize(objective(factory=make_nothing, run=again), n_trials=1)
    assert (tmp_path / "trial-00000" / "steps.csv").read_bytes() == before


def test_a_finished_trial_is_not_evaluated_again_over_itself(tmp_path: Path) -> None:
    study = optuna.create_study()
    mine = objective(run=RunDirectory(tmp_path))
    study.optimize(mine, n_trials=1)
    with pytest.raises(RunExistsError, match="none to evaluate a finished trial again"):
        mine(study.best_trial)
    assert objective()(study.best_trial) == study.best_value


def test_an_objective_s_directory_says_what_it_was_begun_with(tmp_path: Path) -> None:
    study = optuna.create_study()
    run = RunDirectory(tmp_path)
    study.optimize(objective(run=run), n_trials=2)
    assert load_results(tmp_path).trials.attrs["run"]["budget"]["outer_steps"] == 4
    other = optuna.create_study()
    other.add_trial(study.trials[0])
    other.add_trial(study.trials[1])
    with pytest.raises(UsageError, match="was begun with another budget; resume with the same"):
        other.optimize(objective(run=run, budget=SHORT), n_trials=1)


def _named(*arguments: Any, root: str, small: bool) -> Any:
    raise AssertionError("it is not called")


class Making:
    """A factory that is an object."""

    def __call__(self, config: Any, device: Any, seed: int) -> Any:
        return make_tiny(config, device, seed)


@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (make_tiny, "small_problems:make_tiny"),
        (functools.partial(_renamed, width=4), "test_identity:_renamed(width=4)"),
        (
            functools.partial(_named, root="/data", small=True),
            "test_identity:_named(small=True)",
        ),
        (Making(), "test_identity:Making"),
        (lambda *_: None, "test_identity:<lambda>"),
    ],
)
def test_factories_are_named(factory: Any, name: str) -> None:
    assert factory_name(factory) == name


def test_settings_that_came_later_have_what_held_before() -> None:
    old = {"metric": "search_loss", "budget": {"outer_steps": 2}}
    new = {**old, "mode": "min", "factory": "a:b", "budget": {"outer_steps": 2, "patience": None}}
    require_same("it", old, new, mend="stop")
    changed = {**new, "mode": "max", "budget": {"outer_steps": 2, "patience": 3}}
    with pytest.raises(UsageError, match=r"another budget, mode; stop .it has budget.patience"):
        require_same("it", old, changed, mend="stop")
    with pytest.raises(UsageError, match="has metric search_loss, got metric none"):
        require_same("it", old, {"budget": {"outer_steps": 2}}, mend="stop")
