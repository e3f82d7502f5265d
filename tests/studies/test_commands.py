"""``ift-tune study-...``: what it writes, and when it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from ift_tune import cli

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
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "studied_problems.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ift-tune", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def _files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_study_inverse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("study-inverse", "studied_problems:good", "--terms", "0,1,6", "--out", "out")
    assert _call(monkeypatch, *command) == 0
    said = capsys.readouterr().out
    assert "the cheapest method above cosine 0.9 is" in said
    assert {"inverse.csv", "inverse.parquet", "inverse.png", "inverse.svg", "README.md"} <= _files(
        "out"
    )
    readme = Path("out/README.md").read_text()
    assert all(line in readme for line in said.splitlines()[:-1])
    assert "](inverse.png)" in readme
    assert set(pd.read_csv("out/inverse.csv")["steps"]) == {0, 1, 6}
    assert json.loads(Path("out/run.json").read_text())["terms"] == [0, 1, 6]
    assert _call(monkeypatch, *command) == 2  # the directory holds a study already
    assert "already holds files" in capsys.readouterr().err


def test_study_cost_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = _call(
        monkeypatch,
        *("study-cost", "studied_problems:net", "--inner-steps", "1,2", "--terms", "0,1"),
        *("--widths", "8,16", "--repeats", "1", "--device", "cpu", "--json"),
        *("--set", "inner_steps=2", "--set", "terms=1"),
    )
    assert status == 0
    found = json.loads(capsys.readouterr().out)
    assert {"claim", "verdict", "sentence"} == set(found["findings"][0])
    assert {"cost.csv", "cost.png", "cost.svg", "README.md"} <= _files(found["out"])


def test_study_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _call(
        monkeypatch,
        *("study-validation", "--totals", "30", "--fractions", "0.1,0.5", "--seeds", "1"),
        *("--outer-steps", "1", "--out", "out", "--quiet"),
    )
    assert status == 0
    assert {"validation.csv", "means.csv", "validation.png", "README.md"} <= _files("out")


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
def test_mistakes_are_usage_errors(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _call(monkeypatch, *arguments) == 2
