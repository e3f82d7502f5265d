"""What a search is after: pairs of metrics and modes, constraints, and the front of a table."""

from __future__ import annotations

import json
import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ift_tune import UsageError
from ift_tune.base.constraints import Constraint
from ift_tune.base.direction import Direction
from ift_tune.base.objectives import Objectives, undominated

COST = "gradient_equivalents"


@pytest.mark.parametrize(
    ("text", "column", "relation", "bound"),
    [
        ("alpha_lambda_max<=2", "alpha_lambda_max", "<=", 2.0),
        (" hyper_change >= 0.3 ", "hyper_change", ">=", 0.3),
        ("search_f1[/macro]>=.5", "search_f1[/macro]", ">=", 0.5),
        ("search_top 5 error<=-1e-3", "search_top 5 error", "<=", -0.001),
    ],
)
def test_a_constraint_is_read_and_written(
    text: str, column: str, relation: str, bound: float
) -> None:
    constraint = Constraint.parse(text)
    assert constraint == Constraint(column, relation, bound)
    assert Constraint.parse(str(constraint)) == constraint


@pytest.mark.parametrize(
    "text",
    [
        *("alpha<2", "alpha=2", "alpha==2", "<=2", "alpha<=", "alpha<=two", "alpha<=nan"),
        *("1<=alpha<=2", ">=inf", "alpha>=inf", "", None, 3, ("alpha", "<=", 2)),
    ],
)
def test_what_is_no_constraint_is_refused_with_its_form(text: Any) -> None:
    with pytest.raises(UsageError, match="COLUMN<=NUMBER or COLUMN>=NUMBER"):
        Constraint.parse(text)


@pytest.mark.parametrize(
    "name", ["test_error", "retrained_test_f1", "val_test_gap", "test_anything"]
)
def test_the_test_split_decides_nothing(name: str) -> None:
    with pytest.raises(UsageError, match=f"only reported.*got {name}"):
        Objectives.of(["search_error", name], ["min", "min"])
    with pytest.raises(UsageError, match="only reported"):
        Objectives.of(None, None, [f"{name}<=1"])


@pytest.mark.parametrize(
    ("metric", "mode", "mend"),
    [
        (["search_error", COST], ["min"], "got 1 for search_error, gradient_equivalents"),
        (["search_error", COST], "min", "give 2 in the order"),
        ("search_error", ["min", "max"], "got 2 for search_error"),
        (["search_error", "search_error"], None, "optimised once"),
        ([], None, "a list of names"),
        (["search_error", None], None, "a list of names"),
        (["search_error", ""], None, "a list of names"),
        (["search_error", COST], ["min", "lower"], "must be 'min' or 'max', got 'lower'"),
        (["search_error", "search_recall"], None, "search_recall sounds as if higher"),
        (["search_f1", COST], None, "search_f1 sounds as if higher"),
    ],
)
def test_metrics_and_modes_that_do_not_go_together_are_refused(
    metric: Any, mode: Any, mend: str
) -> None:
    with pytest.raises(UsageError, match=mend):
        Objectives.of(metric, mode)


@pytest.mark.parametrize(
    ("constraints", "mend"),
    [
        (["hvps<=3", "hvps<=4"], "one bound with <="),
        (["hvps<=3", "hvps>=4"], "no trial can keep both"),
        ("hvps<=3", "must be a list"),
    ],
)
def test_constraints_that_contradict_each_other_are_refused(constraints: Any, mend: str) -> None:
    with pytest.raises(UsageError, match=mend):
        Objectives.of(None, None, constraints)


@pytest.mark.parametrize(
    "given",
    [
        (None, None, []),
        ("search_f1", "max", ["hvps>=1", "hvps<=5.5"]),
        (["search_error", COST, "hvps"], None, ["search_loss<=.1"]),
        (("search_auc", "wall_seconds"), ("max", "min"), ()),
    ],
)
def test_settings_say_it_all_and_are_plain(given: Any) -> None:
    objectives = Objectives.of(*given)
    written = json.loads(json.dumps(objectives.settings()))
    assert Objectives.of_run(written) == objectives
    assert written["metric"] == objectives.metric
    assert ("objectives" in written, "constraints" in written) == (
        objectives.several,
        bool(given[2]),
    )


