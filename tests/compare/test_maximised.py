"""A comparison by what is maximised: the mirror image of one by what is minimised."""

from __future__ import annotations

import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny_comparisons import Made, comparison, found, make_clouds, outcomes, run, tables
from torch import Tensor

from ift_tune import UsageError, write_report
from ift_tune.base.direction import Direction
from ift_tune.compare.comparison import search_state
from ift_tune.compare.findings import Findings, find
from ift_tune.compare.verdict import judge
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batch
from ift_tune.trial.tables import Results

_VALUES = ("search_error", "test_error", "val_error", "best_value", "retrained_test_error")


def mirrored(results: Results) -> Results:
    """Return the tables of the same searches, measured by accuracy = 1 − error."""

    def mirror(table: pd.DataFrame) -> pd.DataFrame:
        flipped = {c: 1.0 - table[c] for c in _VALUES if c in table}
        copy = table.assign(**flipped)
        copy.columns = [str(c).replace("_error", "_accuracy") for c in copy]
        copy["search_error"] = math.nan  # columns that tables always have
        copy.attrs["run"] = table.attrs["run"] | {"metric": "search_accuracy", "mode": "max"}
        return copy

    return Results(*map(mirror, results))


def both(searches: Any) -> tuple[Findings, Findings]:
    made = tables(searches)
    return find(made), find(mirrored(made))


def drawn(seed: int, arms: int, seeds: int) -> dict[str, list[float]]:
    """Return errors that float64 and their mirror images hold exactly."""
    source = random.Random(seed)
    names = ["ift", "random", "tpe", "none"][:arms]
    return {name: [source.randint(4, 60) / 64.0 for _ in range(seeds)] for name in names}


@pytest.mark.parametrize("seed", range(4))
def test_order_ranks_tests_and_conclusions_are_those_of_the_mirror_image(seed: int) -> None:
    values = drawn(seed, 4, 7)
    if seed == 3:  # one that is shown
        values["random"] = [value + 0.25 for value in values["ift"]]
    errors, accuracies = both(outcomes(values))
    assert accuracies.direction is Direction.MAX
    assert [arm.name for arm in accuracies.arms] == [arm.name for arm in errors.arms]
    for up, down in zip(accuracies.arms, errors.arms, strict=True):
        assert up.retrained.mean == pytest.approx(1.0 - down.retrained.mean)
        assert up.retrained.low == pytest.approx(1.0 - down.retrained.high)
        assert up.rank == down.rank
        assert up.optimism == pytest.approx(down.optimism)
    for up_pair, down_pair in zip(accuracies.against, errors.against, strict=True):
        assert up_pair.other == down_pair.other
        assert up_pair.test == down_pair.test
        assert up_pair.p_holm == down_pair.p_holm
        assert up_pair.conclusion == down_pair.conclusion
        assert up_pair.reach == down_pair.reach
        assert up_pair.difference.mean == pytest.approx(-down_pair.difference.mean)
        assert up_pair.difference.mean == pytest.approx(up_pair.ours - up_pair.theirs)
    said, usual = (judge(findings).headline for findings in (accuracies, errors))
    assert said.replace("higher in", "lower in").split(":")[0] == usual.split(":")[0]
    assert "higher in" in said


def test_trajectories_gaps_and_reaches_are_those_of_the_mirror_image() -> None:
    ift = Made(
        [(10.0, 0.5), (20.0, 0.25), (30.0, 0.375)], {1: 0.5}, at_end=0.25, test=0.5, val=0.25
    )
    others = [Made([(10.0, 0.375)], at_end=0.5), Made([(10.0, 0.4375)], at_end=0.125)]
    errors, accuracies = both(
        {("ift", s): [ift] for s in (0, 1)} | {("random", s): others for s in (0, 1)}
    )
    keys = ["arm", "seed", "trial", "step", "cost"]
    assert accuracies.chosen[keys].equals(errors.chosen[keys])
    up, down = accuracies.arm("ift"), errors.arm("ift")
    assert (up.val_test_gap, up.optimism) == (down.val_test_gap, down.optimism) == (0.25, 0.0)
    assert list(up.search_curve.mean) == [1.0 - value for value in down.search_curve.mean]
    assert list(up.retrained_curve.mean) == [1.0 - v for v in down.retrained_curve.mean]
    assert accuracies.against[0].reach == errors.against[0].reach


def test_seeds_without_a_finite_value_are_left_out_and_counted() -> None:
    searches = dict(outcomes({"ift": [0.1, 0.2, 0.3], "random": [0.4, 0.5, 0.6]}))
    searches["ift", 1] = [Made([(10.0, 0.2)], at_end=math.nan)]
    searches["random", 2] = [Made([(10.0, 0.2)], at_end=math.inf)]
    findings = found(searches)
    (against,) = findings.against
    assert against.test.pairs == 1
    assert against.test.p == 1.0
    assert (against.we_lack, against.they_lack) == (1, 1)
    assert (findings.arm("ift").seeds, findings.arm("random").seeds) == (2, 2)
    assert all(math.isfinite(arm.retrained.mean) for arm in findings.arms)


def test_a_gap_says_over_how_many_seeds_it_is_the_mean() -> None:
    def made(test: float) -> list[Made]:
        return [Made([(10.0, 0.25)], at_end=0.5, test=test, val=0.25)]

    findings = found(
        {("ift", 0): made(0.5), ("ift", 1): made(math.nan)}
        | {("none", s): made(0.5) for s in (0, 1)}
    )
    assert findings.arm("ift").val_test_gap == 0.25
    assert (findings.arm("ift").gap_seeds, findings.arm("none").gap_seeds) == (1, 2)


def test_the_incumbent_of_a_search_is_its_best_in_the_direction() -> None:
    facts = {n: {"best_value": v, "gradient_equivalents": 1.0} for n, v in enumerate((0.5, 0.75))}
    cost = "gradient_equivalents"
    assert search_state(facts, cost).best == 0.5
    assert search_state(facts, cost, direction=Direction.MAX).best == 0.75
    assert search_state({}, cost, direction=Direction.MAX).best == -math.inf


class Sure(ClassificationProblem):
    """Measures the mean probability of the right class."""

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        probabilities = self.model(batch[0]).softmax(1)
        return {"score": probabilities.gather(1, batch[1][:, None]).mean()}


def test_arms_choose_and_are_retrained_by_what_is_maximised(tmp_path: Path) -> None:
    factory = functools.partial(make_clouds, kind=Sure)
    whole = comparison(60.0, problem_factory=factory, metric="search_score", mode="max")
    results = run(whole, tmp_path / "run", "ift", "random")
    run_json = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run_json["metric"], run_json["mode"]) == ("search_score", "max")
    for (arm, _, trial), rows in results.steps.groupby(["arm", "seed", "trial"]):
        measured = rows.dropna(subset=["search_score"])
        assert list(measured["best_value"]) == list(measured["search_score"].cummax()), arm
        own = results.trials[(results.trials["arm"] == arm) & (results.trials["trial"] == trial)]
        assert own["best_value"].item() == measured["search_score"].max()
    findings = find(results)
    for choice in findings.chosen.itertuples():
        values = results.trials.loc[results.trials["arm"] == choice.arm, "best_value"]
        assert choice.search == values.max()
    page = write_report(tmp_path / "run").read_text()
    assert "Higher is better, but lower ranks." in page
    assert "Lower is better" not in page
    assert "test score after retraining, higher is better" in page
    assert "the search value by which it was chosen minus test score" in page.lower()
    with pytest.raises(UsageError, match="search_score sounds as if higher were better"):
        comparison(60.0, problem_factory=factory, metric="search_score")
