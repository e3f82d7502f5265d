"""``ift-tune audit`` finds the task, writes tables and page; the report makes it anew."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from command_line import Call

RUN = ("run", "digits-cleaning", "--outer-steps", "12", "--no-baseline", "--quiet", "--seed", "3")


def test_a_run_is_audited_and_its_page_made_anew(call: Call) -> None:
    assert call(*RUN, "--out", "o").status == 0
    ended = call("audit", "o", "--folds", "0", "--top", "12")
    assert ended.status == 0, ended
    assert "there is one seed" in ended.out.lower()
    assert "page: o/audit/audit.html" in ended.out
    table = pd.read_csv("o/audit/audit.csv")
    assert {"index", "weight", "weight_se", "given_label", "suggested_label"} <= set(table)
    assert table["wrong"].head(100).mean() > 0.9
    before = Path("o/audit/audit.html").read_bytes()
    assert before.count(b"data:image/png") == 12
    Path("o/audit/audit.html").unlink()
    assert "o/audit/audit.html" in call("report", "o").out
    assert Path("o/audit/audit.html").read_bytes() == before
    assert json.loads(call("report", "o", "--json").out)["audit"] == "o/audit/audit.html"
    found = json.loads(call("audit", "o", "--folds", "0", "--out", "p/q", "--json").out)
    assert found["page"] == "p/q/audit.html"
    assert found["rankings"][0]["auc"] > 0.9
    assert Path("p/q/audit.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere",), "no run.json"),
        (("o", "--seeds", "0"), "seeds must be an integer of at least 1"),
        (("o",), "an audit needs a learned weight for each training example"),
    ],
)
def test_what_cannot_be_audited_says_why(call: Call, arguments: tuple[str, ...], text: str) -> None:
    made = call(
        *("run", "digits-weight-decay", "--outer-steps", "1", "--out", "o", "--quiet"),
        *("--no-baseline", "--set", "inner_steps=2"),
    )
    assert made.status == 0, made
    ended = call("audit", *arguments)
    assert ended.status == 2
    assert text in ended.err
    assert ended.err.count("\n") == 1
    assert not Path("o/audit").exists()


def test_the_help_shows_an_example(call: Call) -> None:
    ended = call("audit", "--help")
    assert "ift-tune audit runs/clean --seeds 3" in " ".join(ended.out.split())
