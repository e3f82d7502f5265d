"""One search of a comparison: an arm with a seed, until its budget is spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ift_tune.base.interrupt import Interrupt
from ift_tune.base.objectives import Objectives
from ift_tune.base.randomness import derive_seed
from ift_tune.compare.arms import Arm, Search
from ift_tune.compare.comparison import Comparison, SearchState, search_state
from ift_tune.joint.callbacks import Callback
from ift_tune.problem.factory import build_problem
from ift_tune.search.loop import StudyLoop, StudyPlan
from ift_tune.search.plan import TrialSource
from ift_tune.search.pruners import make_pruner
from ift_tune.search.samplers import grid_factory, sampler_factory
from ift_tune.search.space import Space
from ift_tune.search.work import Worker
from ift_tune.trial.best import BEST
from ift_tune.trial.record import MODEL
from ift_tune.trial.tables import RunDirectory
from ift_tune.trial.trial import Trial


@dataclass(frozen=True)
class Cell:
    """An arm with a seed.

    Attributes:
        arm: The arm.
        seed: Of the splits, the initial weights and the sampler.
    """

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.arm.name} with seed {self.seed}"

    def directory(self, out: Path) -> Path:
        """Return its folder in that of the comparison."""
        return out / "cells" / f"{self.arm.name}-{self.seed:04d}"

    def loop(
        self,
        comparison: Comparison,
        directory: Path,
        facts: dict[str, Any],
        worker: Worker,
        *,
        device: str,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
        on_done: Callable[[int], None],
        joint_callbacks: Sequence[Callback] = (),
    ) -> StudyLoop:
        """Return what runs its trials, or goes on with them, until the budget is spent.

        Args:
            comparison: What it is part of.
            directory: Its folder.
            facts: Constant columns of the tables.
            worker: Who runs it.
            device: Where.
            callbacks: Their hooks of the search are called.
            interrupt: Looked at between outer steps.
            on_done: Called with the number of each trial that is finished.
            joint_callbacks: Their hooks of the optimisation are called.
        """
        trials = self.trials(comparison, directory, device, joint_callbacks)
        plan = self.plan(trials, facts)
        study = plan.open(join=True)
        plan.go_on(study)
        begun = len(study.get_trials(deepcopy=False))
        for point in trials.search.beginning[begun:]:  # a kill may have come between two of them
            study.enqueue_trial(dict(point))
        return StudyLoop(
            plan, study, worker, callbacks=callbacks, interrupt=interrupt, on_done=on_done
        )

    def trials(
        self,
        comparison: Comparison,
        directory: Path,
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> CellTrials:
        """Return where its trials come from; see `loop`."""
        problem = build_problem(
            comparison.problem_factory, comparison.config, torch.device("cpu"), self.seed
        )
        search = self.arm.search(comparison, problem.hyper)
        return CellTrials(self, comparison, search, directory, device, tuple(callbacks))

    def plan(self, trials: CellTrials, facts: Mapping[str, Any]) -> StudyPlan:
        """Return its study; see `loop`."""
        search, n_trials = trials.search, trials.search.n_trials
        if isinstance(search.sampler, str):
            sampler = sampler_factory(search.sampler)
        elif callable(search.sampler):
            sampler = search.sampler
        else:
            sampler = grid_factory(search.sampler)
            n_trials = min(math.prod(len(v) for v in search.sampler.values()), n_trials)
        return StudyPlan(
            source=trials,
            seed=derive_seed(self.seed, "search"),
            directory=trials.directory,
            facts={**facts, "arm": self.arm.name},
            storage=None,
            name=trials.directory.name,
            sampler=sampler,
            pruner=make_pruner(search.pruner),
            n_trials=n_trials,
        )


@dataclass(frozen=True)
class CellTrials(TrialSource):
    """The trials of a search, each within what the ones before it have left of the budget.

    Attributes:
        cell: The search.
        comparison: What it is part of.
        search: How the arm searches.
        directory: Its folder.
        device: Where its trials run.
        callbacks: With hooks of the optimisation.
    """

    cell: Cell
    comparison: Comparison
    search: Search
    directory: Path
    device: str
    callbacks: tuple[Callback, ...] = ()

    @property
    def space(self) -> Space | None:
        """The arm's."""
        return self.search.space

    @property
    def objectives(self) -> Objectives:
        """The comparison's metric."""
        return Objectives.of(self.comparison.metric, self.comparison.direction.value)

    def trial(self, point: Mapping[str, Any], number: int) -> Trial:
        """Return the trial, with what the earlier ones have left of the budget."""
        return self.cell.arm.trials.trial(
            self.comparison,
            point,
            self.search_state(before=number),
            seed=self.cell.seed,
            device=self.device,
            callbacks=self.callbacks,
        )

    def on(self, device: str) -> CellTrials:
        """Return the same trials on a device."""
        return replace(self, device=device)

    def exhausted(self) -> bool:
        """Return whether the budget is spent.

        A trial that could do nothing, for want of budget or of memory, is the last; and so is one
        that the others would have built on, and that has left nothing.
        """
        now = self.search_state()
        groundwork = self.cell.arm.trials.groundwork
        lacking = 0 < groundwork <= now.trials and now.kept is None
        return now.exhausted or lacking or now.spent >= self.comparison.limit

    def search_state(self, before: int | None = None) -> SearchState:
        """Return how the search stands before a trial, or now."""
        records = RunDirectory(self.directory, resume=True).records()
        facts = {int(f["trial"]): f for record in records if (f := record.facts())}
        state = search_state(facts, self.comparison.cost, before, self.direction)
        kept = self.directory / BEST / MODEL
        return replace(state, kept=kept) if kept.is_file() else state
