"""What a search has drawn and measured, as artifacts of its study: optuna-dashboard shows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ift_tune.base.arguments import require_path
from ift_tune.base.direction import Direction
from ift_tune.base.errors import require
from ift_tune.base.objectives import PARETO
from ift_tune.report.front import draw_front
from ift_tune.report.runs import draw_curves, draw_pictures
from ift_tune.trial.record import folder_name
from ift_tune.trial.tables import RunDirectory, load_results

if TYPE_CHECKING:
    from ift_tune.search.artifact import Study

_MOST = 10
"""Trials whose λ is uploaded: the best, or those of the front."""

_PAGES = ("audit/audit.html", "certificate.png")


def upload_artifacts(run_dir: str | os.PathLike[str], study: Study | None = None) -> list[Path]:
    """Draw a search, and upload the figures and pages to its study as Optuna artifacts.

    They are the curves, the front of a search of several metrics, pictures of the λ of the best
    trial (of the first ten on the front), an audit's page and a certificate, if there are any. The
    store is the folder ``artifacts`` of the run directory:
    ``optuna-dashboard runs/mine/study.journal --artifact-dir runs/mine/artifacts``.

    Args:
        run_dir: The run directory of a search.
        study: Its study, where it has a storage of its own. Default: the one in the directory.

    Returns:
        The files that were uploaded; those that are there already are not again.

    Raises:
        UsageError: If there is no search, or no study with it.
        MissingDependencyError: If Optuna or Matplotlib is not installed.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, run_study, testing
        >>> from ift_tune.report import upload_artifacts
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"meta_lr": Float(0.01, 0.1, log=True)})
        >>> result = run_study(
        ...     problem, space, Budget(outer_steps=3), n_trials=2, out="runs/mine", device="cpu"
        ... )
        >>> [path.name for path in upload_artifacts("runs/mine")]
        ['curves.png']
    """
    require("optuna", extra="optuna", what="an upload of artifacts")
    from ift_tune.search.analysis import front_of
    from ift_tune.search.artifact import study_of, upload_files

    folder = require_path("the run directory", run_dir)
    results = load_results(folder)
    run = RunDirectory(folder, resume=True)
    study = study_of(run) if study is None else study
    settings = results.trials.attrs.get("run", {})
    metric, title = settings.get("metric"), str(settings.get("task"))
    kind = None if metric is None else metric.removeprefix("search_")
    mode = Direction.of_run(settings).value
    draw_curves(results.steps, folder / "curves.png", kind=kind, title=title, mode=mode)
    files = [folder / "curves.png"]
    if PARETO in results.trials:
        draw_front(results.trials, folder / "front.png", title=title)
        files.append(folder / "front.png")
    files += draw_pictures(folder, list(map(folder_name, front_of(study)["trial"].head(_MOST))))
    files += [path for page in _PAGES if (path := folder / page).exists()]
    return upload_files(study, run, files)
