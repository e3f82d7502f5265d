"""Pictures of what a run has learned, beside its tables."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ift_tune.base.errors import MissingDependencyError
from ift_tune.base.files import write_atomically
from ift_tune.trial.tables import load_views


def draw_pictures(directory: str | os.PathLike[str]) -> list[Path]:
    """Draw the hyperparameters of a finished run, or of a search's best-known trials.

    Args:
        directory: A run directory; the pictures go into its folder ``pictures``, one PNG and one
            SVG for each view, named after the trial and the title.

    Returns:
        The PNG files.

    Raises:
        MissingDependencyError: If Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure

        from ift_tune.report.svg import drawing_style, render
        from ift_tune.report.views import compose
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "pictures need Matplotlib: pip install 'ift_tune[report]'"
        ) from error
    folder = Path(directory) / "pictures"
    written = []
    with drawing_style():
        for trial, views in load_views(directory).items():
            for view in views:
                folder.mkdir(exist_ok=True)
                figure: Figure = compose([view])
                files = render(figure)
                name = re.sub(r"[^\w]+", "-", f"{trial}-{view.title}").strip("-").lower()
                write_atomically(folder / f"{name}.svg", files.svg)
                write_atomically(folder / f"{name}.png", files.png)
                written.append(folder / f"{name}.png")
    return written
