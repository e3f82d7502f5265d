"""Trials compared by what they have used: inner steps, products, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_problems import CONFIG, make_nothing, make_tiny

from ift_tune import Budget, IFTObjective, MetaConfig, UsageError, run_study
from ift_tune.base.errors import Interrupted
from ift_tune.base.interrupt import Interrupt
from ift_tune.base.status import Outcome
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.joint import JointOptimizer
from ift_tune.search.fidelity import FIDELITIES, most
from ift_tune.search.plan import SearchPlan
from ift_tune.search.samplers import sampler_factory
from ift_tune.search.space import Choice, Int, MetaSpace
from ift_tune.trial.plan import TrialPlan
from ift_tune.trial.tables import RunDirectory

SPACE = MetaSpace({"terms": Int(0, 4), "inner_steps": Int(1, 3)})
BUDGET = Budget(outer_steps=6, eval_every=2, retrain=False)


def study(out: Path, fidelity: str, n_trials: int = 4, **more: Any) -> Any:
    settings: dict[str, Any] = {"config": CONFIG, "device": "cpu", "budget": BUDGET} | more
    sampler = sampler_factory("random")
    return run_study(
        make_tiny,
        SPACE,
        n_trials=n_trials,
        out=out,
        fidelity=fidelity,
        sampler=sampler,
        **settings,
    )


def expected(steps: Any, number: int, fidelity: str) -> list[int]:
    """Return what a trial has used at its evaluations, from the tables alone."""
    rows = steps[steps["trial"] == number]
    counts = {
        "outer_steps": rows["step"],
        "inner_steps": rows["step"] * rows["inner_steps"],
        "hvps": rows["hvps"],
        "gradient_equivalents": rows["gradient_equivalents"],
    }
    at = counts[fidelity][rows["search_error"].notna()]
    return sorted({int(value) for value in at})


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_a_study_reports_what_has_been_used(fidelity: str, tmp_path: Path) -> None:
    found, _, steps = study(tmp_path, fidelity)
    for trial in found.trials:
        assert sorted(trial.intermediate_values) == expected(steps, trial.number, fidelity)
    lasts = {trial.last_step for trial in found.trials}
    assert (len(lasts) == 1) is (fidelity == "outer_steps")


def test_a_trial_without_products_reports_once(tmp_path: Path) -> None:
    """Of values at the same number, the first: Optuna keeps one a step."""
    space = MetaSpace({"inverse": Choice(("identity",))})
    found, _, _ = run_study(
        make_tiny, space, BUDGET, n_trials=1, out=tmp_path, config=CONFIG, fidelity="hvps"
    )
    (trial,) = found.trials
    assert list(trial.intermediate_values) == [0]
    assert trial.state is optuna.trial.TrialState.COMPLETE


class Stop(Callback):
    """Asks to stop after a step."""

    def __init__(self, interrupt: Interrupt, after: int) -> None:
        self._interrupt, self._after = interrupt, after

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        self._interrupt.requested |= row["step"] == self._after

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Nothing."""


@pytest.mark.parametrize("after", [3, 4])
def test_a_resumed_trial_reports_nothing_twice(after: int, tmp_path: Path) -> None:
    plan: dict[str, Any] = {"config": CONFIG, "device": "cpu", "fidelity": "gradient_equivalents"}
    point = {"terms": 3, "inner_steps": 2}
    pruner = optuna.pruners.NopPruner()
    whole = optuna.create_study(pruner=pruner)
    whole.enqueue_trial(point)
    whole.optimize(IFTObjective(make_tiny, SPACE, BUDGET, **plan), n_trials=1)
    torn = optuna.create_study(pruner=pruner)
    torn.enqueue_trial(point)
    trial = torn.ask()
    run, interrupt = RunDirectory(tmp_path / "run"), Interrupt()
    stop = Stop(interrupt, after)
    with pytest.raises(Interrupted):
        IFTObjective(
            make_tiny, SPACE, BUDGET, run=run, callbacks=[stop], interrupt=interrupt, **plan
        )(trial)
    before = dict(torn.trials[0].intermediate_values)
    value = IFTObjective(make_tiny, SPACE, BUDGET, run=run, **plan)(trial)
    after_all = torn.trials[0].intermediate_values
    assert before.items() <= after_all.items()
    assert after_all == whole.trials[0].intermediate_values
    assert value == whole.trials[0].value


