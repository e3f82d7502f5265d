"""What a study was begun with, by which all of its values can stand in one ranking."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import TrialState

from ift_tune.base.errors import UsageError
from ift_tune.base.files import plain_json
from ift_tune.base.identity import FACTORY, require_same
from ift_tune.search.outcomes import IDENTITY


def join_study(study: optuna.Study, identity: Mapping[str, Any]) -> None:
    """Compare what decides the values of trials with what the study was begun with, or begin it.

    Args:
        study: The study, which keeps its identity as a user attribute.
        identity: Plain values; see `SearchPlan.settings`.

    Raises:
        UsageError: If the study was begun with others: their values would stand in one ranking.
    """
    now = json.loads(plain_json(identity))
    if (begun := study.user_attrs.get(IDENTITY)) is None:
        study.set_user_attr(IDENTITY, now)
        begun = study.user_attrs[IDENTITY]  # another process may have begun it at this moment
    if FACTORY not in now:
        begun = {key: value for key, value in begun.items() if key != FACTORY}
    require_same(
        f"the study {study.study_name!r}",
        begun,
        now,
        mend="join it with the same settings, or choose another study name",
    )


def refuse_foreign_trials(study: optuna.Study) -> None:
    """Raise a `UsageError` if a study that nobody knows has values that may mean anything."""
    if IDENTITY in study.user_attrs:
        return
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    foreign = [trial.number for trial in finished if "stop_reason" not in trial.user_attrs]
    if foreign:
        raise UsageError(
            f"the study {study.study_name!r} has values of another program, which would stand in "
            f"one ranking with these: choose another study_name, got trial {foreign[0]} without a "
            "stop_reason"
        )
