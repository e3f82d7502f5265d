"""What is written in figures: plain text, in every figure that the package draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ift_tune.base.views import HeatMap, Histogram
from ift_tune.compare.findings import Findings
from ift_tune.report import draw_curves, studies
from ift_tune.report.drawing import Drawing, drawing_style, plain_numbers
from ift_tune.report.figures import FIGURES
from ift_tune.report.runs import compose

RESULTS = Path(__file__).parent.parent.parent / "results"
STUDIES = {
    "study-inverse/digits-weight-decay": studies.draw_inverses,
    "study-inverse/diabetes-weight-decay": studies.draw_inverses,
    "study-cost/digits-weight-decay": studies.draw_costs,
    "study-validation": studies.draw_fractions,
}
WIDE = np.geomspace(1e-6, 1e3, 100 * 70).reshape(100, 70)
CELLS = WIDE[:50, :35]
VIEWS: list[HeatMap | Histogram] = [
    HeatMap("decays $x_1$", CELLS, "output", "input", log=True, shape=WIDE.shape),
    HeatMap("narrow", 1.0 + WIDE[:2, :3], log=True),
    Histogram("decays", {"a$b$": WIDE, "c_d": WIDE}, "decay", log=True),
    Histogram("narrow", {"all": np.linspace(2.0, 3.0)}, log=True),
]


def texts_of(figure: Figure) -> list[str]:
    """Return all that is written in a figure, once it is laid out."""
    plain_numbers(figure)
    figure.draw_without_rendering()
    written = [text.get_text() for text in figure.findobj(Text) if text.get_visible()]
    assert any(written)
    return written


def mathematical(texts: list[str]) -> list[str]:
    """Return those that only a renderer of mathematics can show."""
    return [text for text in texts if "\\" in text or "$\\" in text or "^{" in text]


@pytest.mark.parametrize("drawing", FIGURES, ids=lambda drawing: drawing.name)
def test_a_figure_of_the_report(findings_of: Callable[[str], Findings], drawing: Drawing) -> None:
    with drawing_style():
        drawn = drawing.draw(findings_of("whole"))
        assert drawn is not None
        assert mathematical(texts_of(drawn.figure)) == []


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.title)
def test_a_picture_of_hyperparameters(view: HeatMap | Histogram) -> None:
    with drawing_style():
        figure = compose([view])
        written = texts_of(figure)
    assert mathematical(written) == []
    names = [view.title, *(view.values if isinstance(view, Histogram) else [])]
    if isinstance(view, Histogram) and len(view.values) == 1:
        names.pop()  # a single group needs no name
    assert set(names) <= set(written)
    if view.log:  # an axis, or a colour bar, with numbers
        assert sum(text.replace(",", "").replace("e-", "").isdigit() for text in written) > 1


@pytest.mark.parametrize("folder", STUDIES)
def test_a_figure_of_a_study(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {path.stem: pd.read_parquet(path) for path in (RESULTS / folder).glob("*.parquet")}
    found: list[str] = []
    saved = "ift_tune.report.drawing.save_figure"
    monkeypatch.setattr(saved, lambda figure, _: found.extend(texts_of(figure)))
    STUDIES[folder](tables, tmp_path, "costs $5 a_b")
    assert "costs $5 a_b" in found
    assert mathematical(found) == []


def test_the_curves_of_a_run(tmp_path: Path) -> None:
    steps = pd.DataFrame({"step": range(1, 200), "val_loss": np.geomspace(1e-5, 1e5, 199)})
    figure = draw_curves(steps, tmp_path / "curves.svg", title="f1[/macro] $x$")
    with drawing_style():
        written = texts_of(figure)
    assert mathematical(written) == []
    assert {"f1[/macro] $x$", "10", "100"} <= set(written)
    assert "mathdefault" not in (tmp_path / "curves.svg").read_text()


def test_a_map_of_blocks_says_so_and_counts_what_was() -> None:
    with drawing_style():
        figure = compose([VIEWS[0]])
        written = texts_of(figure)
    (axes, _) = figure.axes
    assert axes.get_xlim() == (-0.5, 69.5)
    assert axes.get_ylim() == (99.5, -0.5)
    assert {"output (100 in 50 means)", "input (70 in 35 means)"} <= set(written)


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.svg")), ids=lambda path: path.stem)
def test_the_figures_that_are_kept(path: Path) -> None:
    assert "mathdefault" not in path.read_text()
