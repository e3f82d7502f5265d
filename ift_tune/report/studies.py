"""Figures of the studies, drawn from their tables alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ift_tune.report.runs import in_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHOD_STYLES: dict[str, dict[str, Any]] = {
    "identity": {"color": "#86888c", "marker": "*", "linestyle": ""},
    "neumann": {"color": "#e4572e", "marker": "o", "linestyle": "-"},
    "conjugate_gradient": {"color": "#3f7fc4", "marker": "^", "linestyle": "--"},
    "nystrom": {"color": "#2f9e57", "marker": "s", "linestyle": ":"},
    "neumann, gauss_newton": {"color": "#c2408f", "marker": "v", "linestyle": "-."},
    "conjugate_gradient, gauss_newton": {"color": "#8a6fd1", "marker": "D", "linestyle": "-."},
    "unrolled": {"color": "#b8901a", "marker": "x", "linestyle": "--"},
}
"""How each method is drawn. Colour is never the only difference."""

_SPARE_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "marker": marker, "linestyle": "--"}
    for color, marker in (("#1b7f8c", "P"), ("#7a4b1e", "X"), ("#5b6b2f", "<"), ("#a33a5e", ">"))
)
"""For methods that are new, in the order in which a table has them."""

_TUNED_STYLES: dict[str, dict[str, Any]] = {
    "none": {"label": "no tuning", "color": "#86888c", "marker": "*", "linestyle": ":"},
    "one": {"label": "one decay", "color": "#3f7fc4", "marker": "^", "linestyle": "--"},
    "each": {"label": "a decay a weight", "color": "#e4572e", "marker": "o", "linestyle": "-"},
}


def method_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how each method is drawn, those with no style of their own in the order they come."""
    new = [name for name in names if name not in METHOD_STYLES]
    return METHOD_STYLES | dict(zip(new, itertools.cycle(_SPARE_STYLES), strict=False))


@in_style
def draw_inverses(tables: Mapping[str, pd.DataFrame], directory: Path, title: str) -> list[Path]:
    """Draw quality against products, a column for each state of the weights.

    The last row is the difference between k unrolled steps and Neumann with K = k − 1.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import new_figure

    inverse, relation = tables["inverse"], tables["relation"]
    states = list(inverse["state"].unique())
    styles = method_styles(inverse["method"].unique())
    figure = new_figure(4.4 * len(states), 9.0)
    grid = figure.subplots(3, len(states), squeeze=False)
    for column, state in enumerate(states):
        rows = inverse[inverse["state"] == state]
        for axes, measure in zip(grid[:2, column], ("cosine", "relative_l2"), strict=True):
            for method, curve in rows.groupby("method", sort=False):
                style = styles[str(method)]
                axes.plot(curve["products"], curve[measure], label=method, markersize=4.0, **style)
            axes.set(xlabel="Hessian-vector products, those for α included")
        grid[0, column].set(ylabel="cosine of the hypergradient", title=f"{state} weights")
        grid[1, column].set(ylabel="relative L2 distance", yscale="log")
        below = grid[2, column]
        if len(relation):
            curve = relation[relation["state"] == state]
            # A log scale has no place for an exact zero.
            found = curve["relative_difference"].clip(lower=1e-17)
            below.plot(curve["unrolled_steps"], found, **METHOD_STYLES["unrolled"])
        below.set(xlabel="k, unrolled steps", yscale="log")
        below.set_ylim(bottom=1e-17)
        below.set(ylabel="difference from Neumann, K = k − 1")
        below.axhline(2.2e-16, color="#86888c", linewidth=0.8)  # machine precision
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return _saved(figure, directory / "inverse", title)


@in_style
def draw_costs(tables: Mapping[str, pd.DataFrame], directory: Path, title: str) -> list[Path]:
    """Draw time and memory, as multiples of plain training's, over T, K and P.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import new_figure

    table = tables["cost"]
    names = {"inner_steps": "T, inner steps", "terms": "K, terms", "size": "P, weights"}
    sweeps = [sweep for sweep in names if (table["sweep"] == sweep).any()]
    figure = new_figure(3.4 * len(sweeps), 5.6)
    grid = figure.subplots(2, len(sweeps), squeeze=False)
    for column, sweep in enumerate(sweeps):
        rows = table[table["sweep"] == sweep]
        for per, curve in rows.groupby("per", sort=False):
            across = curve["weights" if sweep == "size" else "value"]
            label = {"model": "one decay", "weight": "a decay a weight"}.get(str(per), "joint")
            line = {"marker": "^", "linestyle": "--"} if per == "model" else {"marker": "o"}
            grid[0, column].plot(across, curve["time_ratio"], label=label, **line)
            grid[1, column].plot(across, curve["joint_bytes"] / 1e6, label=label, **line)
        mixed = rows.drop_duplicates("value") if sweep == "size" else rows
        across = mixed["weights" if sweep == "size" else "value"]
        plain = {"color": "#86888c", "linestyle": ":"}
        grid[1, column].plot(across, mixed["plain_bytes"] / 1e6, label="plain", **plain)
        if rows["unrolled_bytes"].notna().any():
            unrolled = METHOD_STYLES["unrolled"]
            grid[1, column].plot(
                rows["value"], rows["unrolled_bytes"] / 1e6, label="unrolled", **unrolled
            )
        scale = "symlog" if sweep == "terms" else "log"
        for axes in grid[:, column]:
            axes.set_xscale(scale)
            axes.legend(frameon=False, fontsize=7)
        grid[0, column].set(ylabel="time, times plain training")
        grid[1, column].set(xlabel=names[sweep], ylabel="peak memory, MB", yscale="log")
    return _saved(figure, directory / "cost", title)


