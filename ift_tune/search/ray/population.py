"""The members of population based training: their first points, and where each goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from ift_tune.base.arguments import plain
from ift_tune.base.errors import RunExistsError
from ift_tune.base.files import damaged, plain_json, read_json, write_atomically
from ift_tune.base.status import TrialStatus
from ift_tune.search.ray.points import NUMBER
from ift_tune.search.ray.resuming import GOES_ON, experiments, latest_checkpoint
from ift_tune.search.space import Space
from ift_tune.trial.tables import RunDirectory

BEGINS_AFTER = "__begins_after"
"""Key of a Ray configuration: the outer step of the checkpoint that a member goes on from."""

_FILE, _POINTS = "population.json", "points"
OVER = (TrialStatus.COMPLETE, TrialStatus.PRUNED)


class Population:
    """As many members as a search has trials, which are trained as a whole."""

    def __init__(self, run: RunDirectory, space: Space, size: int, seed: int) -> None:
        """Take whose members they are; nothing is drawn before `members`."""
        self._run, self._space, self._size, self._seed = run, space, size, seed

    def members(self) -> list[dict[str, Any]]:
        """Return the configurations of those that are not finished, with their numbers.

        One that was interrupted has the point that it had at its latest checkpoint, which is
        another's after an exploit.

        Raises:
            RunExistsError: If the run has a population of another size, or of an earlier version.
        """
        points = self._first_points()
        found = []
        for number, point in enumerate(points):
            record = self._run.trial(number)
            if record.facts().get("status") in OVER:
                continue
            going_on = latest_checkpoint(record)
            latest = {} if going_on is None else going_on.config
            moved = {key: latest[key] for key in point if key in latest}
            file = None if going_on is None else str(going_on.checkpoint)
            step = 0 if going_on is None else going_on.step
            found.append({**point, **moved, NUMBER: number, GOES_ON: file, BEGINS_AFTER: step})
        return found

    def _first_points(self) -> list[dict[str, Any]]:
        file = self._run.path / _FILE
        if not file.exists():
            if experiments(self._run.path):
                raise self._refused("of an earlier version", f"none of {_FILE}")
            write_atomically(file, plain_json({_POINTS: self._drawn()}))
        points: Any = read_json(file).get(_POINTS)
        if not _are_points(points, [*self._space.distributions]):
            raise damaged(file, ValueError("something else than the members' first points"))
        if len(points) != self._size:
            raise self._refused(f"of {len(points)} members", f"n_trials={self._size}")
        checked: list[dict[str, Any]] = points
        return checked

    def _drawn(self) -> list[dict[str, Any]]:
        random, domains = np.random.default_rng(self._seed), self._space.to_ray()
        return [
            {key: plain(domain.sample(random_state=random)) for key, domain in domains.items()}
            for _ in range(self._size)
        ]

    def _refused(self, what: str, got: str) -> RunExistsError:
        return RunExistsError(
            f"{self._run.path} holds a population {what}, which is trained as a whole: go on with "
            f"as many, or start a new run in another --out, got {got}"
        )


class SteadyTraining(PopulationBasedTraining):
    """Population based training whose members may be at different steps.

    They are after they were resumed, and where one was over before its last step. An exploit takes
    over the other's progress too. Where the other had given more results, steps would be missing;
    where it stopped at an earlier step, this member would fall back to an older state. So only a
    member is exploited that has given as many results, and is as far or further.
    """

    def __init__(self, every: int, **options: Any) -> None:
        """Take how many outer steps a result has, and Ray's own arguments."""
        super().__init__(**options)
        self._every = every

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Remember how far a member has come: it is exploited when it would have been."""
        super().on_trial_add(tune_controller, trial)
        results = math.ceil(trial.config.get(BEGINS_AFTER, 0) / self._every)
        interval, state = self._perturbation_interval, self._trial_state[trial]
        state.last_perturbation_time = interval * (results // interval)
        state.last_train_time = results
        following = state.last_perturbation_time + interval
        self._next_perturbation_sync = max(self._next_perturbation_sync, following)

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        heir, donor = self._trial_state[trial], self._trial_state[trial_to_clone]
        if heir.last_train_time == donor.last_train_time and _step(heir) <= _step(donor):
            super()._exploit(tune_controller, trial, trial_to_clone)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the next member to run, also where the one that all waited for is gone.

        Ray begins the next round with the result of the last member to arrive, and would wait for
        ever for one whose process has died too often, or that ended in another way.
        """
        members = [(self._trial_state[t], t.is_finished()) for t in tune_controller.get_trials()]
        results = [state.last_train_time for state, gone in members if not gone]
        if results and min(results) >= self._next_perturbation_sync:
            self._next_perturbation_sync = min(results) + self._perturbation_interval
        following = math.ceil(self._next_perturbation_sync)
        for state, gone in members:
            if gone:  # one that failed is among those that Ray waits for in each round
                state.last_train_time = max(state.last_train_time, following)
        return super().choose_trial_to_run(tune_controller)


def generator(members: list[dict[str, Any]]) -> tuple[dict[str, Any], BasicVariantGenerator]:
    """Return a ``param_space`` and what makes the members of it; Ray lets no searcher do that."""
    space: Mapping[str, Any] = dict.fromkeys(members[0])  # of which each member has its own
    return dict(space), BasicVariantGenerator(points_to_evaluate=members)


def _step(state: Any) -> int:
    step: int = state.last_result["outer_step"]
    return step


def _are_points(points: Any, keys: list[str]) -> bool:
    return isinstance(points, list) and all(
        isinstance(point, dict) and sorted(point) == sorted(keys) for point in points
    )
