"""``ift-tune search`` with several metrics and constraints: what it prints, writes and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import optuna
import pytest
from command_line import Call

from ift_tune import load_results

MODULE = """
from ift_tune.testing.problems import Quadratic


def good(config, device, seed):
    return Quadratic(seed=seed)
"""
COST = "gradient_equivalents"
PLACE = ("search", "problems_here:good", "--device", "cpu", "--outer-steps", "2")
VARY = ("--vary", "inner_steps=1:9", "--vary", "terms=0:3")
SEARCH = (*PLACE, *VARY, "--sampler", "random", "--n-trials")
NEEDS_OPTUNA_5 = pytest.mark.skipif(
    optuna.__version__.startswith("4."), reason="which has constraints of any sampler"
)
BOTH = ("--metric", "search_loss", "--metric", COST)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "problems_here.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "problems_here", raising=False)


def test_the_front_is_printed_written_and_drawn(call: Call) -> None:
    pytest.importorskip("matplotlib")
    ended = call(*SEARCH, "5", *BOTH, "--out", "o")
    assert ended.status == 0
    trials = load_results("o").trials
    front = trials[trials["pareto"]].sort_values("search_loss")
    head, *lines = ended.out.splitlines()
    assert head == (
        f"Pareto front: {len(front)} of 5 trials by search_loss (lower is better), "
        f"{COST} (lower is better)"
    )
    for line, (_, row) in zip(lines, front.iterrows(), strict=False):
        assert line.split()[:4] == ["trial", str(row["trial"]), "search_loss", line.split()[3]]
        assert f"{COST} {row[COST]:.4g}  inner_steps={row['inner_steps']}" in line
    assert f"best by search_loss: trial {front['trial'].iloc[0]}" in ended.out
    assert "figures: o/front.png" in ended.out
    Path("o/front.png").unlink()
    drawn = call("report", "o").out.splitlines()
    assert drawn[:2] == ["o/curves.png", "o/front.png"]
    assert Path("o/front.png").exists()


def test_as_json_it_is_a_list(call: Call) -> None:
    told = json.loads(call(*SEARCH, "3", *BOTH, "--out", "o", "--json").out)
    trials = load_results("o").trials
    assert [point["trial"] for point in told["front"]] == list(
        trials[trials["pareto"]].sort_values("search_loss")["trial"]
    )
    assert set(told["front"][0]) == {"trial", "search_loss", COST, "inner_steps", "terms"}
    assert told["best"]["values"]["search_loss"] == told["front"][0]["search_loss"]


@NEEDS_OPTUNA_5
def test_a_constraint_decides_who_is_the_best(call: Call) -> None:
    ended = call(*SEARCH, "4", "--constraint", "inner_steps_or_so<=3", "--out", "o")
    assert ended.status == 2
    assert "do not measure 'inner_steps_or_so'" in ended.err
    assert not Path("o").exists()
    told = json.loads(
        call(*SEARCH, "4", "--constraint", "gradient_equivalents <= 59", "--out", "o", "--json").out
    )
    trials = load_results("o").trials
    kept = trials[trials[COST] <= 59]
    assert 0 < len(kept) < 4
    assert told["best"]["value"] == kept["search_loss"].min()
    assert "front" not in told


@NEEDS_OPTUNA_5
def test_without_a_trial_that_keeps_it_the_search_has_failed(call: Call) -> None:
    ended = call(*SEARCH, "2", "--constraint", "step<=1", *BOTH, "--out", "o")
    assert ended.status == 1
    assert "no trial keeps step<=1: loosen the bounds" in ended.err
    assert "Pareto front: 0 of 2 trials" in ended.out


@pytest.mark.parametrize(
    ("options", "mend"),
    [
        ((*BOTH, "--mode", "min"), "give 2 in the order of the metrics"),
        ((*BOTH, *BOTH), "optimised once"),
        ((*BOTH, "--pruner", "median"), "--pruner none"),
        (("--metric", COST), "choose a metric from search_loss"),
        ((*BOTH, "--constraint", "hvps<3"), "COLUMN<=NUMBER"),
        ((*BOTH, "--constraint", "hvps<=3", "--constraint", "hvps>=4"), "keep both bounds"),
        ((*BOTH, "--backend", "ray", "--scheduler", "pbt"), "pbt copies what is better by one"),
    ],
)
def test_mistakes_end_with_status_2_and_leave_nothing(
    call: Call, options: tuple[str, ...], mend: str
) -> None:
    ended = call(*PLACE, *VARY, "--n-trials", "2", *options, "--out", "o")
    assert ended.status == 2
    assert mend in ended.err
    assert len(ended.err.splitlines()) == 1
    assert not Path("o").exists()
