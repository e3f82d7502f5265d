"""An exception in a trial ends the command line's search: it would be raised again by a retry.

Ray retries a trial whatever ended it. So trials tell of exceptions in their results, and only
processes that die are started again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from ift_tune.errors import UsageError, WorkerError
from ift_tune.search.ray.session import OBJECTIVE, WORST
from ift_tune.search.ray.trainable import IFTTrainable
from ift_tune.types import StopReason

_MISTAKE, _USAGE = "mistake", "usage_mistake"


class CandidTrainable(IFTTrainable):
    """Returns a result where its parent raises."""

    _mistake: dict[str, Any] | None = None

    def setup(self, config: dict[str, Any], **common: Any) -> None:
        """Keep an exception for the first step."""
        self._try(super().setup, config, **common)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Keep an exception for the next step."""
        self._mistake = None
        self._try(super().reset_config, new_config)
        return True

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        """Keep an exception for the next step."""
        if self._mistake is None:
            self._try(super().load_checkpoint, checkpoint_dir)

    def step(self) -> dict[str, Any]:
        """Run a block, or tell what has gone wrong."""
        result = None if self._mistake else self._try(super().step)
        return result or {
            OBJECTIVE: WORST,
            "metric": OBJECTIVE,
            "outer_step": 0,
            "done": True,
            "stop_reason": StopReason.FAILED.value,
            **(self._mistake or {}),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save what can be gone on with."""
        if self._mistake is None:
            super().save_checkpoint(checkpoint_dir)

    def _try(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except UsageError as error:
            self._mistake = {_USAGE: str(error)}
        except Exception:  # noqa: BLE001  (it is raised again by the driver)
            self._mistake = {_MISTAKE: traceback.format_exc()}
        return None


class StopAtMistakes(tune.Callback):
    """Ends the search when a trial tells of an exception.

    An exception in a callback is how one ends ``Tuner.fit`` at once, the other trials as they are.
    """

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Raise what a trial could not."""
        if _USAGE in result:
            raise UsageError(result[_USAGE])
        if _MISTAKE in result:
            raise WorkerError(f"a trial failed; --resume tries it again:\n{result[_MISTAKE]}")
