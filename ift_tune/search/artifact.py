"""Files of a run as artifacts of its study, where Optuna's tools look for them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from ift_tune.base.errors import UsageError
from ift_tune.search.storage_faults import using_storage
from ift_tune.search.work import JOURNAL_FILE, open_storage
from ift_tune.trial.best import BEST, find_best
from ift_tune.trial.record import MODEL
from ift_tune.trial.tables import RunDirectory

Study: TypeAlias = optuna.Study
"""For floors above, which do not import Optuna."""

ARTIFACTS = "artifacts"
"""Folder of a run directory: the store that optuna-dashboard is started with."""

BEST_MODEL = "best_model"
"""The study's user attribute that names the artifact and the trial that it is of."""

_UPLOADED = "uploaded"
"""The study's user attribute with the digest of each uploaded file."""


def upload_best(study: Study, run: RunDirectory) -> None:
    """Upload the best trial's model and λ to the study, unless they are there already."""
    file = run.path / BEST / MODEL
    if not file.exists():
        return
    kept = find_best(run.path)
    noted = {"trial": kept["trial"], "step": kept["best_step"], "value": kept["best_value"]}
    known = study.user_attrs.get(BEST_MODEL, {})
    if {key: known.get(key) for key in noted} == noted:
        return
    study.set_user_attr(BEST_MODEL, {**noted, "artifact": _upload(study, run, file)})


def upload_files(study: Study, run: RunDirectory, files: Sequence[Path]) -> list[Path]:
    """Upload files to the study, and return which: not those that are there as they are.

    Of a file that has changed, both are there: Optuna does not take one away.
    """
    done = []
    with using_storage():
        for file in files:
            name = file.relative_to(run.path).as_posix()
            known = study.user_attrs.get(_UPLOADED, {})
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if known.get(name) != digest:
                _upload(study, run, file)
                study.set_user_attr(_UPLOADED, known | {name: digest})
                done.append(file)
    return done


def study_of(run: RunDirectory) -> Study:
    """Return the study that a search has kept in its run directory.

    Raises:
        UsageError: If it has none.
    """
    if not (run.path / JOURNAL_FILE).exists():
        raise UsageError(
            f"a search keeps its study in {JOURNAL_FILE}, where it was given no storage: name the "
            f"folder of such a search, or give its study (study=), got {run.path}"
        )
    with using_storage():
        storage = open_storage(None, run.path)
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage)


def _upload(study: Study, run: RunDirectory, file: Path) -> str:
    store = FileSystemArtifactStore(base_path=run.path / ARTIFACTS)
    (run.path / ARTIFACTS).mkdir(exist_ok=True)
    return upload_artifact(artifact_store=store, file_path=str(file), study_or_trial=study)