@in_style
def draw_fractions(tables: Mapping[str, pd.DataFrame], directory: Path, title: str) -> list[Path]:
    """Draw test error, retrained on all points, against the share for validation.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import new_figure

    table = tables["validation"]
    totals = sorted(table["total"].unique())
    figure = new_figure(3.4 * len(totals), 3.4)
    for axes, total in zip(figure.subplots(1, len(totals), squeeze=False)[0], totals, strict=True):
        rows = table[table["total"] == total]
        for tuned, style in _TUNED_STYLES.items():
            found = rows[rows["tuned"] == tuned].groupby("fraction")["retrained_all_test_error"]
            if len(found):
                error = found.std().fillna(0.0) / found.count() ** 0.5
                axes.errorbar(found.mean().index, found.mean(), error, markersize=4.0, **style)
        axes.set(xlabel="share for validation", ylabel="test error, retrained on all points")
        axes.set(title=f"{total} points")
        axes.legend(frameon=False, fontsize=7)
    return _saved(figure, directory / "validation", title)


@in_style
def draw_worth(tables: Mapping[str, pd.DataFrame], directory: Path, title: str) -> list[Path]:
    """Draw a grid of winners for each job on each data set, one below the other for a phone.

    A cell has a letter and a colour for its verdict, the arm of the lowest error, and by how much
    the best rival's error is above IFT's.

    Returns:
        The files; none for a map without a cell.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    from ift_tune.report.drawing import new_figure

    table = tables["worth"]
    if table.empty:
        return []
    panels = list(table.groupby(["job", "data"], sort=False))
    columns = max(rows["clean"].nunique() for _, rows in panels)
    heights = [0.75 + 0.62 * rows["noise"].nunique() for _, rows in panels]
    figure = new_figure(max(4.7, 0.9 + 0.95 * columns), 0.9 + sum(heights))
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((job, data), rows) in zip(grid, panels, strict=True):
        levels = {name: sorted(rows[name].unique()) for name in ("clean", "noise")}
        for cell in rows.to_dict("records"):
            across, up = (levels[name].index(cell[name]) for name in ("clean", "noise"))
            _draw_cell(axes, across, up, cell)
        axes.set_xticks(range(len(levels["clean"])), [f"{n:,}" for n in levels["clean"]])
        axes.set_yticks(range(len(levels["noise"])), [f"{n:g}" for n in levels["noise"]])
        axes.set(
            title=f"{job} on {data}",
            xlabel="clean examples",
            ylabel="noise",
            xlim=(-0.5, len(levels["clean"]) - 0.5),
            ylim=(-0.5, len(levels["noise"]) - 0.5),
        )
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
    figure.supxlabel(_WORTH_LEGEND, fontsize=7.5)
    return _saved(figure, directory / "worth", title)


def _draw_cell(axes: Axes, across: int, up: int, cell: Mapping[Any, Any]) -> None:
    from matplotlib.patches import Rectangle

    style = _WORTH_STYLES[cell["verdict"]]
    face = style["faces"][0 if cell["difference"] > 0.0 else -1]
    corner = (across - 0.47, up - 0.45)
    frame = {"facecolor": face, "edgecolor": style["color"], **style["frame"]}
    axes.add_patch(Rectangle(corner, 0.94, 0.9, **frame))
    # IFT has several arms: where it is beaten, the best of them may still have the lowest error.
    name = f"{style['letter']}  {cell['rival' if cell['verdict'] == 'rival' else 'winner']}"
    axes.text(across, up + 0.22, name, weight=style["weight"], size=8.5, **_IN_CELL)
    point, low, high = (_signed(100.0 * cell[name]) for name in ("difference", "low", "high"))
    axes.text(across, up - 0.18, f"{point}\n[{low}, {high}]", size=7.5, **_IN_CELL)


def _signed(points: float) -> str:
    """Return "+0.4"; "0.0" for what rounds to it; "?" where there is no interval."""
    if not math.isfinite(points):
        return "?"
    return f"{points:+.1f}" if abs(points) >= 0.05 else "0.0"


_IN_CELL: dict[str, Any] = {"ha": "center", "va": "center"}
_WORTH_STYLES: dict[str, dict[str, Any]] = {
    "ift": {
        "letter": "I",
        "weight": "bold",
        "color": "#e4572e",
        "faces": ("#f7c1ae",),
        "frame": {"linewidth": 2.2},
    },
    "rival": {
        "letter": "R",
        "weight": "normal",
        "color": "#3f7fc4",
        "faces": ("#b9d3ec",),
        "frame": {"linewidth": 1.0, "linestyle": "--"},
    },
    "open": {
        "letter": "?",
        "weight": "normal",
        "color": "#86888c",
        "faces": ("#fdf1ec", "#edf3fa"),  # a tone of the side that has the lower error
        "frame": {"linewidth": 0.8, "linestyle": ":"},
    },
}
"""How each verdict is drawn: its letter and its frame differ too, and not its colour alone."""

_WORTH_LEGEND = (
    "I: IFT is better than every rival    R: a rival is better    ?: neither is shown\n"
    "Beside the letter that rival, else the arm of the lowest error; below it\n"
    "the best rival's error minus IFT's in points, above 0 where IFT is better,\n"
    "with its 95 % interval"
)


def _saved(figure: Figure, stem: Path, title: str) -> list[Path]:
    """Save as PNG and SVG, without the lines nobody needs."""
    from ift_tune.report.drawing import save_figure

    figure.suptitle(title)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    paths = [stem.with_suffix(ending) for ending in (".png", ".svg")]
    for path in paths:
        save_figure(figure, path)
    return paths
