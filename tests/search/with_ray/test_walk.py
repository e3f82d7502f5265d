"""Every scheduler of Ray's, and the searchers that install beside it, with a class and a function.

The table in docs/cluster.md is what this finds.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune
from ray.tune.schedulers import (
    ASHAScheduler,
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    ResourceChangingScheduler,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Repeater
from ray.tune.search.optuna import OptunaSearch
from small_problems import CONFIG, SPACE, make_tiny

from ift_tune import Budget, Int, MetaSpace, load_best, load_results
from ift_tune.search.loop import StudyPlan
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray import StudySearcher, ray_function, ray_trainable
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Float
from ift_tune.trial.plan import TrialPlan
from with_ray.ray_problems import fit, metrics_of

STEPS, TRIALS = 6, 4
RANGES = MetaSpace({"alpha": Float(0.05, 1.0), "meta_lr": Float(0.01, 0.3)})
BOUNDS: dict[str, Any] = {"alpha": [0.05, 1.0], "meta_lr": [0.01, 0.3]}


def resources(controller: Any, trial: Any, result: dict[str, Any], scheduler: Any) -> Any:
    """Give a trial another core from its third result on."""
    late = result["training_iteration"] >= 3
    return tune.PlacementGroupFactory([{"CPU": 2.0 if late else 1.0}])


STEP = "training_iteration"
SCHEDULERS: dict[str, Callable[[], TrialScheduler]] = {
    "FIFO": FIFOScheduler,
    "ASHA": lambda: ASHAScheduler(time_attr="inner_steps", max_t=18, reduction_factor=2),
    "AsyncHyperBand": lambda: AsyncHyperBandScheduler(max_t=STEPS, brackets=2),
    "HyperBand": lambda: HyperBandScheduler(time_attr="outer_steps", max_t=STEPS),
    "HyperBandForBOHB": lambda: HyperBandForBOHB(time_attr=STEP, max_t=STEPS),
    "MedianStopping": lambda: MedianStoppingRule(
        time_attr="gradient_equivalents", grace_period=10, min_samples_required=2
    ),
    "PBT": lambda: PopulationBasedTraining(
        time_attr=STEP,
        perturbation_interval=2,
        hyperparam_mutations=RANGES.to_ray(),
        custom_explore_fn=RANGES.clipped,
        synch=True,
        log_config=False,
    ),
    "PBT, not in step": lambda: PopulationBasedTraining(
        time_attr=STEP, perturbation_interval=2, hyperparam_mutations=RANGES.to_ray()
    ),
    "PB2": lambda: PB2(time_attr=STEP, perturbation_interval=2, hyperparam_bounds=BOUNDS),
    "ResourceChanging": lambda: ResourceChangingScheduler(
        ASHAScheduler(max_t=STEPS), resources_allocation_function=resources
    ),
}
OF_POPULATIONS = ("PBT", "PBT, not in step", "PB2")


def trainable(make: Any, space: MetaSpace = SPACE) -> Any:
    kind = make(make_tiny, space, Budget(outer_steps=STEPS), config=CONFIG, device="cpu")
    return tune.with_resources(kind, {"cpu": 1})


def of_study(path: Path) -> StudySearcher:
    plan = SearchPlan(TrialPlan(make_tiny, Budget(outer_steps=STEPS), CONFIG, device="cpu"), SPACE)
    random, pruner = sampler_factory("random"), optuna.pruners.NopPruner()
    path.mkdir()
    return StudySearcher(StudyPlan(plan, 0, path, {}, None, "mine", random, pruner, TRIALS), SPACE)


def check(results: tune.ResultGrid, path: Path) -> None:
    """Look at what is the same under any scheduler and searcher."""
    assert not results.errors
    trials, steps = load_results(path / "ray")
    assert len(trials) == len(results) == TRIALS
    assert not steps.duplicated(["trial", "step"]).any()
    assert set(trials["stop_reason"]) <= {"done", "pruned"}
    done = trials[trials["stop_reason"] == "done"]
    assert (done["step"] == STEPS).all()
    assert (trials[trials["stop_reason"] == "pruned"]["step"] < STEPS).all()
    assert len(done) >= 1
    assert done["retrained_test_error"].notna().all()
    for number in done["trial"]:
        assert (path / "ray" / f"trial-{number:05d}" / "hyperparameters.pt").exists()
    said = sorted(metrics["stop_reason"] for metrics in metrics_of(results))
    assert said == sorted(trials["stop_reason"])
    best = results.get_best_result()
    assert best.metrics is not None
    assert best.metrics["objective"] == min(metrics["objective"] for metrics in metrics_of(results))
    assert best.checkpoint is not None
    with best.checkpoint.as_directory() as directory:  # outside of Ray's processes
        problem = load_best(directory, make_tiny, device="cpu")
    measured = problem.evaluate(problem.splits.search)["error"]
    assert measured == pytest.approx(best.metrics["objective"])
    for key, d in SPACE.distributions.items():
        if key in steps:
            assert steps[key].between(d.low, d.high).all()  # type: ignore[union-attr]


KINDS: dict[str, Any] = {"class": ray_trainable, "function": ray_function}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:Consider boosting PBT performance")
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(SCHEDULERS, KINDS)))
def test_every_scheduler(name: str, kind: str, tmp_path: Path) -> None:
    population = name in OF_POPULATIONS
    bohb = name == "HyperBandForBOHB"
    of_function = kind == "function"
    results = fit(
        trainable(KINDS[kind], RANGES if population else SPACE),
        tmp_path,
        None if bohb else (RANGES if population else SPACE).to_ray(),
        num_samples=TRIALS,
        scheduler=SCHEDULERS[name](),
        search_alg=of_study(tmp_path / "study") if bohb else None,
        reuse_actors=not of_function and name != "ResourceChanging",
        run={"checkpoints_kept": 4, "checkpoint_every": None if of_function else 1},
    )
    check(results, tmp_path)


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


def optuna_search(**more: Any) -> OptunaSearch:
    return OptunaSearch(metric="objective", mode="min", seed=0, **more)


def hyperopt_search() -> Any:
    from ray.tune.search.hyperopt import HyperOptSearch

    return HyperOptSearch(metric="objective", mode="min", n_initial_points=2)


def bayesopt_search() -> Any:
    from ray.tune.search.bayesopt import BayesOptSearch

    return BayesOptSearch(metric="objective", mode="min", random_search_steps=2)


def bohb_search() -> Any:
    from ray.tune.search.bohb import TuneBOHB

    return TuneBOHB(metric="objective", mode="min", seed=0)


SEARCHERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "BasicVariant": (lambda: BasicVariantGenerator(random_state=0), ()),
    "ConcurrencyLimiter": (lambda: ConcurrencyLimiter(optuna_search(), max_concurrent=1), ()),
    "OptunaSearch": (optuna_search, ()),
    "Repeater": (lambda: Repeater(optuna_search(), repeat=2), ()),
    "BOHB": (bohb_search, ("hpbandster", "ConfigSpace")),
    "HyperOpt": (hyperopt_search, ("hyperopt",)),
    "BayesOpt": (bayesopt_search, ("bayes_opt",)),
}


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # BOHB's parts are old
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SEARCHERS)
def test_every_searcher(name: str, kind: str, tmp_path: Path) -> None:
    search, needed = SEARCHERS[name]
    if not has(*needed):
        pytest.skip(f"{needed[0]} is not installed")
    of_function = kind == "function"
    space = RANGES if name == "BayesOpt" else SPACE  # it knows no whole numbers
    results = fit(
        trainable(KINDS[kind], space),
        tmp_path,
        space.to_ray(),
        num_samples=TRIALS,
        search_alg=search(),
        scheduler=SCHEDULERS["HyperBandForBOHB"]() if name == "BOHB" else None,
        reuse_actors=not of_function,
        run={"checkpoint_every": None if of_function else 1},
    )
    check(results, tmp_path)


@pytest.mark.nightly
def test_repeats_have_seeds_of_their_own_and_their_mean_is_told(tmp_path: Path) -> None:
    inner = optuna_search()
    kind = trainable(ray_trainable, SPACE)
    results = fit(
        kind,
        tmp_path,
        {**SPACE.to_ray(), "inner_steps": tune.quniform(1, 3, 1)},
        num_samples=4,
        search_alg=Repeater(inner, repeat=2),
        reuse_actors=True,
        run={"stop": {"outer_step": 3}},
    )
    trials = load_results(tmp_path / "ray").trials
    assert not results.errors
    assert list(trials["stop_reason"]) == ["done"] * 4
    pairs = [group for _, group in trials.groupby("alpha", sort=False)]
    assert [sorted(pair["seed"]) for pair in pairs] == [[0, 1], [0, 1]]
    assert inner._ot_study is not None
    told = sorted(t.value for t in inner._ot_study.trials if t.value is not None)
    means = sorted(float(pair["search_error"].mean()) for pair in pairs)
    assert told == pytest.approx(means)
    assert trials["inner_steps"].isin([1, 2, 3]).all()


def test_a_space_with_whole_numbers_takes_rays_whole_floats() -> None:
    kind = ray_trainable(
        make_tiny,
        MetaSpace({"inner_steps": Int(2, 8), "user.width": Int(2, 8)}),
        Budget(outer_steps=1),
        config=CONFIG,
        device="cpu",
    )
    drawn = {key: tune.quniform(2, 8, 2).sample() for key in ("inner_steps", "user.width")}
    trial: Any = kind(config=drawn)
    config = trial._session.trial.config
    assert {type(config.inner_steps), type(config.user["width"])} == {int}
    assert config.inner_steps == drawn["inner_steps"]
    trial.stop()