def test_a_run_of_before_had_one_metric_to_minimise() -> None:
    for run in (None, {}, {"metric": "search_accuracy"}):
        assert Objectives.of_run(run).directions == (Direction.MIN,)


def test_values_come_in_the_order_of_the_metrics_and_none_may_lack() -> None:
    objectives = Objectives.of(["search_error", "hvps", COST], None)
    assert objectives.values(0.5, {COST: 7, "hvps": 3, "search_error": 9.0}) == (0.5, 3.0, 7.0)
    for lacking in ({COST: 7}, {COST: 7, "hvps": None}, {COST: float("inf"), "hvps": 3}):
        with pytest.raises(UsageError, match="has not measured it"):
            objectives.values(0.5, lacking)
    turned = Objectives.of(["search_error", "hvps", COST], ["min", "max", "min"])
    assert turned.further_losses({"hvps": 3}) == [-3.0, math.inf]


def test_violations_are_positive_where_a_bound_is_not_kept_or_not_shown() -> None:
    objectives = Objectives.of(None, None, ["hvps<=3", "hyper_change>=0.5", "alpha_lambda_max<=8"])
    measured = {"hvps": 3, "hyper_change": 0.25, "alpha_lambda_max": None}
    violations = objectives.violations(measured)
    assert violations == {"hvps<=3": 0.0, "hyper_change>=0.5": 0.25, "alpha_lambda_max<=8": 8.0}
    assert objectives.violations(measured, complete=False) == {
        "hvps<=3": 0.0,
        "hyper_change>=0.5": 0.25,
    }


@pytest.mark.parametrize("metrics", [2, 3])
def test_the_front_is_what_no_other_point_dominates(metrics: int) -> None:
    losses = np.random.default_rng(0).integers(0, 6, (60, metrics)).astype(float)
    front = undominated(losses)
    for index, point in enumerate(losses):
        better = [other for other in losses if (other <= point).all() and (other < point).any()]
        assert front[index] == (not better)
    assert 0 < front.sum() < len(losses)


def table(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"trial": range(len(columns["status"])), **columns})


@pytest.mark.parametrize(("first", "second"), list(product(("min", "max"), repeat=2)))
def test_a_table_is_marked_in_both_directions(first: str, second: str) -> None:
    rows = table(
        status=["complete"] * 5 + ["pruned", "complete"],
        search_foo=[1.0, 2.0, 3.0, 3.0, 2.0, 0.0, None],
        hvps=pd.array([3, 2, 1, 1, 3, 0, 0], dtype="Int64"),
    )
    Objectives.of(["search_foo", "hvps"], [first, second]).mark(rows)
    expected = {
        ("min", "min"): [0, 1, 2, 3],
        ("min", "max"): [0],
        ("max", "min"): [2, 3],
        ("max", "max"): [2, 3, 4],
    }
    assert list(rows.index[rows["pareto"]]) == expected[first, second]
    assert "feasible" not in rows


def test_the_front_of_a_table_is_of_what_keeps_the_constraints() -> None:
    rows = table(
        status=["complete"] * 4 + ["pruned"],
        search_error=[0.1, 0.2, 0.3, 0.4, 0.0],
        alpha_lambda_max=[2.5, 1.0, 2.0, None, 1.0],
        hvps=[1.0, 2.0, 3.0, 1.0, 1.0],
    )
    Objectives.of(["search_error", "hvps"], None, ["alpha_lambda_max<=2"]).mark(rows)
    assert list(rows["feasible"]) == [False, True, True, False, False]
    assert list(rows["pareto"]) == [False, True, False, False, False]


def test_a_search_of_one_metric_marks_nothing() -> None:
    rows = table(status=["complete"], search_error=[0.1])
    before = list(rows)
    Objectives.of(None, None).mark(rows)
    assert list(rows) == before
