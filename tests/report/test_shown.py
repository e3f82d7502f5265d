"""Results show themselves, in notebooks and printed: the best, why it ended, where files lie."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from shown_html import NASTY, Page
from small_problems import BUDGET, CONFIG, SPACE, make_tiny

from ift_tune import Budget, load_results, run_single, run_study, write_report
from ift_tune.base.status import Outcome, StopReason
from ift_tune.report.audit import AuditTable
from ift_tune.report.write import make_report
from ift_tune.studies.audit_findings import AUDIT
from ift_tune.trial.tables import Results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def study(home: Path) -> Any:
    """Return a search of seven trials, whose task's name is markup."""
    return run_study(
        make_tiny,
        SPACE,
        BUDGET,
        n_trials=7,
        out=home / "study",
        task=NASTY,
        config=CONFIG,
        device="cpu",
    )


def test_a_search_names_its_best_trial_and_shows_the_first_rows(
    study: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    best, page = study.best, Page(study._repr_html_())
    lines = repr(study).splitlines()
    assert lines[0] == f"Search {NASTY}: 7 trials (7 done)"
    said = f"best: trial {best['trial']}, {best['metric']} {best['value']:.4g} (lower is better)"
    assert lines[1].strip() == said
    assert page.texts[:2] == [lines[0], said]
    rows = [line.split()[0] for line in lines if line.strip()[:1].isdigit()]
    ranked = study.trials.sort_values([best["metric"], "trial"])
    assert rows == [str(number) for number in ranked["trial"].head(5)]
    assert page.links == ["study", "study/trials.parquet", "study/steps.parquet"]
    assert {*SPACE.distributions} <= set(page.texts)
    assert len(study._repr_html_()) < 10_000
    assert (tuple(study), len(study)) == ((study.study, study.trials, study.steps), 3)


def test_its_tables_say_the_same_when_they_are_loaded(study: Any, home: Path) -> None:
    loaded = load_results(home / "study")
    assert repr(loaded) == repr(study)
    assert loaded._repr_html_() == study._repr_html_()
    again = pickle.loads(pickle.dumps(loaded))
    assert (type(again), repr(again)) == (Results, repr(loaded))
    trials, steps = loaded
    assert isinstance(trials, pd.DataFrame)
    assert isinstance(steps, pd.DataFrame)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"status": "pruned", "stop_reason": "diverged"}, "Search {}: 7 trials (7 diverged)"),
        ({"status": "running", "stop_reason": None}, "Search {}: 7 trials (7 running)"),
        ({"diagnoses": "λ hardly moved: raise meta_lr"}, "  beware: λ hardly moved: raise meta_lr"),
    ],
)
def test_what_went_wrong_is_said(changes: dict[str, Any], line: str, study: Any) -> None:
    trials = study.trials.assign(**changes)
    trials.attrs = copy.deepcopy(study.trials.attrs)
    assert line.format(NASTY) in repr(Results(trials, study.steps)).splitlines()
    Page(Results(trials, study.steps)._repr_html_())


def test_a_metric_to_be_raised_and_a_front_are_shown_as_such() -> None:
    trials = pd.DataFrame(
        {
            "trial": range(4),
            "status": "complete",
            "stop_reason": "done",
            "search_auc": [0.5, 0.75, 0.75, 0.9],
            "hvps": [1.0, 9.0, 5.0, 9.0],
            "pareto": [True, False, True, True],
            "feasible": [True, True, True, False],
        }
    )
    trials.attrs["run"] = {
        "task": "toy",
        "backend": "optuna",
        "metric": "search_auc",
        "mode": "max",
        "objectives": [["search_auc", "max"], ["hvps", "min"]],
        "constraints": ["alpha_lambda_max<=2"],
    }
    lines = repr(Results(trials, trials)).splitlines()
    assert "  best: trial 2, search_auc 0.75 (higher is better)" in lines
    front = "Pareto front: 3 trials by search_auc (higher is better), hvps (lower is better)"
    assert f"  {front}" in lines
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == ["2", "1", "0"]


@pytest.mark.parametrize("rows", [0, 1])
def test_tables_with_hardly_anything_in_them_are_shown(rows: int) -> None:
    table = pd.DataFrame({"trial": [0], "status": ["running"], "stop_reason": [None]}).head(rows)
    results = Results(table, table)
    assert repr(results).startswith(f"Search : {rows} trial")
    Page(results._repr_html_())
    Page(Results(pd.DataFrame(), pd.DataFrame())._repr_html_())


