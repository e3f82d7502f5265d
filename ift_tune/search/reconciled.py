"""Whether a study and the trials on disk belong together; what either of them has lost is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ift_tune.base.errors import UsageError
from ift_tune.base.status import TrialStatus
from ift_tune.search.retry import RUN_DIRECTORY
from ift_tune.trial.tables import RunDirectory

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_OPEN = (TrialStatus.RUNNING, TrialStatus.INTERRUPTED)
_TOLERANCE = 1e-6  # some databases keep fewer digits


def require_consistent(
    study: optuna.Study, run: RunDirectory, name: str, *, study_first: bool = False
) -> None:
    """Compare a study with the folders of its trials, before it goes on.

    A trial's end is on disk before the study knows of it, and its number in the study before its
    folder is there. So whatever contradicts that has been damaged or lost since.

    Args:
        study: The study; trials of other run directories are none of this one's business.
        run: The run directory.
        name: What to call the storage of the study.
        study_first: Whether the study knows of a trial's end before it is on disk, as with Ray.

    Raises:
        UsageError: If a trial is known to one of them alone, or as another one; or if the rows or
            facts of a trial are damaged.
    """
    contradiction = partial(_contradiction, run, study, name)
    known = {record.number: record.whole()[0] for record in run.records()}
    known = {number: facts for number, facts in known.items() if facts}
    trials, token = study.get_trials(deepcopy=False), run.token
    for number in sorted(known):
        if number >= len(trials):
            raise contradiction(number, "the study has no such trial")
        if trials[number].user_attrs.get(RUN_DIRECTORY, token) != token:
            raise contradiction(
                number, f"the study's is not of the directory with {run.path / 'token'}"
            )
    for trial in trials:
        if trial.state not in _FINISHED or trial.user_attrs.get(RUN_DIRECTORY) != token:
            continue
        if (why := _difference(trial, known.get(trial.number, {}), study_first)) is not None:
            raise contradiction(trial.number, why)


def _difference(trial: FrozenTrial, facts: Mapping[str, Any], study_first: bool) -> str | None:
    """Return in which way a finished trial is not the one on disk; None if it is."""
    if not facts:
        return "its folder has no trial.json"
    if facts.get("status") in _OPEN and not study_first:
        return f"it is over in the study and {facts['status']} in trial.json"
    pairs = [(name, value, facts[name]) for name, value in trial.params.items() if name in facts]
    if trial.state is TrialState.COMPLETE and "best_value" in facts:
        pairs.append(("best_value", _first(trial.values), facts["best_value"]))
    for name, said, written in pairs:
        if _differ(said, written):
            return f"{name} is {said} in the study and {written} in trial.json"
    return None


def _first(values: Sequence[float] | None) -> float | None:
    return values[0] if values else None


def _differ(one: Any, other: Any) -> bool:
    """Return whether two numbers or two texts differ; other values are kept in several forms."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return not math.isclose(one, other, rel_tol=_TOLERANCE)
    return isinstance(one, str) and isinstance(other, str) and one != other


def _contradiction(
    run: RunDirectory, study: optuna.Study, name: str, number: int, why: str
) -> UsageError:
    return UsageError(
        f"{run.trial(number).path} and trial {number} of the study {study.study_name!r} do not "
        f"belong together ({why}): one of trial.json, token and {name} is damaged or lost; put a "
        "copy of it in its place, or begin anew in another directory"
    )
