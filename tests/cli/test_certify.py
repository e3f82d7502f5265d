"""``ift-tune certify`` finds the task by itself, keeps what it found, and the report shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Call

MODULE = """
from ift_tune.testing.problems import Quadratic


def make(config, device, seed):
    return Quadratic(weights=4, hypers=2, seed=seed)
"""
QUICK = (
    *("--set", "inverse=dense", "--set", "inner_optimizer=momentum"),
    *("--set", "inner_lr=0.2", "--set", "inner_steps=60", "--set", "start_check=false"),
)


@pytest.mark.nightly
def test_a_run_is_certified_and_its_report_says_so(call: Call) -> None:
    Path("certified_by_name.py").write_text(MODULE)
    made = call(
        *("run", "certified_by_name:make", "--outer-steps", "4", "--out", "o", "--quiet"),
        *("--no-baseline", *QUICK),
    )
    assert made.status == 0, made
    ended = call("certify", "o", "--directions", "3", "--json")
    assert ended.status == 0, ended
    found = json.loads(ended.out)
    assert found["verdict"] == "confirmed"
    assert set(found["relations"]["all"]) == {"slope", "r2", "rank"}
    assert {"certificate.parquet", "certificate.csv"} <= {p.name for p in Path("o").iterdir()}
    shown = call("report", "o")
    assert shown.status == 0
    assert "certificate.png" in shown.out
    assert found["sentence"] in shown.out
    assert json.loads(call("report", "o", "--json").out)["certificate"].endswith("confirmed.")


def test_what_is_no_run_is_not_certified(call: Call) -> None:
    assert call("certify", "nowhere").status == 2
    Path("empty").mkdir()
    ended = call("certify", "empty")
    assert ended.status == 2
    assert "holds no run" in ended.err
