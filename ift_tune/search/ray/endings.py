"""Why a trial of Ray's ended: by itself, by the user's stop criterion, or by a scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.result import DONE
from ray.tune.utils import flatten_dict

from ift_tune.base.direction import is_penalty
from ift_tune.base.status import StopReason, stopped_early
from ift_tune.search.ray.session import OBJECTIVE


class _PastStoppers:
    """Stands in front of a trial's own criteria, and notes that Ray has come to them.

    Of a result Ray asks the user's stoppers, then the trial's criteria (``result[key] >= value``),
    then the scheduler, asks nobody further after the first yes, and tells nobody who said it.
    """

    def __init__(self) -> None:
        self.come = False

    def __le__(self, other: object) -> bool:  # what Python asks for the ``>=`` of a plain value
        self.come = True
        return False


def watch(trial: Trial) -> None:
    """Let `ending_of` tell who ends this trial. Called again, it begins anew."""
    criteria = {k: v for k, v in trial.stopping_criterion.items() if k != DONE}
    watched: dict[str, Any] = {DONE: _PastStoppers(), **criteria}  # a key of every result
    trial.stopping_criterion = watched


def ending_of(trial: Trial, result: Mapping[str, Any]) -> StopReason | None:
    """Return why a trial ends with this result, before the next one comes; None if it goes on.

    A stop criterion of the user's ends a trial as its budget does, with what it has found. Where
    both it and a scheduler would end the trial, Ray asks the criterion alone.

    Args:
        trial: One that is watched.
        result: It, as Ray hands it to callbacks.
    """
    past: Any = trial.stopping_criterion[DONE]
    by_stopper, past.come = not past.come, False
    if not result.get(DONE):
        return None
    if said := result.get("stop_reason"):
        return StopReason(said)
    by_criterion = by_stopper or _meets_criteria(trial, result)
    if by_criterion and not is_penalty(result[OBJECTIVE]):
        return StopReason.DONE
    return stopped_early(result)


def _meets_criteria(trial: Trial, result: Mapping[str, Any]) -> bool:
    flat = flatten_dict(dict(result))
    return any(
        key in flat and flat[key] >= value
        for key, value in trial.stopping_criterion.items()
        if key != DONE
    )