def test_trials_at_equal_cost_compete_and_not_at_equal_steps(tmp_path: Path) -> None:
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=10, reduction_factor=2)
    found, _, steps = study(tmp_path, "inner_steps", 8, pruner=pruner, metric="search_loss")
    pruned = [t for t in found.trials if t.state is optuna.trial.TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        assert trial.last_step is not None
        assert trial.last_step >= 10  # at most six outer steps, of 1 to 3 inner ones
    slow = steps[steps["inner_steps"] == 1]["trial"].unique()
    assert not {t.number for t in pruned} & set(slow)  # they never come as far


def patient() -> optuna.pruners.BasePruner:
    return optuna.pruners.PatientPruner(optuna.pruners.MedianPruner(), 2)


@pytest.mark.filterwarnings("ignore:PatientPruner is experimental")
@pytest.mark.parametrize(
    ("pruner", "fidelity", "message"),
    [
        ("median", "hvps", "MedianPruner compares trials at exactly the same step.*got fidelity"),
        (patient, "inner_steps", "MedianPruner compares"),
        ("none", "hvp", "unknown fidelity 'hvp'; did you mean 'hvps'"),
        ("none", "terms", "unknown fidelity 'terms'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    pruner: Any, fidelity: str, message: str, tmp_path: Path
) -> None:
    pruner = pruner() if callable(pruner) else pruner
    with pytest.raises(UsageError, match=message):
        study(tmp_path / "run", fidelity, pruner=pruner)
    assert not (tmp_path / "run").exists()
    if isinstance(pruner, optuna.pruners.BasePruner):
        own = optuna.create_study(pruner=pruner)
        objective = IFTObjective(make_nothing, SPACE, BUDGET, fidelity=fidelity)
        with pytest.raises(UsageError, match=message):
            own.optimize(objective, n_trials=1)


def test_the_fidelity_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    study(tmp_path / "one", "hvps", 1)
    for fidelity in ("inner_steps", "outer_steps"):
        with pytest.raises(UsageError, match=f"another fidelity.*hvps, got fidelity {fidelity}"):
            study(tmp_path / "one", fidelity, 2, resume=True)
    assert len(study(tmp_path / "one", "hvps", 2, resume=True).trials) == 2
    plan = SearchPlan(TrialPlan(make_tiny, BUDGET, CONFIG), SPACE)
    assert "fidelity" not in plan.settings()  # runs of before there was one go on


# What a trial can use at most


@pytest.mark.parametrize(
    ("fidelity", "budget", "bound"),
    [
        ("inner_steps", Budget(outer_steps=6), 18),
        ("hvps", Budget(outer_steps=6), 30),  # 4 terms, and one product that measures the residual
        ("inner_steps", Budget(gradient_equivalents=100.0), 100),
        ("hvps", Budget(gradient_equivalents=100.0), 50),
        ("gradient_equivalents", Budget(gradient_equivalents=99.5), 100),
        ("inner_steps", Budget(outer_steps=6, gradient_equivalents=10.0), 10),
    ],
)
def test_a_budget_bounds_what_is_used(fidelity: str, budget: Budget, bound: int) -> None:
    assert most(fidelity, budget, CONFIG, SPACE) == bound


@given(
    st.integers(0, 4),
    st.integers(1, 3),
    st.sampled_from(["identity", "neumann", "conjugate_gradient"]),
)
def test_no_trial_uses_more(terms: int, inner_steps: int, inverse: str) -> None:
    space = MetaSpace(
        {"inverse": Choice(("identity", "neumann", "conjugate_gradient")), **SPACE.distributions}
    )
    point = space.applicable({"inverse": inverse, "terms": terms, "inner_steps": inner_steps})
    config = CONFIG.updated(point)
    joint = JointOptimizer(make_tiny(config, torch.device("cpu"), 0), config, seed=0)
    for _ in range(2):
        joint.step()
    bounds = {f: most(f, Budget(outer_steps=2), CONFIG, space) for f in ("inner_steps", "hvps")}
    joint.close()
    assert joint.inner_steps <= bounds["inner_steps"]
    assert joint.cost.hvps <= bounds["hvps"]


@pytest.mark.parametrize(
    ("fidelity", "budget", "config", "space", "message"),
    [
        ("hvps", Budget(seconds=9.0), CONFIG, SPACE, "does not say how many hvps.*got seconds=9.0"),
        ("gradient_equivalents", Budget(outer_steps=9), CONFIG, SPACE, "got outer_steps=9"),
        (
            "hvps",
            Budget(outer_steps=9),
            MetaConfig().updated({"inverse": "dense"}),
            MetaSpace({"inner_steps": Int(1, 3)}),
            "does not say how many hvps",
        ),
        (
            "hvps",
            Budget(outer_steps=9),
            CONFIG,
            MetaSpace({"inverse": Choice(("identity",))}),
            "no trial of this space uses any hvps",
        ),
    ],
)
def test_a_budget_without_a_bound_is_refused(
    fidelity: str, budget: Budget, config: MetaConfig, space: MetaSpace, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        most(fidelity, budget, config, space)
