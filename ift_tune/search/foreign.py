"""Studies that others may have written: not gone on with where a sampler would run what they hold.

Optuna's CMA-ES keeps its state as a pickle among the attributes of trials, and reads it from there.
"""

from __future__ import annotations

import re
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, InMemoryStorage

from ift_tune.base.errors import UsageError
from ift_tune.base.trust import SIGNATURE, is_signed, key_file, sign
from ift_tune.base.urls import without_secrets
from ift_tune.search.storage_faults import using_storage
from ift_tune.search.work import JOURNAL_FILE, open_storage

_PICKLED = re.compile(r"optimizer:\d+$")  # "cma:optimizer:0", one of several parts


def holds_pickles(study: optuna.Study) -> bool:
    """Return whether a trial of a study has an attribute that a sampler unpickles."""
    trials = study.get_trials(deepcopy=False)
    return any(_PICKLED.search(key) for trial in trials for key in trial.system_attrs)


def refuse_foreign_pickles(study: optuna.Study, folder: Path, *, trusted: bool) -> None:
    """Refuse to go on with the study of a run directory that was brought here.

    Args:
        study: It, opened, which runs nothing.
        folder: Where it lies.
        trusted: Whether the folder is this user's.

    Raises:
        UsageError: If it is not, and a sampler would unpickle what the study holds.
    """
    if not trusted and holds_pickles(study):
        raise _refused(f"the study in {folder}")


def refuse_foreign_journal(folder: Path, *, trusted: bool) -> None:
    """Refuse likewise every study in the journal of a folder, which need not be there."""
    if trusted or not (folder / JOURNAL_FILE).exists():
        return
    with using_storage():
        storage = open_storage(None, folder)
        for name in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=name, storage=storage)
            refuse_foreign_pickles(study, folder, trusted=False)


def refuse_foreign_storage(
    study: optuna.Study, storage: str | BaseStorage, *, trusted: bool
) -> None:
    """Refuse to join a study in a storage that others may have written; sign what is ours.

    Args:
        study: It, opened, which runs nothing.
        storage: Its storage, as the user has named it.
        trusted: Whether the user says so.

    Raises:
        UsageError: If a sampler would unpickle what the study holds, nobody has said that it is
            trusted, and this user has not begun it.
    """
    if isinstance(storage, InMemoryStorage):
        return  # of this very process
    subject = f"study {study.study_name} in {_place_of(storage)}"
    if is_signed(subject, study.user_attrs.get(SIGNATURE)):
        return
    if not trusted and holds_pickles(study):
        raise _refused(f"the study {study.study_name!r} in the storage")
    new = not study.get_trials(deepcopy=False)
    if (trusted or new) and (signature := sign(subject)) is not None:
        study.set_user_attr(SIGNATURE, signature)


def _place_of(storage: str | BaseStorage) -> str:
    if not isinstance(storage, str):
        return type(storage).__name__
    scheme, separator, file = storage.partition(":///")
    is_file = separator and scheme in ("sqlite", "journal")
    # A password may change, and the study is still the same.
    return f"{scheme}:///{Path(file).resolve()}" if is_file else without_secrets(storage)


def _refused(what: str) -> UsageError:
    return UsageError(
        f"{what} holds pickled states of CMA-ES, which run whatever they say when they are read: "
        "add --trust (trust=True) if you know who has written it, or begin a new run, got no "
        f"signature under the key in {key_file()}"
    )
