"""Callbacks: one family for the optimisation inside a trial and for the search around it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ift_tune.base.arguments import require_list
from ift_tune.base.errors import UsageError
from ift_tune.base.objectives import Objectives
from ift_tune.base.status import Outcome
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer


@dataclass(frozen=True)
class RunFacts:
    """What a run, a search or a comparison is about to do.

    Attributes:
        out: The run directory.
        task: Name in the tables.
        budget: Of each trial; None where trials of several lengths share one.
        objectives: What trials are judged by.
        total: How many trials, or searches of a comparison, there shall be in the end.
        finished: How many of them there are already.
        varied: The keys that a search varies.
        searches: Whether it is a comparison, which counts searches.
    """

    out: Path
    task: str
    budget: Budget | None
    objectives: Objectives
    total: int
    finished: int = 0
    varied: tuple[str, ...] = ()
    searches: bool = False


class Callback:
    """Hooks into a run; override what is needed. None runs inside the inner loop.

    Pass them as ``callbacks=[...]`` to `JointOptimizer`, `Trial`, `IFTObjective`, `run_study`,
    `run_ray`, `ray_trainable` or `run_comparison`.

    The hooks of the optimisation (`on_outer_step_begin`, `on_hypergradient`, `on_outer_step_end`)
    run in the process of the trial, those of the search (all others) in the process that was
    called. Where these are different processes, as with several workers or with
    Ray, a callback that overrides hooks of the optimisation is pickled and each process has a copy;
    one that overrides none of them stays where it is, and need not be picklable.

    Example:
        >>> import ift_tune
        >>> class Norms(ift_tune.Callback):
        ...     def on_hypergradient(self, joint, result):
        ...         print(f"step {joint.outer_steps}: {result.grads[0].norm():.2f}")
        >>> problem = ift_tune.testing.Quadratic()
        >>> joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig(), callbacks=[Norms()])
        >>> for _ in range(2):
        ...     metrics = joint.step()
        step 0: 12.35
        step 1: 12.27
    """

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        """Run before the inner steps of an outer step."""

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        """Run with a fresh hypergradient, before λ is updated."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Run with what `JointOptimizer.step` is about to return; additions are kept."""

    def on_run_begin(self, run: RunFacts) -> None:
        """Run once before the trials of a run, a search or a comparison."""

    def on_run_end(self) -> None:
        """Run when that is over, also by an error or by Ctrl-C."""

    def on_search_end(self, name: str, finished: int, total: int) -> None:
        """Run when a search of a comparison has ended: how many of all have."""

    def on_resources(self, text: str) -> None:
        """Run once before the trials, with what they are given of the machine or the cluster."""

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Run when a trial begins; `first_step` is above 0 when it is resumed."""

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Run after every outer step of a trial with its row of the `steps` table."""

    def on_retraining(self, number: int, inner_steps: int) -> None:
        """Run before a finished trial is trained again with λ frozen, which can take a while.

        With Ray Tune it is run when that has been done: the result says so.
        """

    def on_baseline_step(self, row: dict[str, Any]) -> None:
        """Run with each evaluation of the plain training beside a run, a row of its table."""

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Run when a trial has ended, before the next; where it raised, as `StopReason.FAILED`."""


class CallbackList(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        """Take the callbacks."""
        self.callbacks = list(callbacks)

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_outer_step_begin(joint)

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_hypergradient(joint, result)

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_outer_step_end(joint, metrics)

    def on_run_begin(self, run: RunFacts) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_run_begin(run)

    def on_run_end(self) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_run_end()

    def on_search_end(self, name: str, finished: int, total: int) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_search_end(name, finished, total)

    def on_resources(self, text: str) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_resources(text)

    def on_trial_begin(self, number: int, config: MetaConfig, first_step: int) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_trial_begin(number, config, first_step)

    def on_trial_step(self, number: int, row: dict[str, Any]) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_trial_step(number, row)

    def on_retraining(self, number: int, inner_steps: int) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_retraining(number, inner_steps)

    def on_baseline_step(self, row: dict[str, Any]) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_baseline_step(row)

    def on_trial_end(self, number: int, outcome: Outcome) -> None:
        """Call each."""
        for callback in self.callbacks:
            callback.on_trial_end(number, outcome)


@contextlib.contextmanager
def during(callbacks: Sequence[Callback], run: RunFacts) -> Iterator[None]:
    """Tell callbacks that a run begins and, however it does, that it ends."""
    with contextlib.ExitStack() as ends:
        for callback in callbacks:
            callback.on_run_begin(run)
            ends.callback(callback.on_run_end)
        yield


_JOINT_HOOKS = ("on_outer_step_begin", "on_hypergradient", "on_outer_step_end")


def joint_callbacks(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Return the callbacks that override a hook of the optimisation: what a trial's process needs.

    Raises:
        UsageError: If one is no `Callback`.
    """
    found: list[Callback] = []
    for callback in require_list("callbacks", callbacks, "ift_tune.Callback objects"):
        if not isinstance(callback, Callback):
            raise UsageError(f"callbacks must be instances of ift_tune.Callback, got {callback!r}")
        if isinstance(callback, CallbackList):
            found += joint_callbacks(callback.callbacks)
        elif any(getattr(type(callback), h) is not getattr(Callback, h) for h in _JOINT_HOOKS):
            found.append(callback)
    return tuple(found)
