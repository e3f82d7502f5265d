"""Ray's schedulers count what trials have used, where a search asks for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler
from small_problems import CONFIG, SPACE, make_nothing, make_tiny

from ift_tune import Budget, UsageError
from ift_tune.search.fidelity import FIDELITIES
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray import ray_trainable, run_ray
from ift_tune.search.ray.settings import make_scheduler
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Choice, Int, MetaSpace
from ift_tune.trial.plan import TrialPlan

STEPS = 9
BUDGET = Budget(outer_steps=STEPS, retrain=False)


def plan(budget: Budget, fidelity: str, space: MetaSpace = SPACE) -> SearchPlan:
    return SearchPlan(TrialPlan(make_tiny, budget, CONFIG), space, fidelity)


@pytest.mark.parametrize("kind", [ASHAScheduler, HyperBandScheduler])
@pytest.mark.parametrize(
    ("budget", "fidelity", "counted", "limit"),
    [
        (BUDGET, "outer_steps", "outer_steps", 9),
        (BUDGET, "inner_steps", "inner_steps", 27),
        (BUDGET, "hvps", "hvps", 27),  # two terms, and one product for the residual
        (Budget(gradient_equivalents=80.0), "hvps", "hvps", 40),
        (Budget(gradient_equivalents=80.0), "outer_steps", "gradient_equivalents", 80),
        (Budget(seconds=7.0), "outer_steps", "wall_seconds", 7),
    ],
)
def test_schedulers_count_in_the_unit_up_to_the_longest_trial(
    kind: Any, budget: Budget, fidelity: str, counted: str, limit: int
) -> None:
    name = "asha" if kind is ASHAScheduler else "hyperband"
    made: Any = make_scheduler(name, plan(budget, fidelity))
    assert isinstance(made, kind)
    assert made._time_attr == counted
    assert (made._max_t if kind is ASHAScheduler else made._max_t_attr) == limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler": "pbt", "fidelity": "hvps"}, "same outer step.*got fidelity='hvps'"),
        ({"fidelity": "hvps", "budget": Budget(seconds=3.0)}, "how many hvps.*got seconds=3.0"),
        ({"fidelity": "gradient_equivalents"}, "how many gradient_equivalents.*outer_steps=9"),
        (
            {"fidelity": "hvps", "space": MetaSpace({"inverse": Choice(("identity",))})},
            "no trial of this space uses any hvps",
        ),
        ({"fidelity": "epochs"}, "unknown fidelity 'epochs'"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused_before_anything_is_written(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"scheduler": "asha", "space": SPACE, "budget": BUDGET} | settings
    with pytest.raises(UsageError, match=message):
        run_ray(make_nothing, n_trials=2, out=tmp_path / "run", config=CONFIG, **given)
    assert not (tmp_path / "run").exists()


def test_every_result_holds_what_has_been_used() -> None:
    space = MetaSpace({"terms": Int(0, 3), "inner_steps": Int(1, 3)})
    budget = Budget(outer_steps=5, eval_every=2)
    for terms in (0, 3):
        kind = ray_trainable(make_tiny, space, budget, config=CONFIG, device="cpu")
        trial: Any = kind(config={"terms": terms, "inner_steps": 2})
        results = [trial.train() for _ in range(3)]
        assert (
            [r["outer_steps"] for r in results] == [r["outer_step"] for r in results] == [2, 4, 5]
        )
        assert [r["inner_steps"] for r in results] == [4, 8, 10]
        for fidelity in FIDELITIES:
            counts = [r[fidelity] for r in results]
            assert counts == sorted(counts)
        assert (results[-1]["hvps"] > 0) is (terms > 0)
        assert trial._session.trial.joint.cost.gradient_equivalents == counts[-1]
        trial.stop()


@pytest.mark.nightly
def test_a_search_compares_at_equal_inner_steps(tmp_path: Path) -> None:
    result = run_ray(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=6,
        out=tmp_path,
        config=CONFIG,
        device="cpu",
        metric="search_loss",
        sampler=sampler_factory("random"),
        scheduler="asha",
        fidelity="inner_steps",
    )
    assert result.study is not None
    per_step = dict(zip(result.trials["trial"], result.trials["inner_steps"], strict=True))
    assert len(set(per_step.values())) > 1
    for trial in result.study.trials:
        each = per_step[trial.number]
        expected = [each * step for step in range(1, STEPS + 1)]
        assert list(trial.intermediate_values) == expected[: len(trial.intermediate_values)]
        assert (trial.last_step == expected[-1]) is (trial.state is TrialState.COMPLETE)
        if trial.state is TrialState.PRUNED:
            assert trial.last_step is not None
            assert trial.last_step >= 3  # the first rung: a ninth of the longest trial
    assert TrialState.PRUNED in {trial.state for trial in result.study.trials}
    with pytest.raises(UsageError, match="another fidelity"):
        run_ray(
            make_nothing, SPACE, BUDGET, n_trials=7, out=tmp_path, config=CONFIG, resume=True,
            device="cpu", metric="search_loss", scheduler="asha",
        )  # fmt: skip
