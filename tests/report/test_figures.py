"""Every figure of the registry: drawn where there is something to draw, and truly described."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from ift_tune.base.status import COARSE_PREFIX
from ift_tune.compare.findings import Findings, setting_columns
from ift_tune.joint.config import MetaConfig
from ift_tune.report import make_report
from ift_tune.report.drawing import SECTIONS, Drawn, drawing_style
from ift_tune.report.figures import FIGURES
from ift_tune.report.words import arm_label, format_number, format_share
from ift_tune.trial.tables import Results
from report.comparisons import CHANGES, saved

FindingsOf: TypeAlias = Callable[[str], Findings]
DrawnOf: TypeAlias = Callable[[str], dict[str, Drawn]]
NUMBER = re.compile(r"< 1 %|−?(?:∞|\d+(?:\.\d+)?(?:e[+−]\d+)?)(?: %)?")


def shown(figure: Figure) -> list[str]:
    """Return the words in a figure, the longest first."""
    texts = {text.get_text() for text in figure.findobj(Text) if isinstance(text, Text)}
    return sorted((t for t in texts if re.search(r"[^\W\d]", t)), key=len, reverse=True)


def numbers(alt: str, figure: Figure) -> list[str]:
    """Return the numbers that a description gives, without those that are part of a name."""
    for name in shown(figure):
        alt = alt.replace(name, "")
    return NUMBER.findall(alt)


def aggregates(table: pd.DataFrame) -> Iterator[float]:
    """Yield what can be said of the columns of an arm's rows in a number."""
    for column in table.select_dtypes("number").astype(float).dropna(axis=1, how="all"):
        values = table[column].astype(float).dropna()
        yield from (len(values), values.min(), values.max(), values.mean(), values.median())


def drawn_numbers(figure: Figure) -> Iterator[float]:
    """Yield the numbers that lines and bars are drawn from."""
    for line in figure.findobj(Line2D):
        assert isinstance(line, Line2D)
        yield from np.concatenate([line.get_xdata(), line.get_ydata()]).astype(float)
    for bar in bars(figure):
        yield from (bar.get_width(), bar.get_height())


def bars(figure: Figure) -> list[Rectangle]:
    return [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, Rectangle)]


def texts(exact: Iterable[float], shares: Iterable[float]) -> set[str]:
    """Return how numbers and shares are given."""
    return {
        *(format_number(float(value), digits) for value in exact for digits in (3, 4)),
        *(format_share(float(share)) for share in shares),
    }


def drawn_texts(figure: Figure) -> set[str]:
    """Return the numbers that are drawn, as texts."""
    return texts(drawn_numbers(figure), (bar.get_width() for bar in bars(figure)))


def table_texts(findings: Findings) -> set[str]:
    """Return what can be said of each arm's rows in a number, as texts."""
    exact: list[float] = []
    shares: list[float] = []
    for arm in findings.arms:
        for table in (findings.chosen, *findings.results):
            own = table[table["arm"] == arm.name]
            exact += aggregates(own)
            for column in own.select_dtypes(["object", "string"]):
                shares += own[column].value_counts(normalize=True).tolist()
    return texts(exact, shares)


@pytest.fixture(scope="module")
def drawn_of(findings_of: FindingsOf) -> DrawnOf:
    """Return what gives the figures of each of `CHANGES` by name; each is drawn once."""

    @functools.cache
    def draw(name: str) -> dict[str, Drawn]:
        findings = findings_of(name)
        with drawing_style():
            every = {drawing.name: drawing.draw(findings) for drawing in FIGURES}
        return {name: drawn for name, drawn in every.items() if drawn is not None}

    return draw


@pytest.fixture(scope="module")
def tables_say(findings_of: FindingsOf) -> Callable[[str], set[str]]:
    """Return what gives the numbers, as texts, that the tables of each of `CHANGES` have."""
    return functools.cache(lambda name: table_texts(findings_of(name)))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("figure", [drawing.name for drawing in FIGURES])
