"""The map of worth: who wins from known numbers, its cells, and that a killed one goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from ift_tune import BilevelProblem, UsageError, load_results, tasks
from ift_tune.base.errors import RunExistsError
from ift_tune.problem.batches import Batches
from ift_tune.studies.worth import QUICK, study_worth
from ift_tune.studies.worth_cells import JOBS, WorthCell, axes_of
from ift_tune.studies.worth_findings import (
    CELL,
    IFT,
    OPEN,
    RIVAL,
    compare_arms,
    find_winners,
    judge_worth,
    middle,
)
from ift_tune.studies.writing import Verdict

NAN = math.nan
DRIFT = (0.0, 0.031, -0.012, 0.007)
"""What the seeds of a made-up cell have in common: paired differences do not see it."""


def cell(
    errors: Mapping[str, Sequence[float]], *, noise: float = 0.5, clean: int = 200, job: str = "tea"
) -> pd.DataFrame:
    """Return the searches of a made-up cell, with these errors by arm, one a seed."""
    place = {"data": "leaves", "job": job, "noise": noise, "clean": clean}
    return pd.DataFrame(
        [
            {**place, "arm": arm, "seed": seed, "retrained": value + DRIFT[seed]}
            for arm, values in errors.items()
            for seed, value in enumerate(values)
        ]
    )


def winner(errors: Mapping[str, Sequence[float]]) -> dict[Any, Any]:
    (found,) = find_winners(compare_arms(cell(errors))).to_dict("records")
    return found


LOW, HIGH = (0.100, 0.101, 0.102, 0.100), (0.120, 0.122, 0.121, 0.123)
WILD = (0.05, 0.30, 0.01, 0.20)
COUNTED = tuple(wrong / 147 for wrong in (30, 28, 35))
ONE_MORE = tuple(wrong / 147 for wrong in (31, 29, 36))


@pytest.mark.parametrize(
    ("errors", "verdict", "winning", "rival"),
    [
        ({"ift": LOW, "val": HIGH, "tpe": (0.2, 0.21, 0.2, 0.21)}, IFT, "ift", "val"),
        ({"ift": HIGH, "val": LOW, "tpe": (0.2, 0.21, 0.2, 0.21)}, RIVAL, "val", "val"),
        # The lowest mean of all is a rival's whose errors are all over the place.
        ({"ift": HIGH, "val": LOW, "tpe": (0.0, 0.3, -0.1, 0.0)}, RIVAL, "tpe", "val"),
        ({"ift": LOW, "val": HIGH, "tpe": WILD}, OPEN, "ift", "val"),
        ({"ift": LOW, "val": LOW}, OPEN, "ift", "val"),
        # Two seeds decide nothing, however far apart.
        ({"ift": LOW[:2], "val": HIGH[:2]}, OPEN, "ift", "val"),
        # Nor do equal differences, which counts of errors often are: how they vary is not known.
        ({"ift": COUNTED, "val": ONE_MORE}, OPEN, "ift", "val"),
        ({"ift": ONE_MORE, "val": COUNTED}, OPEN, "val", "val"),
        # Nor is an arm better that fails on the hard seed.
        ({"ift": (*LOW[:3], NAN), "val": HIGH}, OPEN, "ift", "val"),
        ({"ift": HIGH, "val": (*LOW[:3], NAN)}, OPEN, "val", "val"),
        ({"ift": LOW, "val": (*HIGH[:3], NAN)}, IFT, "ift", "val"),
        ({"ift": LOW, "val": HIGH, "tpe": (NAN,) * 4}, OPEN, "ift", "val"),
        # The first of IFT's arms is the one that the verdict is about, and the others no rivals.
        ({"val": HIGH, "ift": LOW, "ift+val": (0.11, 0.11, 0.111, 0.11)}, IFT, "ift", "val"),
        ({"val": LOW, "ift": (0.05,) * 4, "ift+val": HIGH}, RIVAL, "ift", "val"),
    ],
)
def test_who_wins_a_cell(
    errors: Mapping[str, Sequence[float]], verdict: str, winning: str, rival: str
) -> None:
    found = winner(errors)
    assert (found["verdict"], found["winner"], found["rival"]) == (verdict, winning, rival)


def test_by_how_much_is_the_paired_t_test_with_holms_correction() -> None:
    errors = {"ift+val": LOW, "ift": HIGH, "val": HIGH, "random": (0.14, 0.12, 0.13, 0.15)}
    found = winner(errors)
    differences = np.subtract(HIGH, LOW)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(0.95)
    assert found["reference"] == "ift+val"
    assert found["difference"] == pytest.approx(differences.mean())
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["p_holm"] == pytest.approx(2.0 * test.pvalue)  # the smaller of two
    assert (found["seeds"], found["rivals"]) == (4, 2)
    assert found["reference_error"] == pytest.approx(np.mean(LOW) + np.mean(DRIFT))
    assert found["rival_error"] == pytest.approx(np.mean(HIGH) + np.mean(DRIFT))
    rows = compare_arms(cell(errors)).set_index("arm")
    others = stats.ttest_1samp(np.subtract(errors["random"], LOW), 0.0)
    assert rows["p_holm"]["random"] == pytest.approx(others.pvalue)
    assert rows["p_holm"][["ift+val", "ift"]].isna().all()


def test_one_of_many_rivals_is_not_better_by_chance() -> None:
    near = (0.117, 0.1185, 0.1195, 0.1215)
    assert 0.01 < stats.ttest_rel(near, HIGH).pvalue < 0.05
    assert winner({"ift": HIGH, "val": near})["verdict"] == RIVAL
    others = {name: np.add(HIGH, WILD).tolist() for name in "abcd"}
    assert winner({"ift": HIGH, "val": near, **others})["verdict"] == OPEN


def test_every_arm_of_a_cell_has_a_row_and_its_role() -> None:
    errors = {"tpe": HIGH, "ift": LOW, "ift+tpe": (*LOW[:2], NAN, NAN)}
    rows = compare_arms(cell(errors)).set_index("arm")
    assert dict(rows["role"]) == {"tpe": "rival", "ift": "reference", "ift+tpe": "ift"}
    assert dict(rows["seeds"]) == {"tpe": 4, "ift": 4, "ift+tpe": 2}
    lacking = rows.loc["ift+tpe", ["pairs", "only_it", "only_reference"]]
    assert list(lacking) == [2, 0, 2]
    own = np.add(HIGH, DRIFT)
    assert rows.loc["tpe", "standard_error"] == pytest.approx(own.std(ddof=1) / 2.0)


def test_a_cell_in_which_ift_found_nothing_is_left_out_and_said() -> None:
    # Not decided by the other arm of IFT, which found something.
    searches = cell({"ift+val": (NAN,) * 4, "ift": LOW, "val": HIGH})
    winners = find_winners(compare_arms(searches))
    assert winners.empty
    assert list(winners.columns[:5]) == [*CELL, "verdict"]
    (finding,) = judge_worth(winners, 1)
    assert "In 1 cell of 1" in finding.sentence


def made_map(rows: Sequence[tuple[str, float, int, bool | None]]) -> pd.DataFrame:
    """Return the winners of cells in which IFT is better, worse or (None) neither is shown."""
    sides = {True: (LOW, HIGH), False: (HIGH, LOW), None: (LOW, WILD)}
    parts = [
        cell(dict(zip(("ift", "val"), sides[won], strict=True)), noise=noise, clean=clean, job=job)
        for job, noise, clean, won in rows
    ]
    return find_winners(compare_arms(pd.concat(parts)))


def test_the_whole_map_is_one_sentence_with_its_places() -> None:
    winners = made_map(
        [
            *(("tea", 0.2, 50, None), ("tea", 0.2, 200, True), ("tea", 0.5, 2000, True)),
            *(("ink", 0.2, 50, False), ("ink", 0.2, 200, False)),
        ]
    )
    whole, tea, ink, seen = judge_worth(winners, 5)
    assert str(whole) == (
        "IFT is worth it in 2 of 5 cells (tea 2 of 3, at noise 0.2 to 0.5 with 200 to 2,000 clean "
        "examples), a rival is better in 2, most often val (ink 2 of 2), and neither is shown in 1:"
        " mixed."
    )
    assert tea.sentence.startswith("Tea on leaves: IFT is better at noise 0.2, 200 clean, by 2.1 ")
    assert tea.sentence.endswith(
        "Nothing is shown in 1 of 3 cells, where the lowest mean error is that of ift in 1."
    )
    assert "A rival is better at noise 0.2, 50 clean, by 2.1 points [" in ink.sentence
    reach = stats.t.ppf(0.975, 3) * stats.sem(np.subtract(HIGH, LOW))
    assert f"With 4 seeds the interval of the difference reaches {100 * reach:.1f}" in seen.sentence


@pytest.mark.parametrize(
    ("outcomes", "verdict", "said"),
    [
        ((True, True), Verdict.CONFIRMED, "worth it in 2 of 2 cells (tea 2 of 2)"),
        (
            (False, None),
            Verdict.CONTRADICTED,
            "worth it in none of 2 cells, a rival is better in 1",
        ),
        ((None, None), Verdict.UNDECIDED, "a rival is better in none, and neither is shown in 2"),
    ],
)
def test_the_verdict_of_the_whole_map(
    outcomes: Sequence[bool | None], verdict: Verdict, said: str
) -> None:
    rows = [("tea", 0.2, 50 + i, won) for i, won in enumerate(outcomes)]
    whole = judge_worth(made_map(rows), len(rows))[0]
    assert whole.verdict is verdict
    assert said in whole.sentence


def test_without_its_rivals_ift_is_ahead_and_not_worth_it() -> None:
    winners = made_map([("tea", 0.2, 50, True)])
    whole, *_, missing = judge_worth(winners, 1, ["random+val", "loss-ranking"])
    assert whole.verdict is Verdict.UNDECIDED
    assert whole.sentence.startswith("IFT is ahead of the rivals that were run in 1 of 1 cell")
    assert "random+val and loss-ranking would tell" in missing.sentence


def test_few_seeds_are_said_to_decide_nothing() -> None:
    winners = find_winners(compare_arms(cell({"ift": LOW[:1], "val": HIGH[:1]})))
    sentences = [finding.sentence for finding in judge_worth(winners, 1)]
    assert any(
        "With 1 seed nothing can be shown everywhere: a verdict takes 3" in s for s in sentences
    )


@pytest.mark.parametrize(
    ("values", "inside"),
    [((1, 5, 9), [5]), ((9, 1), [9, 1]), ((4,), [4]), ((0.1, 0.4, 0.2, 0.3), [0.2, 0.3])],
)
def test_what_lies_inside_of_an_axis(values: Sequence[float], inside: Sequence[float]) -> None:
    assert {value for value in values if middle(values, value)} == set(inside)


# Cells


def targets_of(problem: BilevelProblem, split: str) -> Tensor:
    loader = getattr(problem.splits, split)
    assert isinstance(loader, Batches)
    targets: Tensor = loader.tensors[1]
    return targets


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize(("noise", "clean"), [(0.3, 50), (0.0, 170), (1.0, 1000)])
def test_a_cell_has_its_noise_and_its_clean_examples(job: str, noise: float, clean: int) -> None:
    noisy, usual = (WorthCell("digits", job, n, clean).task() for n in (noise, 0.0))
    one, other = (t.make_problem(t.default_config, "cpu", 5) for t in (noisy, usual))
    labels = targets_of(one, "train")
    assert len(targets_of(one, "val")) == clean
    assert len(targets_of(one, "test")) >= 100
    wrong = (labels != targets_of(other, "train")).float().mean()
    assert float(wrong) == pytest.approx(0.9 * noise, abs=0.08)
    for name in ("val", "search", "test"):
        assert torch.equal(targets_of(one, name), targets_of(other, name))
    (_, first, *_) = next(iter(one.splits.train))
    assert len(first) == len(labels)  # whole batches: a step costs 1


@pytest.mark.parametrize("job", JOBS)
def test_a_cell_of_mnist_tests_on_its_own_test_split(job: str, data_root: Path) -> None:
    task = WorthCell("mnist", job, 0.2, 1000).task(data_root)
    problem = task.make_problem(task.default_config, "cpu", 1)
    assert len(targets_of(problem, "val")) == 1000
    assert len(targets_of(problem, "test")) >= 8900


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data": ["digit"]}, "did you mean 'digits'"),
        ({"jobs": ["cleanin"]}, "did you mean 'cleaning'"),
        ({"jobs": []}, "jobs must have at least one entry"),
        ({"data": "digits"}, "data must be a list"),
        ({"noise": [1.5]}, "noise must be a fraction from 0 to 1, got 1.5"),
        ({"noise": [NAN]}, "noise must be a finite number"),
        ({"clean": [0]}, "clean must be an integer of at least 1"),
        ({"clean": [55]}, "must be a multiple of 10, as many of each class, got 55"),
        ({"clean": [1350]}, "must be below 1347, so that some are left for the test, got 1350"),
        ({"arms": ["ift", "iftt"]}, "there is no arm 'iftt'"),
        ({"arms": []}, "name some arms"),
        ({"arms": ["ift", "ift+val"]}, "and a rival that its task is one for"),
        ({"arms": ["val", "tpe"]}, "must hold one of ift\\+val, ift, ift\\+tpe"),
        ({"jobs": ["decay"], "arms": ["ift", "loss-ranking"]}, "a rival that its task is one for"),
        ({"seeds": 0}, "seeds must be"),
        ({"middle_seeds": 0}, "middle_seeds must be"),
        ({"trainings": 0.0}, "trainings must be"),
        ({"training_steps": 0}, "training_steps must be"),
        ({"workers": 0}, "workers must be"),
        ({"first_seed": -1}, "first_seed must be"),
        ({"device": "cpux"}, "unknown device"),
    ],
)
def test_mistakes_are_refused_and_leave_nothing(
    wrong: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        study_worth(tmp_path / "map", **{"data": ["digits"], **wrong})
    assert list(tmp_path.iterdir()) == []


def test_an_axis_has_each_value_once() -> None:
    found = axes_of(["digits"], ["decay"], (0.5, 0, 0.5), (50, 50, 20))
    assert found == {"data": ["digits"], "jobs": ["decay"], "noise": [0.5, 0.0], "clean": [50, 20]}


# The whole study


TINY: dict[str, Any] = {
    "data": ["digits"],
    "jobs": ["imbalance"],
    "noise": [0.5],
    "clean": [50, 60],
    "arms": ["ift", "random", "loss-ranking"],
    "seeds": 1,
    "middle_seeds": 2,
    "trainings": 3,
    "training_steps": 20,
}
MEASURED = ["seconds"]


class Killed(BaseException):
    """Ends everything at once, as a kill does."""


@pytest.mark.nightly
def test_a_killed_map_goes_on_to_the_same_tables(tmp_path: Path) -> None:
    whole = study_worth(tmp_path / "whole", **TINY)

    def kill(line: str) -> None:
        assert line.startswith("1 of 2: digits-imbalance-noise0.5-clean50, open: ift ")
        raise Killed

    with pytest.raises(Killed):
        study_worth(tmp_path / "map", **TINY, on_progress=kill)
    with pytest.raises(RunExistsError):
        study_worth(tmp_path / "map", **TINY)
    first = tmp_path / "map" / "comparisons" / "digits-imbalance-noise0.5-clean50"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("trial-*/*")}
    resumed = study_worth(tmp_path / "map", **TINY, resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in first.rglob("trial-*/*")}
    for name, table in whole.tables.items():
        drop = [c for c in MEASURED if c in table]
        pd.testing.assert_frame_equal(
            table.drop(columns=drop), resumed.tables[name].drop(columns=drop), check_exact=True
        )
    searches = whole.tables["searches"]
    assert len(searches) == 2 * 2 * 2  # cells, the arms that the task is one for, seeds
    trials, _ = load_results(first)
    ends = trials.groupby(["arm", "seed"])["gradient_equivalents"].sum()
    assert (ends <= 60).all()
    said = " ".join(str(finding) for finding in whole.findings)
    assert "IFT is ahead of the rivals that were run in none of 2 cells" in said
    assert "val and random+val would tell" in said


@pytest.mark.nightly
def test_a_map_grows_when_it_is_resumed(tmp_path: Path) -> None:
    small = TINY | {"clean": [50], "arms": ["ift", "val"], "middle_seeds": 1}
    study_worth(tmp_path, **small)
    with pytest.raises(UsageError, match="begun with another trainings"):
        study_worth(tmp_path, **small | {"trainings": 4}, resume=True)
    grown = study_worth(
        tmp_path, **small | {"clean": [60], "arms": None, "seeds": 2}, resume=True
    ).tables["searches"]
    pairs = [(50, "ift"), (50, "val"), (60, "ift"), (60, "val")]
    assert list(grown.groupby(["clean", "arm"]).size().items()) == [(pair, 2) for pair in pairs]
    about = json.loads((tmp_path / "run.json").read_text())
    assert about["extent"]["arms"] == ["ift", "val"]  # without names, those of before
    assert about["extent"]["clean"] == [50, 60]
    assert about["trainings"] == 3.0


def test_the_quick_map_is_made_of_known_arguments() -> None:
    cells = axes_of(QUICK["data"], list(JOBS), QUICK["noise"], QUICK["clean"])
    for job in cells["jobs"]:
        for clean in cells["clean"]:
            assert WorthCell("digits", job, 0.5, clean).task().name in tasks.TASKS
