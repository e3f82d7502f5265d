"""Pictures of hyperparameters, drawn from their views."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure

from ift_tune.base.views import HeatMap, Histogram, ImageGrid, View

_WIDTH = 6.4  # inches
_BINS = 40
_COLORS = ("#3f7fc4", "#e4572e", "#1f9a8a", "#b8901a", "#8a6fd1", "#86888c")


def height(view: View) -> float:
    """Return how high a view is drawn at full width, in inches."""
    if isinstance(view, ImageGrid):
        rows = math.ceil(len(view.images) / view.columns)
        shape = view.images.shape[-2] / view.images.shape[-1]
        captions = 0.22 * bool(view.captions)
        return 0.4 + rows * (_WIDTH / view.columns * shape + captions)
    return 2.6


def draw(view: View, figure: Figure | SubFigure) -> None:
    """Draw a view into an empty figure."""
    figure.suptitle(view.title, fontsize=9.5)
    if isinstance(view, ImageGrid):
        _image_grid(view, figure)
    elif isinstance(view, HeatMap):
        _heat_map(view, figure)
    else:
        _histogram(view, figure)


def compose(views: Sequence[View]) -> Figure:
    """Return one figure with the views below each other."""
    heights = [height(view) for view in views]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(views), 1, height_ratios=heights, squeeze=False)
    for view, part in zip(views, parts[:, 0], strict=True):
        draw(view, part)
    return figure


def _image_grid(view: ImageGrid, figure: Figure | SubFigure) -> None:
    rows = math.ceil(len(view.images) / view.columns)
    grid = figure.subplots(rows, view.columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    pixels = ((view.images - view.low) / (view.high - view.low)).clamp(0.0, 1.0)
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    for i, (axes, image) in enumerate(zip(grid.flat, pixels.numpy(), strict=False)):
        axes.imshow(image, interpolation="nearest")
        if view.captions:
            axes.set_title(view.captions[i], fontsize=7.5, pad=2.0)


def _heat_map(view: HeatMap, figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    values = view.values.numpy()
    norm = LogNorm() if view.log and (values > 0.0).all() and np.ptp(values) > 0.0 else None
    shown = axes.imshow(values, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axes.set(xlabel=view.columns, ylabel=view.rows)
    for axis, size in ((axes.xaxis, values.shape[1]), (axes.yaxis, values.shape[0])):
        if size == 1:
            axis.set_ticks([])
    figure.colorbar(shown, ax=axes)


def _histogram(view: Histogram, figure: Figure | SubFigure) -> None:
    axes = figure.subplots()
    groups = {name: values.flatten().numpy() for name, values in view.values.items()}
    whole = torch.cat([values.flatten() for values in view.values.values()]).numpy()
    log = view.log and bool((whole > 0.0).all())
    edges = np.histogram_bin_edges(np.log10(whole) if log else whole, bins=_BINS)
    if log:
        edges = 10.0**edges
        axes.set_xscale("log")
    for i, (name, values) in enumerate(groups.items()):
        color = _COLORS[i % len(_COLORS)]
        axes.hist(values, bins=edges.tolist(), alpha=0.6, label=name, color=color)
    axes.set(xlabel=view.axis, ylabel="count")
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.legend(frameon=False)
