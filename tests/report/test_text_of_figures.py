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
    "study-worth": studies.draw_worth,
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


def worth_map() -> pd.DataFrame:
    """Return a map of three verdicts, one of them without an interval."""
    verdicts = ("ift", "rival", "open", "open")
    margins = [(0.021, 0.01, 0.03), (-0.0141, -0.02, -0.01), (-0.0002, -0.01, 0.01)]
    margins.append((0.004, -np.inf, np.inf))
    return pd.DataFrame(
        {
            "data": "leaves",
            "job": ["tea", "tea", "tea", "a$b_c$"],
            "noise": [0.2, 0.2, 0.5, 0.5],
            "clean": [50, 2000, 2000, 50],
            "verdict": verdicts,
            "winner": ["ift", "ift", "tpe", "val"],
            "rival": ["val", "random+val", "tpe", "val"],
            **dict(zip(("difference", "low", "high"), zip(*margins, strict=True), strict=True)),
        }
    )


def test_a_map_of_worth_is_read_without_its_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    widths: list[float] = []
    sizes: list[float] = []
    saved = "ift_tune.report.drawing.save_figure"

    def keep(figure: Figure, _: Path) -> None:
        found.extend(texts_of(figure))
        widths.append(figure.get_figwidth())
        sizes.extend(float(text.get_fontsize()) for text in figure.findobj(Text) if text.get_text())

    monkeypatch.setattr(saved, keep)
    studies.draw_worth({"worth": worth_map()}, tmp_path, "costs $5 a_b")
    assert mathematical(found) == []
    letters = {"I  ift", "R  random+val", "?  tpe", "?  val"}
    margins = {"+2.1\n[+1.0, +3.0]", "-1.4\n[-2.0, -1.0]", "0.0\n[-1.0, +1.0]", "+0.4\n[?, ?]"}
    places = {"tea on leaves", "a$b_c$ on leaves", "0.2", "0.5", "50", "2,000", "costs $5 a_b"}
    assert letters | margins | places <= set(found)
    assert max(widths) <= 4.7  # inches: a phone's width
    assert min(sizes) >= 7.0  # points


def test_the_cells_of_a_map_lie_where_their_axes_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    saved = "ift_tune.report.drawing.save_figure"
    monkeypatch.setattr(saved, lambda figure, _: drawn.append(figure))
    studies.draw_worth({"worth": worth_map()}, tmp_path, "a map")
    axes = drawn[0].axes[0]
    clean, noise = (
        {text.get_text(): place for text, place in zip(labels, ticks, strict=True)}
        for labels, ticks in (
            (axes.get_xticklabels(), axes.get_xticks()),
            (axes.get_yticklabels(), axes.get_yticks()),
        )
    )
    names = {t.get_text(): t.get_position() for t in axes.texts}
    for name, (column, row) in {
        "I  ift": ("50", "0.2"),
        "R  random+val": ("2,000", "0.2"),
        "?  tpe": ("2,000", "0.5"),
    }.items():
        across, up = names[name]
        assert across == clean[column]
        assert abs(up - noise[row]) < 0.5
    assert len({patch.get_facecolor() for patch in axes.patches}) == 3
    # What is open has a tone of the side that is ahead.
    assert axes.patches[2].get_facecolor() != drawn[0].axes[1].patches[0].get_facecolor()
    assert len({patch.get_linestyle() for patch in axes.patches}) == 3


def test_a_map_without_a_cell_is_not_drawn(tmp_path: Path) -> None:
    assert studies.draw_worth({"worth": worth_map()[:0]}, tmp_path, "a map") == []
    assert list(tmp_path.iterdir()) == []


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
