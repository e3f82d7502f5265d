"""The best model of a study as one of its artifacts, where Optuna's tools look for it."""

from __future__ import annotations

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from ift_tune.trial.best import BEST, find_best
from ift_tune.trial.record import MODEL
from ift_tune.trial.tables import RunDirectory

ARTIFACTS = "artifacts"
"""Folder of a run directory: the store that optuna-dashboard is started with."""

BEST_MODEL = "best_model"
"""The study's user attribute that names the artifact and the trial that it is of."""


def upload_best(study: optuna.Study, run: RunDirectory) -> None:
    """Upload the best trial's model and λ to the study, unless they are there already."""
    file = run.path / BEST / MODEL
    if not file.exists():
        return
    kept = find_best(run.path)
    noted = {"trial": kept["trial"], "step": kept["best_step"], "value": kept["best_value"]}
    known = study.user_attrs.get(BEST_MODEL, {})
    if {key: known.get(key) for key in noted} == noted:
        return
    store = FileSystemArtifactStore(base_path=run.path / ARTIFACTS)
    (run.path / ARTIFACTS).mkdir(exist_ok=True)
    name = upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=study)
    study.set_user_attr(BEST_MODEL, {**noted, "artifact": name})