def test_what_is_drawn_is_truly_described(
    findings_of: FindingsOf,
    drawn_of: DrawnOf,
    tables_say: Callable[[str], set[str]],
    figure: str,
    name: str,
) -> None:
    findings, drawn = findings_of(name), drawn_of(name).get(figure)
    if drawn is None:
        assert name != "whole"  # which has something for every figure
        return
    assert any(axes.has_data() for axes in _all_axes(drawn.figure))
    assert len(drawn.alt) > 20
    assert drawn.alt.endswith(".")
    assert "nan" not in drawn.alt
    for label in {arm_label(arm.name) for arm in findings.arms} & set(shown(drawn.figure)):
        assert label in drawn.alt
    true = drawn_texts(drawn.figure) | tables_say(name)
    assert [n for n in numbers(drawn.alt, drawn.figure) if n not in true] == []
    assert "123.4" not in true  # and one that is wrong would be seen


def _all_axes(figure: Figure) -> list[Axes]:
    return [artist for artist in figure.findobj(Axes) if isinstance(artist, Axes)]


def test_a_description_gives_the_numbers_of_its_arms(
    findings_of: FindingsOf, drawn_of: DrawnOf
) -> None:
    findings = findings_of("whole")
    alts = {name: drawn.alt for name, drawn in drawn_of("whole").items()}
    for arm in findings.arms:
        label, (mean, low, high) = arm_label(arm.name), arm.retrained
        ends = f"[{format_number(low, 3)}, {format_number(high, 3)}]"
        assert f"{label} {format_number(mean)} {ends}" in alts["final"]
        assert f"{label} {format_number(arm.optimism)}" in alts["gap"]
        assert f"{label} {format_number(arm.search_curve.mean[-1])}" in alts["anytime-search"]
        assert f"{label} {format_number(arm.retrained_curve.mean[-1])}" in alts["anytime-test"]
    searched = findings.searches["random"].measured
    best = format_number(searched["best_value"].min())
    assert f"random search: {len(searched)} trials, best {best}" in alts["history"]
    truncated = (findings.outer_steps["ift"]["solve_status"] == "truncated").mean()
    assert f"truncated {format_share(float(truncated))}" in alts["solve-status"]


def test_figures_are_found_by_name_and_stand_in_a_section() -> None:
    assert len({drawing.name for drawing in FIGURES}) == len(FIGURES)
    assert {drawing.section for drawing in FIGURES} == set(SECTIONS)
    assert all(len(drawing.caption) > 20 for drawing in FIGURES)


@pytest.mark.parametrize("name", CHANGES)
def test_arms_have_the_figures_that_they_should(
    findings_of: FindingsOf, drawn_of: DrawnOf, name: str
) -> None:
    findings, drawn = findings_of(name), set(drawn_of(name))
    with_ift = any(arm.name.startswith("ift") for arm in findings.arms)
    searches = any(arm.trials > 1 for arm in findings.arms)
    assert {"anytime-search", "anytime-test", "final", "gap"} <= drawn
    assert ({"solve-status", "solve-health"} <= drawn) == with_ift
    assert ({"history", "slice"} <= drawn) == searches


def test_each_computation_runs_once_for_a_report(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(target: str) -> None:
        module, _, name = target.rpartition(".")
        function = getattr(__import__(module, fromlist=[name]), name)

        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(target, counted)

    tables = CHANGES["without IFT"](results)  # fewer figures, the dearest among them
    directory = saved(tables, tmp_path)
    for target in (
        "optuna.importance.get_param_importances",
        "ift_tune.report.write.load_results",
        "ift_tune.compare.findings.find",
        "ift_tune.compare.findings.trajectory",
        "ift_tune.compare.findings.interval",
        "ift_tune.compare.findings.setting_columns",
        "ift_tune.compare.pairwise.paired",
        "ift_tune.compare.verdict.judge",
    ):
        count(target)
    make_report(directory)
    arms, searches = tables.trials["arm"].nunique(), tables.trials[["arm", "seed"]]
    assert calls == {
        "get_param_importances": 1,  # of random search, the one arm with trials enough
        "load_results": 1,
        "find": 1,
        "trajectory": len(searches.drop_duplicates()),
        "interval": 2 * arms,  # of the search value, of the test value
        "setting_columns": 1,
        "paired": arms - 1,
        "judge": 1,
    }


def test_settings_are_told_from_all_other_columns(results: Results) -> None:
    coarse = {c for c in results.trials if str(c).startswith(COARSE_PREFIX)}
    assert coarse
    assert set(setting_columns(results.trials)) == coarse | {*MetaConfig.flat_keys()}