def test_a_run_shows_what_it_measured_and_where_it_lies(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    options: dict[str, Any] = {"config": CONFIG, "device": "cpu", "baseline": True}
    outcome = run_single(make_tiny, Budget(outer_steps=2), out="single", **options)
    lines, page = repr(outcome).splitlines(), Page(outcome._repr_html_())
    value = f"{outcome.metric} {outcome.value:.4g} (lower is better)"
    assert lines[0] == f"Run done after 2 outer steps: {value}"
    assert {"retrained test", "baseline test", "error", "loss"} <= set(page.texts)
    assert page.links == ["single", "single/trials.parquet", "single/steps.parquet"]
    assert f"{outcome.metrics['baseline_test_error']:.4g}" in page.texts
    again = run_single(make_tiny, Budget(outer_steps=2), out="single", resume=True, **options)
    assert repr(again) == repr(outcome)


def test_a_run_without_a_value_says_why_it_ended() -> None:
    outcome = Outcome(
        StopReason.NONFINITE, None, "search_loss", {"step": 1, f"search_{NASTY}": 1.0}
    )
    assert repr(outcome).splitlines()[0] == "Run nonfinite after 1 outer step"
    assert NASTY in Page(outcome._repr_html_()).texts


@pytest.fixture(scope="module")
def comparison(home: Path) -> Path:
    """Return a folder with the tables of a comparison, made by hand."""
    errors = {"ift": [0.10, 0.12, 0.11], "random": [0.20, 0.19, 0.22]}
    table = pd.DataFrame(
        {
            "arm": arm,
            "seed": seed,
            "trial": 0,
            "step": 1,
            "status": "complete",
            "gradient_equivalents": 100.0,
            "wall_seconds": 1.0,
            "best_value": error,
            "best_step": 1,
            "search_error": error,
            "test_error": error,
            "retrained_test_error": error,
        }
        for arm, found in errors.items()
        for seed, error in enumerate(found)
    )
    table.attrs["run"] = {
        "task": NASTY,
        "backend": "compare",
        "metric": None,
        "budget": {"gradient_equivalents": 100.0, "seconds": None},
        "extent": {"arms": list(errors), "seeds": [0, 1, 2]},
    }
    folder = home / "compared"
    folder.mkdir()
    for name in ("trials", "steps"):
        table.to_parquet(folder / f"{name}.parquet")
    return folder


def test_a_comparison_shows_its_arms(comparison: Path) -> None:
    results = load_results(comparison)
    lines = repr(results).splitlines()
    assert lines[0] == f"Comparison {NASTY}: 6 trials"
    assert ["ift", "3", "3", "300"] in [line.split() for line in lines]
    assert NASTY in "".join(Page(results._repr_html_()).texts)


def test_a_report_shows_its_verdict_and_a_figure_and_is_the_path_of_its_page(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(comparison.parent)
    page = write_report("compared")
    assert isinstance(page, Path)
    assert page == Path("compared/report.html")
    assert page.read_text().startswith("<!")
    assert type(page.with_suffix(".md").read_text()) is str
    report = make_report("compared")
    shown = Page(page._repr_html_() or "")
    assert shown.texts[0] == report.headline
    pictures = [link for link in shown.links if link.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 1
    assert "compared/report.html" in shown.links
    assert repr(report).splitlines()[0] == report.headline
    assert report._repr_html_() == page._repr_html_()
    for derived in (page.parent, page / "x", pickle.loads(pickle.dumps(page))):
        show = getattr(derived, "_repr_html_", lambda: None)
        assert show() is None


def test_an_audit_shows_what_its_page_says_and_stays_a_table(tmp_path: Path) -> None:
    table = AuditTable({"given_label": [NASTY] * 30, "flagged": np.arange(30) < 3})
    table.attrs[AUDIT] = {"sentences": [NASTY]}
    table.folder = tmp_path
    (tmp_path / "audit.html").touch()
    html = table._repr_html_()
    assert "<script>" not in html
    assert "3 of 30 training labels are suspect." in html
    assert "audit.html" in html
    assert "30 rows" in html
    assert isinstance(table, pd.DataFrame)
    for part in (table.head(2), table[["flagged"]], table.copy(), table.sort_values("flagged")):
        assert type(part) is pd.DataFrame
        assert part.attrs == table.attrs
    again = pickle.loads(pickle.dumps(table))
    assert (type(again), again.folder, again.attrs) == (AuditTable, tmp_path, table.attrs)
    pd.testing.assert_frame_equal(again, table)


def test_nothing_of_it_needs_ipython() -> None:
    code = (
        "import sys; sys.modules['IPython'] = None\n"
        "from ift_tune import Progress\n"
        "from ift_tune.base.status import Outcome, StopReason\n"
        "outcome = Outcome(StopReason.DONE, 0.5, 'search_loss', {})\n"
        "Progress().on_resources('hello')\n"
        "print(outcome, outcome._repr_html_())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Run done: search_loss 0.5 (lower is better) <div")
    assert "hello" not in done.stdout + done.stderr
