"""Which evaluation of the search split is a trial's result: the best, with what was best then."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from ift_tune.base.direction import Direction
from ift_tune.base.errors import require_integer
from ift_tune.base.status import FOUND_PREFIXES, StopReason
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.found import state_of
from ift_tune.trial.training import BaselineTraining

RETRAINED = "retrained_"
SCORES = ("search_", "test_")
"""How the columns begin that say what weights are worth."""
OF_THE_BEST = ("best_", *FOUND_PREFIXES)
"""How the columns begin that speak of the best evaluation so far."""
_MEASURED = (*SCORES, "train_", "val_")


class SelectingTrial(Protocol):
    """What a selection sees of its trial."""

    config: MetaConfig
    budget: Budget
    seed: int
    device: torch.device
    joint: JointOptimizer
    metrics: dict[str, Any]
    stop_reason: StopReason | None
    direction: Direction

    @property
    def metric(self) -> str:
        """The column that decides."""

    def learned(self) -> dict[str, Any]:
        """Return what λ has become."""

    def rebuild(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem built anew, with λ as found."""

    def retrain(self) -> dict[str, float]:
        """Train afresh with λ frozen as found; nothing if that breaks."""

    def train_plainly(self, training: BaselineTraining, patience: int | None) -> SelectingTrial:
        """Train afresh with λ frozen as found, and return that training when it is over."""


