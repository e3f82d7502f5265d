"""Curves are drawn from the steps table alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ift_tune import UsageError, load_results
from ift_tune.base.errors import MissingDependencyError
from ift_tune.report import STYLES, draw_curves
from ift_tune.trial.tables import RunDirectory

pytest.importorskip("matplotlib")


def _steps(
    path: Path, *, trials: int = 1, steps: int = 4, error: bool = True, splits: Any = tuple(STYLES)
) -> pd.DataFrame:
    """Return a steps table as a run writes it; only every second step is evaluated on test."""
    directory = RunDirectory(path, resume=True)
    for trial in range(trials):
        record = directory.trial(trial)
        record.describe({"task": "toy", "trial": trial, "status": "complete"})
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"step": step}
            for split in splits:
                if split != "test" or step % 2 == 0:
                    row[f"{split}_loss"] = (1.0 + trial) / step
                    row |= {f"{split}_error": 0.1 * (1 + trial) / step} if error else {}
            record.append(row)
    return load_results(path).steps


def _lines(figure: Any) -> dict[str, Any]:
    (axes,) = figure.axes
    return {line.get_label(): line for line in axes.lines}


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_line_a_split_and_a_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"curves.{ending}"
    figure = draw_curves(_steps(tmp_path / "run"), path, title="toy")
    assert path.stat().st_size > 1000
    lines = _lines(figure)
    assert set(lines) == {style["label"] for style in STYLES.values()}
    assert list(lines["validation"].get_xdata()) == [1, 2, 3, 4]
    np.testing.assert_allclose(lines["validation"].get_ydata(), [0.1, 0.05, 0.1 / 3, 0.025])
    assert list(lines["test"].get_xdata()) == [2, 4]
    assert figure.axes[0].get_ylabel() == "error"
    assert figure.axes[0].get_title() == "toy"


@pytest.mark.parametrize("splits", [("val",), ("train", "val"), ("train", "val", "test")])
def test_what_is_not_measured_is_not_drawn(tmp_path: Path, splits: tuple[str, ...]) -> None:
    figure = draw_curves(_steps(tmp_path / "run", splits=splits), tmp_path / "c.png")
    assert set(_lines(figure)) == {STYLES[split]["label"] for split in splits}


def test_losses_where_there_is_no_error_or_where_asked(tmp_path: Path) -> None:
    without = _steps(tmp_path / "a", error=False)
    assert draw_curves(without, tmp_path / "c.png").axes[0].get_ylabel() == "loss"
    figure = draw_curves(_steps(tmp_path / "b"), tmp_path / "c.png", kind="loss")
    assert figure.axes[0].get_ylabel() == "loss"
    np.testing.assert_allclose(_lines(figure)["training"].get_ydata(), [1.0, 0.5, 1 / 3, 0.25])


def test_several_trials_are_their_median_and_their_range(tmp_path: Path) -> None:
    figure = draw_curves(_steps(tmp_path / "run", trials=3), tmp_path / "c.png")
    (axes,) = figure.axes
    assert len(axes.lines) == len(STYLES)
    np.testing.assert_allclose(_lines(figure)["training"].get_ydata()[0], 0.2)
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.1 / 4, 0.3))


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_may_be_short(tmp_path: Path, steps: int) -> None:
    figure = draw_curves(_steps(tmp_path / "run", steps=steps), tmp_path / "c.png")
    assert "validation" in _lines(figure)


def test_a_table_with_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    steps = _steps(tmp_path / "run", error=False)
    with pytest.raises(UsageError, match="no error to draw"):
        draw_curves(steps, tmp_path / "c.png", kind="error")
    for nothing in (steps[:0], pd.DataFrame({"step": [1]}), pd.DataFrame()):
        with pytest.raises(UsageError, match="to draw"):
            draw_curves(nothing, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _steps(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'ift_tune\[report\]'"):
        draw_curves(steps, tmp_path / "c.png")
