"""The parts in a Tuner of the user's own: searchers, schedulers, loggers, populations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray import tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch
from small_problems import CONFIG, SPACE, make_tiny

from ift_tune import Budget, UsageError, load_results
from ift_tune.base.status import SolveStatus
from ift_tune.search.loop import StudyPlan
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray import DivergenceStopper, StudySearcher, ray_trainable
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Float, MetaSpace
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.tables import Results
from with_ray.ray_problems import Noting, alone, faulty, fit, metrics_of, read_notes

# Points of this space end in every way: see `faulty`; α = 1e6 diverges.
FATEFUL = MetaSpace({"alpha": Float(1e-3, 1e7, log=True), "meta_lr": Float(0.01, 0.1)})
FATES = {
    "done": {"alpha": 0.1, "meta_lr": 0.05},
    "nonfinite": {"alpha": 0.1, "meta_lr": 0.06},
    "oom": {"alpha": 0.1, "meta_lr": 0.07},
    "diverged": {"alpha": 1e6, "meta_lr": 0.05},
}


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """Stand at module level, for Ray pickles it."""
    return dict(FATEFUL.suggest(trial))


def fateful(steps: int = 6) -> Any:
    budget = Budget(outer_steps=steps, retrain=False)
    return alone(ray_trainable(faulty, FATEFUL, budget, config=CONFIG, device="cpu"))


def check_tables(path: Path, trials: int) -> Results:
    tables = load_results(path)
    assert sorted(tables.trials["trial"]) == list(range(trials))
    assert not tables.steps.duplicated(["trial", "step"]).any()
    for _, rows in tables.steps.groupby("trial"):
        assert list(rows["step"]) == list(range(1, len(rows) + 1))
    return tables


@pytest.mark.nightly
@pytest.mark.parametrize("space", [suggest, FATEFUL.to_optuna()], ids=["defined by run", "dict"])
def test_rays_own_optuna_search_is_never_left_with_a_running_trial(
    space: Any, tmp_path: Path
) -> None:
    searcher = OptunaSearch(
        space, metric="objective", mode="min", points_to_evaluate=list(FATES.values())
    )
    results = fit(fateful(), tmp_path, search_alg=searcher, num_samples=4, reuse_actors=True)
    assert not results.errors
    assert Counter(m["stop_reason"] for m in metrics_of(results)) == Counter(list(FATES))
    assert searcher._ot_study is not None
    found = searcher._ot_study.trials
    assert [t.state for t in found] == [TrialState.COMPLETE] * 4
    assert sorted(t.value for t in found)[1:] == [1e9] * 3
    tables = check_tables(tmp_path / "ray", 4)
    assert set(tables.trials["stop_reason"]) == set(FATES)


def searcher_at(path: Path, n_trials: int) -> StudySearcher:
    plan = StudyPlan(
        SearchPlan(TrialPlan(faulty, Budget(outer_steps=6), CONFIG, device="cpu"), FATEFUL),
        0,
        path,
        {},
        None,
        "mine",
        sampler_factory("random"),
        optuna.pruners.NopPruner(),
        n_trials,
    )
    path.mkdir()
    return StudySearcher(plan, FATEFUL)


@pytest.mark.nightly
def test_the_study_is_told_how_every_trial_ended(tmp_path: Path) -> None:
    searcher = searcher_at(tmp_path / "study", 5)
    fates = FATES | {"failed": {"alpha": 0.1, "meta_lr": 0.08}}
    for point in fates.values():
        searcher.study.enqueue_trial(point)
    results = fit(
        fateful(),
        tmp_path,
        search_alg=searcher,
        num_samples=5,
        reuse_actors=True,
        run={"max_failures": 0},
    )
    assert len(results.errors) == 1
    found = searcher.study.trials
    expected = [TrialState.COMPLETE, *[TrialState.PRUNED] * 3, TrialState.FAIL]
    assert [t.state for t in found] == expected
    assert [t.user_attrs.get("stop_reason") for t in found] == [*FATES, None]
    assert list(found[0].intermediate_values) == [1, 2, 3, 4, 5, 6]
    values = [v for t in found for v in t.intermediate_values.values()]
    assert max(values) < 1e9
    tables = check_tables(tmp_path / "ray", 5)
    assert list(tables.trials["stop_reason"]) == list(fates)
    assert list(tables.trials["alpha"]) == [point["alpha"] for point in fates.values()]


def test_the_studys_searcher_refuses_a_second_space(tmp_path: Path) -> None:
    assert not searcher_at(tmp_path / "study", 1).set_search_properties(None, None, {"alpha": 1})


SCHEDULERS: dict[str, TrialScheduler] = {
    "asha": ASHAScheduler(time_attr="outer_step", max_t=9, reduction_factor=3),
    "hyperband": HyperBandScheduler(time_attr="outer_step", max_t=9),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_random_search_with_a_scheduler_a_stopper_and_loggers(name: str, tmp_path: Path) -> None:
    budget = Budget(outer_steps=9, retrain=False)
    kind = ray_trainable(
        make_tiny, SPACE, budget, config=CONFIG, device="cpu", metric="search_loss"
    )
    loggers = [CSVLoggerCallback(), JsonLoggerCallback(), TBXLoggerCallback()]
    results = fit(
        tune.with_resources(kind, {"cpu": 2}),
        tmp_path,
        SPACE.to_ray(),
        num_samples=6,
        reuse_actors=True,
        scheduler=SCHEDULERS[name],
        run={"stop": DivergenceStopper(), "callbacks": loggers},
    )
    assert not results.errors
    frame = results.get_dataframe()
    assert len(frame) == 6
    assert frame["objective"].notna().all()
    tables = check_tables(tmp_path / "ray", 6)
    assert set(tables.trials["status"]) == {"complete", "pruned"}
    steps = tables.trials.set_index("status")["step"]
    assert (steps["complete"] == 9).all()
    assert (steps["pruned"] < 9).all()
    assert sorted(frame["objective"]) == sorted(tables.trials["search_loss"])
    folders = [p for p in (tmp_path / "ray").iterdir() if (p / "progress.csv").exists()]
    assert len(folders) == 6
    for folder in folders:
        assert "record" not in (folder / "progress.csv").read_text().splitlines()[0].split(",")
        assert '"record"' not in (folder / "result.json").read_text()
        assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.nightly
def test_the_stopper_stops_what_diverges_before_the_trial_does(tmp_path: Path) -> None:
    results = fit(
        fateful(9),
        tmp_path,
        {"meta_lr": 0.05, "alpha": tune.grid_search([0.1, 1e6])},
        reuse_actors=True,
        run={"stop": DivergenceStopper(patience=3)},
    )
    assert not results.errors
    trials = check_tables(tmp_path / "ray", 2).trials.set_index("alpha")
    assert dict(trials["step"]) == {0.1: 9, 1e6: 3}
    assert dict(trials["stop_reason"]) == {0.1: "done", 1e6: "diverged"}
    assert dict(trials["status"]) == {0.1: "complete", 1e6: "pruned"}


def test_only_results_in_a_row_are_divergence_and_each_trial_has_its_own() -> None:
    stopper = DivergenceStopper(patience=2)
    bad, good = {"solve_status": "diverged"}, {"solve_status": "truncated", "objective": 1.0}
    assert [stopper("a", r) for r in (bad, good, bad, bad)] == [False, False, False, True]
    assert not stopper("b", bad)
    assert stopper("b", {"solve_status": "truncated", "objective": float("nan")})
    assert not stopper.stop_all()


def test_what_the_stopper_takes_for_divergence_can_be_chosen() -> None:
    stopper = DivergenceStopper(1, statuses=[SolveStatus.NEGATIVE_CURVATURE], metric="val_loss")
    assert not stopper("a", {"solve_status": "diverged", "objective": float("inf")})
    assert stopper("a", {"solve_status": "negative_curvature"})
    assert stopper("b", {"val_loss": float("inf")})
    with pytest.raises(UsageError, match="patience must be at least 1"):
        DivergenceStopper(0)


# A population


class Population:
    """Four trials of eight steps; after 3 and 6 the worst takes over from the best."""

    rates = (0.02, 0.03, 0.04, 0.05)

    def __init__(self, path: Path) -> None:
        (path / "notes").mkdir()
        space = MetaSpace({"meta_lr": Float(1e-6, 10.0, log=True)})
        trials = TrialPlan(
            make_tiny,
            Budget(outer_steps=8, retrain=False),
            CONFIG,
            device="cpu",
            metric="search_loss",
        )
        plan = SearchPlan(trials, space)
        kind = type("Noting", (Noting,), {"plan": plan, "notes": path / "notes"})
        self.results = fit(
            kind,
            path,
            {"meta_lr": tune.grid_search(list(self.rates))},
            metric="latest_objective",
            reuse_actors=True,
            scheduler=PopulationBasedTraining(
                time_attr="outer_step",
                perturbation_interval=3,
                hyperparam_mutations=space.to_ray(),
                custom_explore_fn=space.clipped,
                resample_probability=0.0,
                synch=True,
                log_config=False,
            ),
            run={"checkpoints_kept": 4},
        )
        self.notes = read_notes(path / "notes")
        self.tables = check_tables(path / "ray", 4)
        folders = (path / "ray").glob("trial-*")
        self.numbers = {(p / "ray_trial").read_text(): int(p.name[-5:]) for p in folders}

    @property
    def exploits(self) -> list[dict[str, Any]]:
        return [n for n in self.notes if n["event"] == "load" and n["owner"] != n["trial"]]


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> Population:
    return Population(tmp_path_factory.mktemp("population"))


@pytest.mark.nightly
def test_an_heir_has_the_weights_and_lambda_of_its_donor(population: Population) -> None:
    assert not population.results.errors
    assert population.exploits
    saved = {
        (n["trial"], n["step"]): n["fingerprint"] for n in population.notes if n["event"] == "save"
    }
    for note in population.exploits:
        assert note["fingerprint"] == note["stored"] == saved[note["owner"], note["step"]]
        assert note["fingerprint"] != saved[note["trial"], note["step"]]


@pytest.mark.nightly
def test_the_optimiser_of_lambda_is_fresh_after_an_exploit_only(population: Population) -> None:
    assert {n["optimizer_states"] for n in population.exploits} == {0}
    own = [n for n in population.notes if n["event"] == "load" and n["owner"] == n["trial"]]
    assert own
    assert 0 not in {n["optimizer_states"] for n in own}


@pytest.mark.nightly
def test_the_tables_name_the_donor_and_keep_the_settings_of_each_row(
    population: Population,
) -> None:
    steps = population.tables.steps
    assert (steps.groupby("trial")["step"].max() == 8).all()
    expected = {
        (population.numbers[n["trial"]], n["step"] + 1): (
            population.numbers[n["owner"]],
            n["meta_lr"],
        )
        for n in population.exploits
    }
    inherited = steps[steps["donor"].notna()]
    rows = zip(inherited["trial"], inherited["step"], inherited["donor"], strict=True)
    assert {(t, s): d for t, s, d in rows} == {k: donor for k, (donor, _) in expected.items()}
    assert sorted(steps[steps["step"] == 1]["meta_lr"]) == list(population.rates)
    for number, of_trial in steps.groupby("trial"):
        rate = float(of_trial["meta_lr"].iloc[0])
        for step, found in zip(of_trial["step"], of_trial["meta_lr"], strict=True):
            rate = expected.get((int(str(number)), step), (0, rate))[1]
            assert found == rate


@pytest.mark.nightly
def test_the_trials_end_with_the_settings_they_ended_with(population: Population) -> None:
    trials = population.tables.trials
    ends = {m["trial_id"]: m["config"]["meta_lr"] for m in metrics_of(population.results)}
    assert {population.numbers[name]: rate for name, rate in ends.items()} == dict(
        zip(trials["trial"], trials["meta_lr"], strict=True)
    )
    assert set(trials["stop_reason"]) == {"done"}


@pytest.mark.nightly
def test_the_best_of_a_member_is_of_what_it_has_done_since_its_last_exploit(
    population: Population,
) -> None:
    for _, rows in population.tables.steps.groupby("trial"):
        lives = rows["donor"].notna().cumsum()
        assert list(rows["best_value"]) == list(rows["search_loss"].groupby(lives).cummin())
    steps = population.tables.steps.set_index(["trial", "step"])
    trials = population.tables.trials
    for at in zip(trials["trial"], trials["best_step"], strict=True):
        (row,) = trials[trials["trial"] == at[0]].to_dict("records")
        for column in ("search_loss", "test_error", "meta_lr"):
            assert row[column] == steps.loc[at, column]
