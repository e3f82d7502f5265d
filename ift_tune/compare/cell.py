"""One search of a comparison: an arm with a seed, until its budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ift_tune.base.randomness import derive_seed
from ift_tune.compare.arms import Arm, Search
from ift_tune.compare.comparison import Comparison, SearchState, search_state
from ift_tune.joint.callbacks import Callback
from ift_tune.joint.config import Budget
from ift_tune.search.loop import StudyLoop, StudyPlan
from ift_tune.search.objective import PlannedObjective
from ift_tune.search.plan import TrialPlan
from ift_tune.search.samplers import GridFactory, SamplerFactory, make_pruner, sampler_factory
from ift_tune.search.work import Worker
from ift_tune.trial.runner import Interrupt
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

    def run(
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
    ) -> None:
        """Run its trials, or go on with them, until the budget is spent.

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

        Raises:
            Interrupted: If the user asked to stop.
            Exception: Whatever the problem raises.
        """
        plan = self._plan(comparison, directory, facts, device, joint_callbacks)
        study = plan.open(join=True)
        if plan.search.first is not None:
            study.enqueue_trial(dict(plan.search.first), skip_if_exists=True)
        StudyLoop(
            plan, study, worker, callbacks=callbacks, interrupt=interrupt, on_done=on_done
        ).run()

    def _plan(
        self,
        comparison: Comparison,
        directory: Path,
        facts: dict[str, Any],
        device: str,
        callbacks: Sequence[Callback] = (),
    ) -> _CellPlan:
        problem = comparison.problem_factory(comparison.config, torch.device("cpu"), self.seed)
        search = self.arm.search(comparison, problem.hyper)
        sampling_seed = derive_seed(self.seed, "search")
        n_trials = search.n_trials
        sampler: SamplerFactory
        if isinstance(search.sampler, str):
            sampler = sampler_factory(search.sampler)
        elif callable(search.sampler):
            sampler = search.sampler
        else:
            sampler = grid = GridFactory(search.sampler, sampling_seed)
            n_trials = min(len(grid), search.n_trials)
        trials = TrialPlan(
            comparison.problem_factory,
            search.space,
            Budget(outer_steps=1),  # the arm gives each trial its own
            comparison.config,
            sampling_seed,
            device,
            comparison.metric,
            callbacks,
        )
        return _CellPlan(
            trials=trials,
            directory=directory,
            facts=facts | {"arm": self.arm.name},
            storage=None,
            name=directory.name,
            sampler=sampler,
            pruner=make_pruner(search.pruner),
            n_trials=n_trials,
            cell=self,
            comparison=comparison,
            search=search,
        )


@dataclass(frozen=True)
class _CellPlan(StudyPlan):
    """The study of a cell."""

    cell: Cell = field(kw_only=True)
    comparison: Comparison = field(kw_only=True)
    search: Search = field(kw_only=True)

    def search_state(self, run: RunDirectory, before: int | None = None) -> SearchState:
        """Return how the search stands before a trial, or now."""
        facts = {int(f["trial"]): f for record in run.records() if (f := record.facts())}
        return search_state(facts, self.comparison.cost, before)

    def enough(self, run: RunDirectory, taken: int) -> bool:
        """Return whether the trials are all there, or the budget is spent.

        A trial that could do nothing, for want of budget or of memory, is the last.
        """
        now = self.search_state(run)
        return now.exhausted or now.spent >= self.comparison.limit or super().enough(run, taken)

    def objective(
        self, run: RunDirectory, callbacks: Sequence[Callback], interrupt: Interrupt
    ) -> PlannedObjective:
        """Return what runs a trial within what is left."""
        return _CellObjective(self, run, callbacks, interrupt)


class _CellObjective(PlannedObjective):
    def __init__(
        self,
        plan: _CellPlan,
        run: RunDirectory,
        callbacks: Sequence[Callback],
        interrupt: Interrupt,
    ) -> None:
        super().__init__(
            plan.trials, run=run, facts=plan.facts, callbacks=callbacks, interrupt=interrupt
        )
        self._cell_plan, self._directory = plan, run

    def make(self, point: dict[str, Any], number: int) -> Trial:
        """Return the trial, with what the earlier ones have left of the budget."""
        plan = self._cell_plan
        return plan.cell.arm.trials.trial(
            plan.comparison,
            point,
            plan.search_state(self._directory, before=number),
            seed=plan.cell.seed,
            device=plan.trials.device,
            callbacks=plan.trials.callbacks,
        )
