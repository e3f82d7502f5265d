"""The validation-size study: how it divides, and what it concludes."""

from __future__ import annotations

import pandas as pd
import pytest

from ift_tune import UsageError
from ift_tune.studies.findings import EACH, NONE, ONE, judge_fractions
from ift_tune.studies.validation_size import digits_pool, study_validation_sizes, validation_points
from ift_tune.studies.writing import Finding, Verdict


@pytest.mark.parametrize(
    ("total", "fraction", "points"),
    [(100, 0.05, 5), (100, 0.9, 90), (200, 0.25, 50), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1)],
)
def test_each_side_has_its_points(total: int, fraction: float, points: int) -> None:
    assert validation_points(total, fraction) == points


def test_the_test_set_is_the_rest() -> None:
    pool = digits_pool(800, seed=0)
    assert len(pool.points[0]) == len(pool.points[1]) == 800
    assert len(pool.test[0]) == 1797 - 800
    assert 0.0 <= float(pool.points[0].min()) < float(pool.points[0].max()) <= 1.0


def test_too_many_points_are_refused() -> None:
    with pytest.raises(UsageError, match="leave none"):
        digits_pool(1797, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"totals": (1,)}, {"fractions": (1.0,)}, {"fractions": ()}, {"seeds": 0}]
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        study_validation_sizes(**wrong)  # type: ignore[arg-type]


def test_a_row_a_training_and_a_mean_over_seeds() -> None:
    study = study_validation_sizes(totals=(40,), fractions=(0.1, 0.5), seeds=2, outer_steps=3)
    rows, means = study.tables["validation"], study.tables["means"]
    assert len(rows) == 2 * 2 * 3
    assert sorted(rows["val"].unique()) == [4, 20]
    assert len(means) == 2 * 3
    untuned = rows[rows["tuned"] == NONE]
    assert (untuned["mean_decay"] - 1e-3).abs().max() < 1e-9
    assert (untuned["tuned_test_error"] == untuned["retrained_train_test_error"]).all()
    # Trained on all points without tuning, the fraction makes no difference.
    assert untuned.groupby("seed")["retrained_all_test_error"].nunique().eq(1).all()
    assert (rows[rows["tuned"] != NONE]["mean_decay"] - 1e-3).abs().min() > 1e-9


def _judge(one: dict[float, float], each: dict[float, float]) -> dict[str, Finding]:
    """Return the findings of made-up errors by fraction, three seeds with a little noise."""
    rows = [
        {
            "seed": seed,
            "total": 100,
            "fraction": fraction,
            "tuned": tuned,
            "retrained_train_test_error": error + 0.1,
            "retrained_all_test_error": error + 0.01 * seed + 0.0001 * seed * fraction,
        }
        for tuned, errors in ((NONE, dict.fromkeys(one, 0.5)), (ONE, one), (EACH, each))
        for fraction, error in errors.items()
        for seed in range(3)
    ]
    return {finding.claim: finding for finding in judge_fractions(pd.DataFrame(rows))}


def test_what_the_paper_found_can_be_confirmed() -> None:
    found = _judge({0.1: 0.2, 0.25: 0.3, 0.75: 0.4}, {0.1: 0.3, 0.25: 0.1, 0.75: 0.2})
    assert found["100 points, one: best fraction"].verdict is Verdict.CONFIRMED
    assert found["100 points, each: best fraction"].verdict is Verdict.CONFIRMED
    assert found["100 points, each: tuning pays"].verdict is Verdict.CONFIRMED
    more = found["100 points: many hyperparameters want more validation points"]
    assert more.verdict is Verdict.CONFIRMED
    assert "25 % for validation is best" in found["100 points, each: best fraction"].sentence


def test_and_contradicted() -> None:
    found = _judge({0.1: 0.6, 0.25: 0.5, 0.75: 0.4}, {0.1: 0.1, 0.25: 0.6, 0.75: 0.7})
    assert found["100 points, one: best fraction"].verdict is Verdict.CONTRADICTED
    assert found["100 points, each: best fraction"].verdict is Verdict.CONTRADICTED
    assert found["100 points, each: tuning pays"].verdict is Verdict.CONTRADICTED
    more = found["100 points: many hyperparameters want more validation points"]
    assert more.verdict is Verdict.CONTRADICTED


def test_one_seed_decides_nothing() -> None:
    study = study_validation_sizes(totals=(30,), fractions=(0.1, 0.5), seeds=1, outer_steps=1)
    verdicts = {f.claim: f.verdict for f in study.findings}
    assert verdicts["30 points, one: best fraction"] is Verdict.UNDECIDED
    assert verdicts["30 points, each: tuning pays"] is Verdict.UNDECIDED
