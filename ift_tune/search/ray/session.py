"""A trial as Ray Tune sees it: results that are flat, finite and complete."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from ift_tune.base.direction import DEFAULT_METRICS, Direction, named_direction
from ift_tune.base.environment import gpu_is_plugged_in
from ift_tune.base.errors import UsageError
from ift_tune.base.files import write_atomically
from ift_tune.base.status import StopReason, found_at_the_end
from ift_tune.search.fidelity import FIDELITIES, used
from ift_tune.search.plan import SearchPlan
from ift_tune.search.ray.points import point_of
from ift_tune.search.ray.resuming import CHECKPOINT
from ift_tune.trial.record import save_found
from ift_tune.trial.trial import OUT_OF_MEMORY

OBJECTIVE = "objective"
"""The value that decides, in every result: the search metric, whatever its name, or the penalty.

It is better in the direction of the trial's `mode`, which the ``TuneConfig`` has to have too. A
trial that diverged reports `Direction.penalty`.
"""

LATEST = "latest_objective"
"""The value of the latest evaluation, where `OBJECTIVE` is that of the best so far.

What a population is compared by: whoever exploits a member takes over its present state, so the
best that it once was says nothing. It is better in the same direction, with the same penalty.
"""

RECORD = "record"
"""Key of a result that holds rows of the tables as JSON; `TablesCallback` takes it out."""


class Session:
    """One trial in a process of Ray's."""

    def __init__(
        self,
        plan: SearchPlan,
        config: Mapping[str, Any],
        trial_id: str,
        common: tuple[str, ...] = (),
    ) -> None:
        """Set the trial up on what Ray has allotted.

        Repeats of the same configuration have seeds one after the other.

        Args:
            plan: What all trials have in common.
            config: Ray's configuration; see `point_of`.
            trial_id: Ray's name of the trial.
            common: Keys that whoever calls has taken out of the configuration.

        Raises:
            UsageError: If a key or value is wrong, or an allotted GPU cannot be used.
        """
        self.trial_id = trial_id
        point = point_of(config, plan.space, common)
        trials = replace(plan.trials, seed=plan.trials.seed + point.repeat)
        plan = replace(plan, trials=trials)
        self._moved = point.moved
        self.trial = plan.at(point.values, allotted_device(trials.device))
        self._metric = trials.objectives.metric
        self._exploited: str | None = None  # the trial that it has taken weights and λ from
        try:
            self.trial.setup()
        except OUT_OF_MEMORY:
            self.trial.stop_reason = StopReason.OOM

    def advance(self, left: int | None = None) -> dict[str, Any]:
        """Step until the search split is evaluated, or the trial is over.

        A trial that is over before its last result takes no further steps: it gives its present
        values again, until it takes over another's state or comes to its last result. What is
        measured at the end, the retraining above all, waits for that too.

        Args:
            left: Results that follow this one whatever happens: with none the trial ends, however
                far it has come. None: it ends by itself.

        Returns:
            A result: `OBJECTIVE`, `LATEST` and every number measured, all finite; ``outer_step``,
            ``metric`` (the objective's name), ``mode`` (its direction), ``solve_status``,
            ``stop_reason`` (empty while the trial runs), ``done`` and `RECORD`; and what has been
            used so far of each of `FIDELITIES`.
        """
        trial, rows = self.trial, []
        retrained: int | None = None
        while trial.stop_reason is None:
            row = trial.step()
            if row is None:
                break
            rows.append(row)
            if trial.metric in row:
                break
        if left is not None and left <= 0 and trial.stop_reason is None:
            trial.stop_reason = StopReason.DONE  # it has taken over the state of one further behind
        latest = trial.metrics.get(trial.metric)  # the best's takes its place at the end
        waits = left is not None and left > 0
        if trial.stop_reason is StopReason.DONE and not waits:
            retrained = self._finish()
        result = self._result(rows, latest, retrained)
        if waits:
            result |= {"done": False, "stop_reason": ""}
        if waits and not rows:
            result["solve_status"] = ""  # a stopper counts solves, of which there was none
        return result

    def _finish(self) -> int | None:
        """Measure what is measured at the end, and return the inner steps of the retraining."""
        trial = self.trial
        retrained = trial.joint.inner_steps if trial.retrains else None
        try:
            trial.metrics |= trial.finish()
        except OUT_OF_MEMORY:
            trial.stop_reason = StopReason.OOM
        return retrained

    def conclude(self, step: int, directory: str | Path) -> tuple[dict[str, Any], int | None]:
        """Bring a trial that the user's criterion has ended to its end, as its budget would have.

        Args:
            step: The outer step after which it was ended: those that the checkpoint lacks are taken
                again.
            directory: Where what it has found is written.

        Returns:
            What is measured once, at the end, and the inner steps of the retraining, if it has one.
        """
        trial = self.trial
        while trial.stop_reason is None and trial.joint.outer_steps < step:
            trial.step()
        if trial.stop_reason not in (None, StopReason.DONE) or trial.value is None:
            return {}, None  # without a value it has found nothing
        trial.stop_reason = StopReason.DONE
        retrained = self._finish()
        save_found(Path(directory), trial)
        return found_at_the_end(trial.metrics) | trial.totals(), retrained

    def _result(
        self, rows: list[dict[str, Any]], latest: float | None, retrained: int | None
    ) -> dict[str, Any]:
        trial = self.trial
        reason = trial.stop_reason
        numbers = {
            name: float(value)
            for name, value in trial.metrics.items()
            if isinstance(value, int | float) and math.isfinite(value) and name != "step"
        }
        value = trial.value
        if reason in (None, StopReason.DONE) and value is not None and math.isfinite(value):
            numbers |= {OBJECTIVE: value, LATEST: value if latest is None else latest}
        else:
            numbers |= self._penalties()
        record = {
            "facts": trial.constants(),
            "rows": rows,
            "found": found_at_the_end(trial.metrics) | trial.totals(),
            "value": value,
            "exploited": self._exploited,
            "moved": self._moved,
            "retrained": retrained,
        }
        numbers |= {name: float(used(trial, name)) for name in FIDELITIES}
        self._exploited = None
        return numbers | {
            "outer_step": trial.metrics.get("step", 0),
            "metric": trial.metric,
            "mode": trial.direction.value,
            "solve_status": trial.metrics.get("solve_status") or "",
            "stop_reason": "" if reason is None else reason.value,
            "done": reason is not None,
            RECORD: json.dumps(record),
        }

    def _penalties(self) -> dict[str, float]:
        """Return the worst value under every name that a search may go by.

        The metric may never have been seen, and others may have looked good before the end.
        """
        seen = {name for name in self.trial.metrics if name.startswith("search_")}
        names = {*DEFAULT_METRICS, *seen}
        others = {name: (named_direction(name) or Direction.MIN).penalty for name in names}
        own = self.trial.direction.penalty
        return others | {self._metric or self.trial.metric: own, OBJECTIVE: own, LATEST: own}

    def save(self, directory: str | Path) -> None:
        """Write a checkpoint, and whose it is."""
        if self.trial.ready:  # it is not after running out of memory while it was built
            self.trial.save(Path(directory, CHECKPOINT))
            if self.trial.stop_reason is StopReason.DONE:
                save_found(Path(directory), self.trial)
        write_atomically(Path(directory) / "owner.txt", self.trial_id.encode())

    def load(self, directory: str | Path) -> None:
        """Go on from a checkpoint: exactly, or, if another trial wrote it, by an exploit of it.

        Population based training lets a bad trial exploit a good one: it takes over weights and λ,
        and what is best begins anew.

        Raises:
            CheckpointError: If it does not hold the weights and λ that were saved.
        """
        owner = (Path(directory) / "owner.txt").read_text()
        file, other = Path(directory) / CHECKPOINT, owner != self.trial_id
        if not self.trial.ready or not (other or file.exists()):
            return  # out of memory while it was built, now or when there was nothing to save
        self.trial.load(file, inherit=other)
        self._exploited = owner if other else None

    def go_on(self, file: str | Path) -> int:
        """Go on from a checkpoint of this trial's, which another experiment of Ray's has kept.

        Returns:
            How many results the trial has given up to there.

        Raises:
            CheckpointError: If it does not hold the weights and λ that were saved.
        """
        if not self.trial.ready:  # out of memory while it was built
            return 0
        self.trial.load(file)
        return math.ceil(self.trial.joint.outer_steps / self.trial.budget.eval_every)

    def close(self) -> None:
        """Free the memory."""
        self.trial.cleanup()