class Selection(abc.ABC):
    """Which evaluation of the search split is a trial's result: the best so far.

    It remembers the evaluations it has seen, so every trial takes a copy for itself. Rows with an
    evaluation have ``best_value`` and ``best_step`` so far.

    Attributes:
        first_step_free: Whether the first step is taken whatever it costs.
        keeps_broken: Whether what it has found is kept of a trial too that has broken off.
    """

    first_step_free: ClassVar[bool]
    keeps_broken: bool = False

    def __init__(self, patience: int | None = None) -> None:
        """Take how it ends.

        Args:
            patience: Steps after the best evaluation after which the trial ends; None: it goes on.
        """
        if patience is not None:
            require_integer("patience", patience, 1)
        self._patience = patience
        self._best: dict[str, Any] | None = None  # value, step, and what `remember` adds

    def note(self, trial: SelectingTrial, row: Mapping[str, Any]) -> None:
        """Note an evaluation, whose further `columns` come next."""
        value = row[trial.metric]
        if self._best is None or trial.direction.better(value, self._best["value"]):
            self._best = {"value": value, "step": row["step"], **self.remember(trial, row)}

    @abc.abstractmethod
    def remember(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept of the best evaluation so far, which this is."""

    def columns(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the further columns of an evaluated row, noted as metrics of the trial too."""
        known = self.best_columns()
        trial.metrics.update(known)
        return known

    def best_columns(self) -> dict[str, Any]:
        """Return the best value and its step; nothing before the first evaluation."""
        if self._best is None:
            return {}
        return {"best_value": self._best["value"], "best_step": self._best["step"]}

    def stops_early(self, step: int) -> bool:
        """Return whether no better evaluation is waited for after this step."""
        if self._patience is None or self._best is None:
            return False
        return step - int(self._best["step"]) >= self._patience

    @property
    def value(self) -> float | None:
        """The best value; None before the first evaluation."""
        return None if self._best is None else float(self._best["value"])

    @abc.abstractmethod
    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return the state of the hyperparameters at the evaluation that is the result."""

    def model(self) -> dict[str, Any] | None:
        """Return the state of the model at that evaluation; None if it is not kept."""
        return None

    @abc.abstractmethod
    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether `finish` will train again."""

    def retraining(
        self, trial: SelectingTrial, row: Mapping[str, Any] | None = None
    ) -> tuple[BaselineTraining, int | None] | None:
        """Return the one training that `retrain` is about to take, and its patience.

        Args:
            trial: The trial.
            row: The evaluation whose `columns` come next; None: the trial is over.

        Returns:
            None if it takes none now, or something else.
        """
        return None

    @abc.abstractmethod
    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Train afresh with λ frozen as found, and return what is measured."""

    @abc.abstractmethod
    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what is measured once, at the end."""

    def totals(self) -> dict[str, Any]:
        """Return further columns of the trial as a whole."""
        return self.best_columns()

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed trial needs, as entries of the trial's checkpoint."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's entries."""


class BestModel(Selection):
    """The best evaluation counts; the model and λ of that moment are kept, on the CPU.

    A trial that came to its end is retrained with that λ, if its budget asks for it, for at most as
    many inner steps as it took, the best evaluation of which is the score. The trial as a whole has
    the measurements of its best evaluation.

    A trial takes its first step whatever that costs: it would have no value without one.
    """

    first_step_free = True

    def remember(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what was measured, and the state of the model and of λ."""
        problem = trial.joint.problem
        return {
            "measured": {k: v for k, v in row.items() if k.startswith(_MEASURED)},
            "model": state_of(problem.model),
            "hyper": state_of(problem.hyper),
        }

    def found(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return λ at the best evaluation; as it is, before the first."""
        problem = trial.joint.problem
        return state_of(problem.hyper) if self._best is None else dict(self._best["hyper"])

    def model(self) -> dict[str, Any] | None:
        """Return the model's state at the best evaluation; None before the first."""
        return None if self._best is None else dict(self._best["model"])

    def retrains(self, trial: SelectingTrial) -> bool:
        """Return whether the trial came to its end, and its budget asks for it."""
        return trial.budget.retrain and trial.stop_reason is StopReason.DONE

    def retraining(
        self, trial: SelectingTrial, row: Mapping[str, Any] | None = None
    ) -> tuple[BaselineTraining, int | None] | None:
        """Return a training of as many inner steps as the trial took, once that is over."""
        return self._whole(trial) if row is None and self.retrains(trial) else None

    def _whole(self, trial: SelectingTrial) -> tuple[BaselineTraining, int | None]:
        training = BaselineTraining(trial.joint.inner_steps)
        return training, training.patience(trial.budget.patience, trial.config.inner_steps)

    def retrain(self, trial: SelectingTrial) -> dict[str, float]:
        """Train for as many inner steps as the trial took, and return the score of the best."""
        plain = trial.train_plainly(*self._whole(trial))
        return score_of(plain) if plain.stop_reason is StopReason.DONE else {}

    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what was learned and measured at the best evaluation of a finished trial."""
        if trial.stop_reason is not StopReason.DONE or self._best is None:
            return {}
        score = trial.retrain() if self.retrains(trial) else {}
        measured: dict[str, Any] = self._best["measured"]
        return measured | trial.learned() | score

    def totals(self) -> dict[str, Any]:
        """Return the best value, its step, and what was measured there."""
        return {} if self._best is None else self._best["measured"] | self.best_columns()

    def state_dict(self) -> dict[str, Any]:
        """Return the best evaluation."""
        return {"best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; checkpoints of before it counted say nothing of the best."""
        self._best = state.get("best")


class Groundwork(BestModel):
    """What other trials of a search build on: its model and λ are kept, and it is no result itself.

    It has no value, so that no search chooses it: its weights have not been trained as those of the
    trials are that it would be compared with.
    """

    first_step_free = False
    keeps_broken = True

    def columns(self, trial: SelectingTrial, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return none: there is no best to speak of."""
        return {}

    @property
    def value(self) -> float | None:
        """None."""
        return None

    def retrains(self, trial: SelectingTrial) -> bool:
        """Return False: others do."""
        return False

    def finish(self, trial: SelectingTrial) -> dict[str, Any]:
        """Return what was learned up to the best evaluation."""
        return {} if self._best is None else trial.learned()

    def totals(self) -> dict[str, Any]:
        """Return none."""
        return {}


def score_of(plain: SelectingTrial) -> dict[str, float]:
    """Return ``retrained_...`` at the best evaluation of a plain training; empty without one."""
    return {k: v for k, v in plain.metrics.items() if k.startswith(RETRAINED)}
