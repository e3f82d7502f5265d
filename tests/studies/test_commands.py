"""``ift-tune study-...``: what it writes, and when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from command_line import Call

pytest.importorskip("matplotlib")

MODULE = """
from ift_tune.testing import Quadratic
from ift_tune.testing.problems import sized_problem


def good(config, device, seed):
    return Quadratic(seed=seed)


def net(config, device, seed):
    return sized_problem(8, "weight", device, seed)
"""


@pytest.fixture(autouse=True)
def _module_of_problems(tmp_path: Path) -> None:
    (tmp_path / "studied_problems.py").write_text(MODULE)


def _files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_study_inverse(call: Call) -> None:
    command = ("study-inverse", "studied_problems:good", "--terms", "0,1,6", "--out", "out")
    assert call(*command, "--cosine", "2").status == 2
    ended = call(*command)  # a mistake has left nothing in the way
    assert ended.status == 0
    said = ended.out
    assert "the cheapest method above cosine 0.9 is" in said
    assert {"inverse.csv", "inverse.parquet", "inverse.png", "inverse.svg", "README.md"} <= _files(
        "out"
    )
    readme = Path("out/README.md").read_text()
    assert all(line in readme for line in said.splitlines()[:-1])
    assert "](inverse.png)" in readme
    assert set(pd.read_csv("out/inverse.csv")["steps"]) == {0, 1, 6}
    assert json.loads(Path("out/run.json").read_text())["terms"] == [0, 1, 6]
    again = call(*command)  # the directory holds a study already
    assert again.status == 2
    assert "already holds files" in again.err


def test_study_cost_as_json(call: Call) -> None:
    ended = call(
        *("study-cost", "studied_problems:net", "--inner-steps", "1,2", "--terms", "0,1"),
        *("--widths", "8,16", "--repeats", "1", "--device", "cpu", "--json"),
        *("--set", "inner_steps=2", "--set", "terms=1"),
    )
    assert ended.status == 0
    found = json.loads(ended.out)
    assert {"claim", "verdict", "sentence"} == set(found["findings"][0])
    assert {"cost.csv", "cost.png", "cost.svg", "README.md"} <= _files(found["out"])


def test_study_validation(call: Call) -> None:
    ended = call(
        *("study-validation", "--totals", "30", "--fractions", "0.1,0.5", "--seeds", "1"),
        *("--outer-steps", "1", "--out", "out", "--quiet"),
    )
    assert ended == (0, "", "")
    assert {"validation.csv", "means.csv", "validation.png", "README.md"} <= _files("out")


WORTH = (
    *("study-worth", "--quick", "--jobs", "imbalance", "--clean", "50", "--arms", "ift,val"),
    *("--seeds", "1", "--middle-seeds", "1", "--trainings", "3", "--training-steps", "20"),
    *("--out", "out"),
)


@pytest.mark.nightly
def test_study_worth_and_its_resumption(call: Call) -> None:
    ended = call(*WORTH)
    assert ended.status == 0
    assert "1 of 1: digits-imbalance-noise0.5-clean50, open: ift " in ended.err
    assert "a verdict takes 3" in ended.out
    names = ("worth", "arms", "searches")
    tables = {f"{name}.{ending}" for name in names for ending in ("csv", "parquet")}
    assert {"README.md", "run.json", "worth.png", "worth.svg", *tables} <= _files("out")
    assert "](worth.png)" in Path("out/README.md").read_text()
    assert json.loads(Path("out/run.json").read_text())["extent"]["clean"] == [50]
    assert call(*WORTH).status == 2
    before = pd.read_parquet("out/searches.parquet")
    again = call(*WORTH, "--resume", "--json")
    assert again.status == 0
    assert {finding["claim"] for finding in json.loads(again.out)["findings"]} > {"IFT is worth it"}
    pd.testing.assert_frame_equal(before, pd.read_parquet("out/searches.parquet"))
    assert call("report", "out/comparisons/digits-imbalance-noise0.5-clean50").status == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("study-inverse", "studied_problems:good", "--terms", "1,x"),
        ("study-inverse", "studied_problems:good", "--cosine", "2"),
        ("study-cost", "studied_problems:nothing"),
        ("study-validation", "--fractions", "a"),
        ("study-validation", "--fractions", "1.5"),
    ],
)
def test_mistakes_are_usage_errors(arguments: tuple[str, ...], call: Call) -> None:
    assert call(*arguments).status == 2