def allotted_device(wanted: str) -> str:
    """Return the device for this process, and limit it to its part of a GPU.

    What counts is what Ray has allotted, not what PyTorch can see: a trial without a GPU sees all
    of them.

    Raises:
        UsageError: If a GPU was allotted and PyTorch cannot use it, or wanted and not allotted.
    """
    if not ray.is_initialized():
        return wanted  # not in one of Ray's processes
    context = ray.get_runtime_context()
    allotted = bool(context.get_accelerator_ids().get("GPU"))
    if wanted == "cpu" or (wanted == "auto" and not allotted):
        return "cpu"
    if not allotted:
        raise UsageError(
            f"device {wanted} was asked for, but the trial was allotted no GPU: wrap the trainable "
            'in tune.with_resources(..., {"gpu": 1}), or pass --gpus-per-trial 1'
        )
    if torch.cuda.is_available():
        part = float(context.get_assigned_resources().get("GPU", 1.0))
        if part < 1.0:
            torch.cuda.set_per_process_memory_fraction(part, 0)
        return "cuda:0"  # Ray shows the process its own GPUs only, counted from 0
    if wanted != "auto" or gpu_is_plugged_in():
        raise UsageError(
            "the trial was allotted a GPU, but PyTorch here cannot use it: is this a build "
            f"without CUDA ({torch.__version__}), or an old driver?"
        )
    warnings.warn(
        "Ray counts GPUs here, but there is none: the trial runs on the CPU", stacklevel=2
    )
    return "cpu"
