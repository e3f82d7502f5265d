"""Run directories and studies begun by the package of November 2026 go on and are reported.

`old_runs` holds a run, a search and a comparison that were interrupted in the middle, as that
version wrote them, and the tables of the same three undisturbed.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import optuna
import pandas as pd
import pytest

from ift_tune import (
    Budget,
    Comparison,
    Float,
    Int,
    MetaConfig,
    MetaSpace,
    Neumann,
    load_results,
    run_comparison,
    run_study,
    tasks,
    write_report,
)
from ift_tune.trial.session import run_single
from ift_tune.trial.tables import MEASURED_COLUMNS

OLD = Path(__file__).parent / "old_runs"
TASK = tasks.get("diabetes-weight-decay")
CONFIG = MetaConfig(inverse=Neumann(terms=3), meta_lr=0.1, inner_steps=4, inner_lr=0.03)
SPACE = MetaSpace(
    {
        "terms": Int(0, 5),
        "alpha_scale": Float(0.1, 1.5, log=True),
        "meta_lr": Float(0.01, 0.3, log=True),
    }
)
COMPARISON = Comparison(
    TASK.make_problem,
    Budget(gradient_equivalents=200.0),
    task=TASK.name,
    config=CONFIG,
    trial_budget=Budget(outer_steps=6, eval_every=2),
    training_steps=40,
    device="cpu",
)


def _run(out: Path) -> None:
    run_single(
        TASK.make_problem,
        Budget(outer_steps=6),
        out=out,
        task=TASK.name,
        config=CONFIG,
        device="cpu",
        resume=True,
    )


def _search(out: Path) -> None:
    run_study(
        TASK.make_problem,
        SPACE,
        Budget(outer_steps=4),
        n_trials=3,
        out=out,
        task=TASK.name,
        config=CONFIG,
        device="cpu",
        resume=True,
    )


def _compare(out: Path) -> None:
    run_comparison(COMPARISON, out=out, arms=("ift", "random"), seeds=2, resume=True)


def _begun(name: str, folder: Path) -> Path:
    out = folder / name
    shutil.copytree(OLD / name / "begun", out)
    return out


def _as_then(table: pd.DataFrame, name: str, begun: set[str]) -> pd.DataFrame:
    """Return the rows of trials that had begun, or that take no hypergradient."""
    if name == "compare":
        fresh = (table["arm"] == "ift") & (table["seed"] != 0)
        return table[~fresh]
    return table[[f"trial-{number:05}" in begun for number in table["trial"]]]


@pytest.mark.parametrize(
    ("name", "go_on"), [("run", _run), ("search", _search), ("compare", _compare)]
)
def test_what_was_begun_is_resumed_to_the_undisturbed_tables(
    name: str, go_on: Callable[[Path], None], tmp_path: Path
) -> None:
    out = _begun(name, tmp_path)
    begun = {path.relative_to(out).as_posix() for path in out.rglob("trial-*")}
    kept = (out / "trial-00000" / "steps.csv") if name != "compare" else None
    before = kept.read_text() if kept else ""
    go_on(out)
    if kept:  # it went on from the checkpoint, and did not begin again
        now = kept.read_text().splitlines()  # columns that are new come after the old ones
        old = before.splitlines()
        assert all(line.startswith(was) for line, was in zip(now[: len(old)], old, strict=True))
    for found, table in zip(load_results(out), ("trials", "steps"), strict=True):
        found = pd.read_csv(io.StringIO(found.to_csv(index=False)))
        expected = pd.read_csv(OLD / name / "expected" / f"{table}.csv")
        assert set(expected) <= set(found)
        keys = [key for key in ("arm", "seed", "trial", "step") if key in expected]
        # Automatic α is found otherwise by now: what has not begun has other numbers than then.
        found, expected = (_as_then(each, name, begun) for each in (found, expected))
        assert len(expected)
        for column in set(expected) - set(MEASURED_COLUMNS):
            pd.testing.assert_series_equal(
                found.sort_values(keys)[column].reset_index(drop=True),
                expected.sort_values(keys)[column].reset_index(drop=True),
                rtol=1e-4,  # another processor may round otherwise
            )


def test_an_old_comparison_is_reported_as_it_stands(tmp_path: Path) -> None:
    out = _begun("compare", tmp_path)
    page = write_report(out)
    assert "IFT" in page.read_text()
    assert len(load_results(out).trials) == 3


def test_an_old_study_is_a_normal_one(tmp_path: Path) -> None:
    out = _begun("search", tmp_path)
    journal = optuna.storages.journal.JournalFileBackend(str(out / "study.journal"))
    storage = optuna.storages.JournalStorage(journal)
    (summary,) = optuna.get_all_study_summaries(storage)
    states = [
        t.state.name
        for t in optuna.load_study(storage=storage, study_name=summary.study_name).trials
    ]
    assert states == ["COMPLETE", "RUNNING"]
