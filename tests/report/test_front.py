"""The front of a search of several metrics is drawn from the table alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ift_tune import UsageError
from ift_tune.base.objectives import Objectives
from ift_tune.report import draw_front

pytest.importorskip("matplotlib")

COST = "gradient_equivalents"


def table(
    metric: Any = ("search_error", COST), mode: Any = None, bounds: Any = (), **more: Any
) -> pd.DataFrame:
    columns: dict[str, Any] = {
        "status": ["complete"] * 5 + ["pruned"],
        "search_error": [0.3, 0.2, 0.1, 0.25, 0.05, 0.0],
        COST: [100.0, 200.0, 300.0, 250.0, 400.0, 1.0],
        "hvps": [3.0, 2.0, 1.0, 9.0, 1.0, 1.0],
    }
    trials = pd.DataFrame({"trial": range(6)} | columns | more)
    objectives = Objectives.of(metric, mode, bounds)
    objectives.mark(trials)
    trials.attrs["run"] = objectives.settings()
    return trials


def points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        dots.get_label(): sorted((float(x), float(y)) for x, y in dots.get_offsets())
        for dots in axes.collections
    }


def lines(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_error_against_cost(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"front.{ending}"
    figure = draw_front(table(bounds=["hvps>=2"]), path, title="toy $x$")
    assert path.stat().st_size > 1000
    (axes,) = figure.axes
    assert points(axes) == {
        "violates a constraint": [(300.0, 0.1), (400.0, 0.05)],
        "dominated": [(250.0, 0.25)],
        "Pareto front": [(100.0, 0.3), (200.0, 0.2)],
    }
    assert [text.get_text() for text in axes.texts] == ["0", "1"]
    assert axes.get_xlabel() == "gradient equivalents (lower is better)"
    assert axes.get_ylabel() == "search error (lower is better)"
    assert lines(axes) == [([100.0, 200.0], [0.3, 0.2])]


def test_the_line_follows_the_directions(tmp_path: Path) -> None:
    trials = table(
        ("search_auc", "hvps"), ("max", "max"), search_auc=[0.9, 0.8, 0.7, 0.1, 0.9, 1.0]
    )
    (axes,) = draw_front(trials, tmp_path / "f.png").axes
    assert sorted(trials.index[trials["pareto"]]) == [0, 3]
    # The less of the other is asked for, the more of the first is left to choose from.
    assert lines(axes) == [([9.0, 3.0], [0.1, 0.9])]
    assert "higher is better" in axes.get_xlabel()


def test_a_panel_for_each_further_metric_and_a_line_of_the_best_there(tmp_path: Path) -> None:
    figure = draw_front(table(("search_error", COST, "hvps")), tmp_path / "f.png")
    assert [axes.get_xlabel().partition(" (")[0] for axes in figure.axes] == [
        "gradient equivalents",
        "hvps",
    ]
    cost, products = figure.axes
    assert len(points(cost)["Pareto front"]) == len(points(products)["Pareto front"]) == 4
    assert lines(cost)[0][1] == [0.3, 0.2, 0.1, 0.05]
    assert lines(products)[0][1][-1] == 0.05


def test_what_has_no_front_is_refused(tmp_path: Path) -> None:
    for wrong in (table("search_error"), pd.DataFrame()):
        with pytest.raises(UsageError, match="a front is of several metrics"):
            draw_front(wrong, tmp_path / "f.png")
    with pytest.raises(UsageError, match="no trial is complete"):
        draw_front(table(status=["pruned"] * 6), tmp_path / "f.png")
    assert not list(tmp_path.iterdir())
