"""What a comparison comes to, from tables whose answers are known by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny_comparisons import Made, comparison, found, outcomes, run, tables

from ift_tune import UsageError, load_results
from ift_tune.compare.findings import find
from ift_tune.compare.pairwise import Reach
from ift_tune.report.figures import FIGURES
from ift_tune.report.words import format_reach
from ift_tune.trial.tables import Results

NAN = math.nan


def test_what_each_search_chose() -> None:
    ift_trials = [
        Made(
            [(10.0, 0.5), (20.0, 0.2), (30.0, 0.4)],
            retrained={1: 0.6},
            at_end=0.3,
            test=0.25,
            val=0.05,
        )
    ]
    random_trials = [
        Made([(10.0, 0.4)], at_end=0.45, test=0.45),
        Made([(10.0, 0.3)], at_end=0.35, test=0.35),
        Made([], cost=5.0),
    ]
    findings = found(
        {("ift", s): ift_trials for s in (0, 1)} | {("random", s): random_trials for s in (0, 1)}
    )
    chosen = findings.chosen[findings.chosen["seed"] == 1].set_index("arm")
    ift, random = chosen.loc["ift"], chosen.loc["random"]
    assert (ift["trial"], ift["step"], ift["search"], ift["retrained"]) == (0, 2, 0.2, 0.3)
    assert (ift["test"], ift["val"], ift["trials"], ift["cost"]) == (0.25, 0.05, 1, 30.0)
    assert (random["trial"], random["step"], random["retrained"]) == (1, 1, 0.35)
    assert (random["trials"], random["cost"], random["seconds"]) == (2, 25.0, 3.0)
    assert pd.isna(random["val"])
    arm = findings.arm("ift")
    assert arm.optimism == pytest.approx(0.1)
    assert arm.val_test_gap == pytest.approx(0.2)
    assert math.isnan(findings.arm("random").val_test_gap)
    assert findings.arm("random").trials == 2
    assert findings.arm("random").cost == 25.0


def test_means_tests_ranks_and_order() -> None:
    findings = found(
        outcomes(
            {
                "random": [0.3, 0.3, 0.4, 0.4],
                "ift": [0.1, 0.2, 0.3, 0.4],
                "tpe": [0.2, 0.2, 0.2, 0.2],
            }
        )
    )
    assert [arm.name for arm in findings.arms] == ["tpe", "ift", "random"]
    assert findings.reference == "ift"
    assert [against.other for against in findings.against] == ["tpe", "random"]
    assert findings.arm("ift").retrained.mean == pytest.approx(0.25)
    # ift, tpe, random by seed: 1 2 3; 1.5 1.5 3; 2 1 3; 2.5 1 2.5
    assert findings.arm("ift").rank == pytest.approx(7.0 / 4.0)
    assert findings.arm("tpe").rank == pytest.approx(5.5 / 4.0)
    assert findings.arm("random").rank == pytest.approx(11.5 / 4.0)
    tpe, random = findings.against
    # random − ift: 0.2 0.1 0.1 0: with the signs of three free, 1 in 4 of all is as extreme
    assert random.test.difference.mean == pytest.approx(0.1)
    assert random.test.p == pytest.approx(0.25)
    assert (random.test.wins, random.test.pairs) == (3, 4)
    # tpe − ift: 0.1 0 −0.1 −0.2: |sum| 0.2 or more of ±1 ±1 ±2: 6 of 8
    assert tpe.test.p == pytest.approx(0.75)
    assert random.p_holm == pytest.approx(0.5)
    assert tpe.p_holm == pytest.approx(0.75)
    assert (findings.metric, findings.measure, findings.limit) == ("search_error", "error", 100.0)


def test_seeds_that_an_arm_lacks_are_left_out_of_pairs_and_ranks() -> None:
    findings = found(
        outcomes({"ift": [0.1, 0.2, 0.3], "random": [0.2, NAN, 0.4], "tpe": [0.5, 0.5, NAN]})
    )
    pairs = {a.other: a.test.pairs for a in findings.against}
    assert pairs == {"random": 2, "tpe": 2}
    assert {arm.name: arm.seeds for arm in findings.arms} == {"ift": 3, "random": 2, "tpe": 2}
    # Only seed 0 has all three.
    assert {arm.name: arm.rank for arm in findings.arms} == {"ift": 1, "random": 2, "tpe": 3}


def test_without_a_common_seed_there_is_no_rank_and_no_pair() -> None:
    findings = found(outcomes({"ift": [0.1, NAN], "random": [NAN, 0.4]}))
    assert all(math.isnan(arm.rank) for arm in findings.arms)
    (random,) = findings.against
    assert (random.test.pairs, random.test.p, random.p_holm) == (0, 1.0, 1.0)
    assert (random.reach.seeds, random.reach.reached) == (0, 0)


def test_a_single_seed_can_be_reported() -> None:
    findings = found(outcomes({"ift": [0.1], "random": [0.3]}))
    (random,) = findings.against
    assert (random.test.pairs, random.test.p, random.p_holm) == (1, 1.0, 1.0)
    assert random.test.difference.mean == pytest.approx(0.2)


def test_searches_that_found_nothing_yet_are_left_out() -> None:
    searches = dict(outcomes({"ift": [0.1, 0.2, 0.3], "random": [0.3, 0.3, NAN]}))
    searches["random", 2] = [Made([], cost=4.0)]
    searches["tpe", 0] = [Made([], cost=0.0)]
    findings = found(searches)
    assert len(findings.chosen) == 5
    assert {arm.name for arm in findings.arms} == {"ift", "random"}


def test_what_failed_is_paid_for_and_has_found_nothing() -> None:
    failed = Made([(40.0, 0.01)], at_end=0.01, cost=50.0, status="failed")
    trials = [Made([(10.0, 0.5)], at_end=0.5), failed, Made([(10.0, 0.4)], at_end=0.4)]
    findings = found({("random", seed): trials for seed in (0, 1)})
    arm = findings.arm("random")
    assert (arm.cost, arm.trials) == (70.0, 2)
    assert set(findings.chosen["search"]) == {0.4}
    curve = arm.search_curve
    assert set(curve.mean[curve.cost < 69.9]) == {0.5}
    assert set(curve.mean[curve.cost > 70.1]) == {0.4}


def test_what_is_drawn_and_said_reads_the_tables_of_the_verdict() -> None:
    sound = Made([(10.0, 0.5)], at_end=0.5), Made([(10.0, 0.4)], at_end=0.4)
    better = [(40.0, 0.01)]
    failed = Made(better, at_end=0.01, status="failed")
    running = Made(better, status="running")
    findings = found({("random", 0): [sound[0], failed, sound[1], running]})
    search = findings.searches["random"]
    assert list(search.measured["best_value"]) == [0.5, 0.4]
    assert list(search.complete["best_value"]) == [0.5, 0.4]
    trials, steps = findings.results
    assert list(trials["status"]) == ["complete", "failed", "complete"]
    assert list(trials["best_value"].dropna()) == [0.5, 0.4]
    assert set(steps["trial"]) == {0, 2}
    drawn = next(figure for figure in FIGURES if figure.name == "history").draw(findings)
    assert drawn is not None
    assert drawn.alt.endswith("random search: 2 trials, best 0.4.")
    # One that was sound alone is no search to look into.
    assert found({("random", 0): [sound[0], failed, running]}).searches == {}


@pytest.mark.parametrize("status", ["failed", "running", "interrupted"])
def test_the_solves_of_a_trial_that_does_not_count_are_not_counted(status: str) -> None:
    results = tables(
        {("ift", 0): [Made([(9.0, 0.1)], status=status), Made([(9.0, 0.2)], at_end=0.2)]}
    )
    results.steps["solve_status"] = ["diverged", "converged"]
    assert list(find(results).outer_steps["ift"]["solve_status"]) == ["converged"]


def test_a_choice_that_could_not_be_retrained_has_no_worth() -> None:
    # The second trial is what the search chose; what the first is worth is another thing.
    broken = [Made([(10.0, 0.5)], at_end=0.11), Made([(10.0, 0.2)])]
    searches = dict(outcomes({"ift": [0.4, 0.4], "random": [NAN, 0.3]}))
    searches["random", 0] = broken
    chosen = found(searches).chosen
    row = chosen[(chosen["arm"] == "random") & (chosen["seed"] == 0)]
    assert row.empty or (row["search"].item(), row["retrained"].item()) != (0.2, 0.11)


def test_the_reference_is_ift_then_ift_with_a_search_then_the_first_asked_for() -> None:
    values = {"random": [0.3, 0.3], "tpe": [0.1, 0.1], "ift+tpe": [0.5, 0.5], "ift": [0.6, 0.6]}
    assert found(outcomes(values)).reference == "ift"
    values.pop("ift")
    assert found(outcomes(values)).reference == "ift+tpe"
    values.pop("ift+tpe")
    assert found(outcomes(values)).reference == "random"  # the data must not choose it


def test_how_much_sooner_the_reference_finds_what_the_other_found() -> None:
    def one(*evaluations: tuple[float, float]) -> list[Made]:
        return [Made(list(evaluations), at_end=0.5)]

    findings = found(
        {
            ("ift", 0): one((10.0, 0.4), (20.0, 0.3)),
            ("random", 0): one((40.0, 0.3), (80.0, 0.35)),  # at 40, ift at 20: twice as soon
            ("ift", 1): one((25.0, 0.2)),
            ("random", 1): one((50.0, 0.5), (100.0, 0.25)),  # at 100, ift at 25: four times
            ("ift", 2): one((10.0, 0.4), (90.0, 0.3)),
            ("random", 2): one((45.0, 0.1)),  # never
            ("random", 3): one((45.0, 0.1)),  # nothing to compare it with
        }
    )
    (random,) = findings.against
    assert (random.reach.ratio, random.reach.reached, random.reach.seeds) == (2.0, 2, 3)


def test_an_other_that_is_reached_in_less_than_half_of_the_seeds() -> None:
    searches = dict(outcomes({"ift": [0.3, 0.3, 0.1], "random": [0.2, 0.2, 0.2]}))
    (random,) = found(searches).against
    assert (random.reach.ratio, random.reach.reached, random.reach.seeds) == (0.0, 1, 3)


@pytest.mark.parametrize(
    ("factors", "ratio"),
    [
        ((10.0, 10.0, 0.0, 0.0), 0.0),
        ((1.0, 1.0, 0.0, 0.0), 0.0),
        ((8.0, 0.0), 0.0),
        ((8.0, 4.0, 0.0), 4.0),
        ((8.0, 4.0, 2.0, 0.0), 3.0),
        ((8.0, 2.0), 5.0),
    ],
)
def test_a_factor_is_the_median_where_more_than_half_of_the_seeds_have_one(
    factors: tuple[float, ...], ratio: float
) -> None:
    """As many times cheaper the reference is, by seed; 0: it does not get there."""
    searches: dict[tuple[str, int], list[Made]] = {}
    for seed, factor in enumerate(factors):
        searches["random", seed] = [Made([(40.0, 0.2)], at_end=0.5)]
        own = (40.0 / factor, 0.1) if factor else (40.0, 0.3)
        searches["ift", seed] = [Made([own], at_end=0.5)]
    (random,) = found(searches).against
    reached = sum(factor > 0.0 for factor in factors)
    assert random.reach == Reach(ratio, reached, len(factors))
    missed = f"not reached in {len(factors) - reached} of {len(factors)} seeds"
    assert (format_reach(random.reach) == missed) == (ratio == 0.0)


def test_curves_hold_the_costs_at_which_every_seed_has_found_something() -> None:
    findings = found(
        {
            ("ift", 0): [Made([(5.0, 0.4), (50.0, 0.2)], retrained={1: 0.5}, at_end=0.3)],
            ("ift", 1): [Made([(20.0, 0.3), (80.0, 0.1)], retrained={1: 0.4}, at_end=0.2)],
        }
    )
    curve = findings.arm("ift").search_curve
    assert 20.0 <= curve.cost[0] < 21.0
    assert curve.cost[-1] == pytest.approx(100.0)
    assert curve.mean[0] == pytest.approx(0.35)
    assert curve.mean[-1] == pytest.approx(0.15)
    between = curve.mean[(curve.cost >= 50.0) & (curve.cost < 80.0)]
    assert between == pytest.approx(np.full(len(between), 0.25))
    assert (curve.low <= curve.mean).all()
    assert (curve.mean <= curve.high).all()
    assert findings.arm("ift").retrained_curve.mean[-1] == pytest.approx(0.25)
    single = found(outcomes({"ift": [0.3]})).arm("ift").search_curve
    assert single.low.tolist() == single.mean.tolist() == single.high.tolist()


def test_budgets_in_seconds() -> None:
    findings = found(
        {("ift", 0): [Made([(0.5, 0.4), (2.5, 0.2)], at_end=0.3)]}, limit=2.0, seconds=True
    )
    assert (findings.cost, findings.limit) == ("wall_seconds", 2.0)
    assert findings.arm("ift").search_curve.cost[-1] == pytest.approx(2.0)
    late = found({("ift", 0): [Made([(2.5, 0.2)], at_end=0.3)]}, limit=2.0, seconds=True)
    assert len(late.arm("ift").search_curve.cost) == 0


def test_a_metric_of_ones_own() -> None:
    results = tables(outcomes({"ift": [0.1, 0.2], "random": [0.3, 0.3]}))
    renamed = Results(*(t.rename(columns=lambda c: c.replace("error", "loss")) for t in results))
    for table, old in zip(renamed, results, strict=True):
        table["search_error"] = NAN
        table.attrs = dict(old.attrs)
    assert find(renamed).measure == "loss"
    for table in renamed:
        table.attrs["run"] |= {"metric": "search_loss"}
        table["search_error"] = 0.5
    assert find(renamed).metric == "search_loss"


def test_tables_that_are_of_no_comparison() -> None:
    results = tables(outcomes({"ift": [0.1]}))
    for wrong in ({}, {"run": {"backend": "optuna"}}):
        other = Results(*(t.copy() for t in results))
        for table in other:
            table.attrs.clear()
            table.attrs.update(wrong)
        with pytest.raises(UsageError, match="not of a comparison"):
            find(other)
    with pytest.raises(UsageError, match="no search has found anything yet"):
        found({("ift", 0): [Made([], cost=0.0)]})


def test_the_order_of_the_rows_does_not_matter() -> None:
    results = tables(outcomes({"ift": [0.1, 0.2], "tpe": [0.2, 0.2], "random": [0.3, 0.1]}))
    shuffled = Results(*(t.sample(frac=1.0, random_state=3) for t in results))
    for table, old in zip(shuffled, results, strict=True):
        table.attrs = dict(old.attrs)
    one, other = find(results), find(shuffled)
    order = ["arm", "seed"]
    pd.testing.assert_frame_equal(
        one.chosen.sort_values(order).reset_index(drop=True),
        other.chosen.sort_values(order).reset_index(drop=True),
    )
    assert [replace(a, reach=a.reach) for a in one.against] == list(other.against)


def test_findings_of_a_real_comparison_from_its_directory_and_its_tables_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("real") / "run"
    results = run(comparison(40.0), out, "ift", "random", "none", seeds=2)
    alone = Results(*(pd.read_parquet(out / f"{name}.parquet") for name in Results._fields))
    found_here = [find(r) for r in (results, load_results(out), alone)]
    for findings in found_here:
        assert findings.limit == 40.0
        assert findings.reference == "ift"
        assert len(findings.chosen) == 6
        assert findings.chosen["cost"].max() <= 40.0 * (1.0 + 1e-12)
        pd.testing.assert_frame_equal(
            findings.chosen, found_here[0].chosen, check_dtype=False, check_exact=True
        )
        assert findings.against == found_here[0].against


def test_a_real_comparison_of_one_seed_can_be_reported(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    out = tmp_path_factory.mktemp("one") / "run"
    findings = find(run(comparison(36.0), out, "ift", "none"))
    assert findings.against[0].test.pairs == 1
