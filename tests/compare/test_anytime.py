"""What a search had found at each cost, from tables whose answers are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tiny_comparisons import Made, comparison, of_cell, run, tables

from ift_tune.compare.pairwise import POINTS, Trajectory, grid, sampled, trajectory
from ift_tune.trial.tables import Results

COLUMNS = ("gradient_equivalents", "retrained_test_error")


def course_of(*trials: Made, seconds: bool = False) -> Trajectory | None:
    results = tables({("a", 0): trials}, seconds=seconds)
    cost = "wall_seconds" if seconds else COLUMNS[0]
    return trajectory(*results, cost, COLUMNS[1])


def known(*trials: Made, seconds: bool = False) -> Trajectory:
    found = course_of(*trials, seconds=seconds)
    assert found is not None
    return found


def test_costs_of_later_trials_begin_where_the_earlier_ended() -> None:
    found = known(
        # The first ends at 25: its last step, which broke, cost 5 and has no row.
        Made([(10.0, 0.5), (20.0, 0.4)], retrained={1: 0.6}, at_end=0.55, cost=25.0),
        Made([(10.0, 0.45), (30.0, 0.3)], at_end=0.35),
        Made([(5.0, 0.35)]),
    )
    assert found.cost.tolist() == [10.0, 20.0, 35.0, 55.0, 60.0]
    assert found.search.tolist() == [0.5, 0.4, 0.4, 0.3, 0.3]
    assert found.retrained_cost.tolist() == [10.0, 25.0, 55.0]
    assert found.retrained.tolist() == [0.6, 0.55, 0.35]
    assert found.total == 60.0


def test_a_trial_that_found_nothing_costs_what_it_cost() -> None:
    found = known(
        Made([], cost=7.0),
        Made([(10.0, 0.5)], at_end=0.6),
        Made([], cost=3.0),
        Made([(10.0, 0.4)], at_end=0.5),
        Made([], cost=0.0),  # nothing was left for it
    )
    assert found.cost.tolist() == [17.0, 30.0]
    assert found.retrained_cost.tolist() == [17.0, 30.0]
    assert found.retrained.tolist() == [0.6, 0.5]
    assert found.total == 30.0


def test_a_search_that_found_nothing_has_no_course() -> None:
    first = Made([(10.0, math.nan)])
    results = tables({("a", 0): [first], ("b", 0): [Made([(1.0, 0.5)], at_end=0.5)]})
    assert trajectory(of_cell(results.trials, "a"), of_cell(results.steps, "a"), *COLUMNS) is None
    assert course_of(Made([], cost=4.0)) is None


def test_what_is_worse_than_the_search_so_far_changes_nothing() -> None:
    found = known(
        Made([(10.0, 0.3)], at_end=0.4),
        Made([(10.0, 0.5)], at_end=0.1),  # better on test, but nobody would have chosen it
        Made([(10.0, 0.3)], at_end=0.2),  # as good: the earlier one stays
    )
    assert found.retrained.tolist() == [0.4]
    assert found.search.tolist() == [0.3, 0.3, 0.3]


def test_a_best_moment_that_is_retrained_only_at_the_end_counts_from_there() -> None:
    moments = [(10.0, 0.5), (20.0, 0.4), (30.0, 0.3), (40.0, 0.35)]
    found = known(Made(moments, retrained={1: 0.6, 2: 0.5}, at_end=0.45))
    assert found.retrained_cost.tolist() == [10.0, 20.0, 40.0]
    assert found.retrained.tolist() == [0.6, 0.5, 0.45]
    # What was retrained on the way is not retrained again.
    again = known(Made(moments, retrained={1: 0.6, 3: 0.45}))
    assert again.retrained_cost.tolist() == [10.0, 30.0]
    assert again.retrained.tolist() == [0.6, 0.45]


def test_seconds_are_added_up_too() -> None:
    found = known(
        Made([(0.5, 0.4)], at_end=0.5, cost=1.0), Made([(0.25, 0.3)], at_end=0.4), seconds=True
    )
    assert found.cost.tolist() == [0.5, 1.25]


def test_rows_in_any_order_give_the_same_course() -> None:
    trials = [
        Made([(10.0, 0.5), (20.0, 0.4)], retrained={1: 0.6}, at_end=0.55),
        Made([(10.0, 0.45), (30.0, 0.3)], at_end=0.35),
    ]
    results = tables({("a", 0): trials})
    shuffled = Results(*(t.sample(frac=1.0, random_state=1) for t in results))
    one, other = (trajectory(*r, *COLUMNS) for r in (results, shuffled))
    assert one is not None
    assert other is not None
    for name in ("cost", "search", "retrained_cost", "retrained"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


def test_the_cost_to_reach_a_value() -> None:
    found = known(Made([(10.0, 0.5), (20.0, 0.4), (30.0, 0.45)], at_end=0.4))
    assert found.first_reaching(0.6) == 10.0
    assert found.first_reaching(0.5) == 10.0
    assert found.first_reaching(0.49) == 20.0
    assert found.first_reaching(0.4) == 20.0
    assert math.isnan(found.first_reaching(0.39))


def test_sampling_takes_the_latest_and_nothing_before_the_first() -> None:
    at = np.array([1.0, 10.0, 15.0, 20.0, 99.0])
    values = sampled(at, np.array([10.0, 20.0]), np.array([0.5, 0.4]))
    assert np.isnan(values[0])
    assert values[1:].tolist() == [0.5, 0.5, 0.4, 0.4]
    assert np.isnan(sampled(at, np.array([]), np.array([]))).all()


def test_the_grid_reaches_from_the_first_find_to_the_budget() -> None:
    trajectories = [known(Made([(first, 0.5)], at_end=0.5)) for first in (8.0, 2.0)]
    at = grid(trajectories, 32.0)
    assert len(at) == POINTS
    assert at[0] == pytest.approx(2.0)
    assert at[-1] == pytest.approx(32.0)
    assert np.diff(np.log(at)) == pytest.approx([math.log(16.0) / (POINTS - 1)] * (POINTS - 1))
    late = grid([known(Made([(50.0, 0.5)], at_end=0.5))], 32.0)  # a step that overran its seconds
    assert late == pytest.approx([32.0] * POINTS)


def test_courses_of_a_real_search(tmp_path_factory: pytest.TempPathFactory) -> None:
    results = run(comparison(70.0), tmp_path_factory.mktemp("real") / "run", "ift", "random")
    for arm in ("ift", "random"):
        own, rows = (of_cell(table, arm) for table in results)
        found = trajectory(own, rows, "gradient_equivalents", "retrained_test_loss")
        assert found is not None
        assert (np.diff(found.cost) > 0.0).all()
        assert (np.diff(found.search) <= 0.0).all()
        assert found.search[-1] == own["best_value"].min()
        assert found.cost[-1] <= found.total <= 70.0
        winner = own.sort_values(["best_value", "trial"]).iloc[0]
        assert found.retrained[-1] == winner["retrained_test_loss"]
        assert set(found.retrained_cost) <= {*found.cost, *own["gradient_equivalents"].cumsum()}
