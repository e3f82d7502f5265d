"""No text in a CSV file is a formula, and each is read back as it was."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ift_tune.base.cells import guarded, unguarded, unguarded_table
from ift_tune.base.files import csv_bytes
from ift_tune.trial.record import TrialRecord

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "'=1", "''-"]
BEGINNINGS = tuple("=+-@\t\r\n＝＋－＠")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_a_mark(text: str) -> None:
    assert guarded(text) == f"'{text}"
    assert unguarded(guarded(text)) == text


@given(st.text() | st.text(alphabet="'=+-@\t\r x"))
def test_every_text_is_read_back_and_none_begins_a_formula(text: str) -> None:
    assert not guarded(text).startswith(BEGINNINGS)
    assert unguarded(guarded(text)) == text


@pytest.mark.parametrize(
    "value", [-1.5, -3, 0, None, True, float("-inf"), "a=b", "it's", "'quoted'"]
)
def test_numbers_and_other_texts_stay_as_they_are(value: object) -> None:
    assert guarded(value) is value


def test_a_table_has_no_formula_in_cells_and_names_and_its_numbers_are_numbers() -> None:
    table = pd.DataFrame(
        {
            "arm": [*FORMULAS, None, "plain"],
            "=name": [-0.5] * 11,
            "-n": range(-5, 6),
            "mixed": [-1, "-1"] * 5 + [None],
        }
    )
    text = csv_bytes(table).decode()
    assert text.startswith("arm,'=name,'-n,mixed\n")
    assert "-0.5,-5,-1" in text
    read = unguarded_table(pd.read_csv(io.StringIO(text, newline=""), lineterminator="\n"))
    assert list(read) == list(table)
    assert read["=name"].tolist() == table["=name"].tolist()
    assert read["arm"].tolist()[:9] == FORMULAS
    assert table["arm"].tolist()[:9] == FORMULAS  # and the table itself is as it was


def test_the_rows_of_a_trial_come_back(tmp_path: Path) -> None:
    record = TrialRecord(tmp_path / "trial-00000")
    rows = [{"step": n, "=f1": -0.25, "said": text} for n, text in enumerate(FORMULAS, start=1)]
    for row in rows:
        record.append(row)
    written = (record.path / "steps.csv").read_text()
    assert written.startswith("step,'=f1,said\n1,-0.25,'=1+1\n")
    for again in (record, TrialRecord(record.path)):
        assert again.columns == ["step", "=f1", "said"]
        assert again.steps().to_dict("records") == rows
    record.append({"step": 10, "=f1": 1.0, "said": "x", "@more": "=2"})
    record.truncate(1)
    assert TrialRecord(record.path).steps()["said"].tolist() == ["=1+1"]
