"""``ift-tune report``, and what ``ift-tune compare`` says in the end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Call

from ift_tune.report import Report
from ift_tune.trial.tables import Results
from report.comparisons import CHANGES, saved


@pytest.fixture
def tables(call: Call, results: Results, tmp_path: Path) -> Path:
    """Return a small comparison, beside which the commands run."""
    return saved(CHANGES["one arm, one seed"](results), tmp_path / "run")


def test_report_names_the_verdict_and_the_files(
    call: Call, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = call("report", "run")
    assert (ended.status, ended.err) == (0, "")
    headline, *paths = ended.out.splitlines()
    assert "alone was run" in headline
    assert paths == ["run/report.html", "run/report.md", "run/figures"]
    assert all((tables.parent / path).exists() for path in paths)
    made = Report(Path(paths[0]), Path(paths[1]), Path(paths[2]), headline)
    monkeypatch.setattr("ift_tune.report.make_report", lambda *_: made)
    assert call("report", "run", "--quiet") == (0, "", "")
    found = json.loads(call("report", "run", "--json").out)
    files = {"report": paths[0], "summary": paths[1]}
    assert found == {"headline": headline, "notes": [], **files}


def test_report_of_nothing_is_a_usage_error_in_one_line(call: Call) -> None:
    ended = call("report", "nowhere")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("ift-tune: nowhere holds no run")
    assert ended.err.count("\n") == 1
    assert not Path("nowhere").exists()


def test_report_without_a_library_says_what_to_install(
    call: Call, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    ended = call("report", "run")
    assert ended.status == 1
    assert ended.err == "ift-tune: a report needs jinja2: pip install 'ift_tune[report]'\n"


COMPARE = (
    *("compare", "digits-weight-decay", "--arms", "random,none", "--seeds", "1", "--out", "found"),
    *("--budget", "20", "--training-steps", "20", "--device", "cpu"),
)


def test_compare_ends_with_the_verdict_and_the_page(call: Call) -> None:
    ended = call(*COMPARE)
    assert ended.status == 0
    *_, headline, limit, page = ended.out.splitlines()
    assert "differ" in headline
    assert limit.startswith("Too few seeds: with 1 pair")
    assert page == "report: found/report.html"
    assert Path("found/report.html").exists()
    found = json.loads(call(*COMPARE, "--resume", "--json").out)
    assert (found["headline"], found["notes"]) == (headline, [limit])
    assert found["report"] == "found/report.html"


def test_compare_without_a_library_keeps_the_tables(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = call(*COMPARE)
    assert ended.status == 0
    assert "no report: a report needs matplotlib: pip install 'ift_tune[report]'" in ended.err
    assert Path("found/trials.parquet").exists()
    assert not Path("found/report.html").exists()
