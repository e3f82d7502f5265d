"""One trial of the outer search: an inner IFT optimisation, its budget, and how it ends."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from ift_tune.base.environment import peak_memory_bytes, reset_peak_memory, resolve_device
from ift_tune.base.errors import CheckpointError, NonFiniteError, UsageError
from ift_tune.base.status import SolveStatus, StopReason
from ift_tune.base.views import View
from ift_tune.joint.callbacks import Callback, joint_callbacks
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.joint.cost import FORWARD
from ift_tune.joint.health import HEALTH_COLUMNS, val_test_gap
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.problem import BilevelProblem
from ift_tune.trial.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from ift_tune.trial.trial_status import constants

ProblemFactory: TypeAlias = Callable[[MetaConfig, torch.device, int], BilevelProblem]
"""``factory(config, device, seed)``: a plain importable callable, so that it travels."""


OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


PATIENCE = 5  # unusable hypergradients in a row after which a trial counts as diverged


class Trial:
    """`setup`, then `step` until `stop_reason` is set, then `finish`.

    Attributes:
        config: The meta-hyperparameters.
        budget: When to stop, and what to measure.
        seed: Of the problem and of the run.
        device: Where it runs.
        callbacks: What `setup` gives the optimiser.
        joint: The optimiser, after `setup`.
        metrics: The latest value of everything measured.
        stop_reason: Why the trial ended; None while it runs.
    """

    def __init__(
        self,
        problem_factory: ProblemFactory,
        config: MetaConfig,
        budget: Budget,
        *,
        seed: int = 0,
        device: str | torch.device = "auto",
        metric: str | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Describe the trial; nothing is built before `setup`.

        Args:
            problem_factory: Builds the problem on a device.
            config: The meta-hyperparameters.
            budget: The length.
            seed: The same seed gives the same trial, to the bit on the CPU.
            device: ``"auto"``, ``"cpu"``, ``"cuda:0"``, ...
            metric: The search metric to minimise; default: ``search_error`` where the problem
                measures an error, else ``search_loss``.
            callbacks: Their hooks of the optimisation are called; those of the search belong to
                what drives trials, such as `run_study`.
        """
        self._factory = problem_factory
        self.config, self.budget, self.seed = config, budget, seed
        self.device = resolve_device(device)
        self._metric = metric
        self.callbacks: Sequence[Callback] = joint_callbacks(callbacks)
        self.metrics: dict[str, Any] = {}
        self.stop_reason: StopReason | None = None
        self._seconds = 0.0
        self._search_examples = 0

    def setup(self) -> None:
        """Build the problem and the optimiser."""
        reset_peak_memory(self.device)
        self.joint = JointOptimizer(
            self._build(), self.config, seed=self.seed, callbacks=self.callbacks
        )
        if self.budget.gradient_equivalents is not None:
            self._search_examples = self.joint.count_examples("search")

    def step(self) -> dict[str, Any] | None:
        """Take one outer step, evaluate if it is time, and decide whether the trial is over.

        Returns:
            A row of the `steps` table; None if the step could not be completed, in which case
            `stop_reason` says why.
        """
        started = time.perf_counter()
        try:
            row: dict[str, Any] = {"step": self.joint.outer_steps + 1, **self._advance()}
            due = self.joint.outer_steps % self.budget.eval_every == 0
            if self.joint.skips >= PATIENCE:
                nonfinite = self.joint.status is SolveStatus.NONFINITE
                self.stop_reason = StopReason.NONFINITE if nonfinite else StopReason.DIVERGED
            elif self._spent(started, due):
                self.stop_reason = StopReason.DONE
            if self.stop_reason or due:
                row |= self._evaluate()
                row["val_test_gap"] = val_test_gap(row)
        except NonFiniteError:
            self.stop_reason = StopReason.NONFINITE
            return None
        except OUT_OF_MEMORY:
            self.stop_reason = StopReason.OOM
            return None
        finally:
            self._seconds += time.perf_counter() - started
        row["solve_status"] = self.joint.status.value if self.joint.status else None
        row["wall_seconds"] = self._seconds
        row["peak_memory_bytes"] = self._peak()
        self.metrics |= row
        return dict.fromkeys(HEALTH_COLUMNS) | row

    @property
    def ready(self) -> bool:
        """Whether `setup` has been called, and `cleanup` not yet."""
        return hasattr(self, "joint")

    @property
    def metric(self) -> str:
        """The column that the outer search minimises.

        Raises:
            UsageError: If the problem does not measure it.
        """
        if self._metric is None:
            return "search_error" if "search_error" in self.metrics else "search_loss"
        measured = sorted(k for k in self.metrics if k.startswith("search_"))
        if measured and self._metric not in measured:
            raise UsageError(f"{self._metric} is not measured; choose from {', '.join(measured)}")
        return self._metric

    @property
    def value(self) -> float | None:
        """The latest value of `metric`; None before the first evaluation."""
        value = self.metrics.get(self.metric)
        return None if value is None else float(value)

    @property
    def retrains(self) -> bool:
        """Whether `finish` will train again."""
        return self.budget.retrain and self.stop_reason is StopReason.DONE

    def found(self) -> dict[str, Any]:
        """Return the state of the hyperparameters that the trial has come to."""
        return self.joint.problem.hyper.state_dict()

    def views(self) -> list[View]:
        """Return pictures of the hyperparameters that `found` returns."""
        return self.joint.problem.views()

    def constants(self) -> dict[str, Any]:
        """Return what is the same in all rows of the trial."""
        return constants(self.config, self.seed, str(self.device))

    def totals(self) -> dict[str, float]:
        """Return what has been spent so far, by a step that could not be completed too."""
        if not self.ready:
            return {}
        return {
            "gradient_equivalents": self.joint.cost.gradient_equivalents,
            "hvps": float(self.joint.cost.hvps),
            "wall_seconds": self._seconds,
        }

    def finish(self) -> dict[str, Any]:
        """Return what is measured once, at the end: what was learned, and the retrained metrics.

        Nothing is measured of a trial that did not come to its end.
        """
        if self.stop_reason is not StopReason.DONE:
            return {}
        return self.learned() | self.retrain() if self.retrains else self.learned()

    def learned(self) -> dict[str, Any]:
        """Return what λ has become: finite numbers and a sentence, as ``learned_<name>``."""
        problem = self.joint.problem
        numbers = {k: float(v) for k, v in problem.summary().items()}
        found: dict[str, Any] = {k: v for k, v in numbers.items() if math.isfinite(v)}
        if words := problem.words():
            found["words"] = words
        return {f"learned_{k}": v for k, v in found.items()}

    def retrain(self) -> dict[str, float]:
        """Train afresh, from the same initial weights, with λ frozen as found.

        The weights of the joint run followed λ's whole path and may remember the validation data
        (Vicol et al., ICML 2022); these have only the λ that came out.

        Returns:
            Test metrics as ``retrained_test_error``, ``retrained_test_loss``, ...; none if the
            training is not finite or out of memory.
        """
        problem = self._build()
        problem.hyper.load_state_dict(self.joint.problem.hyper.state_dict())
        fresh = JointOptimizer(problem, self.config, seed=self.seed)
        try:
            fresh.train_weights(self.joint.inner_steps)
            found = fresh.evaluate("test")
        except (NonFiniteError, *OUT_OF_MEMORY):
            return {}
        return {f"retrained_{key}": value for key, value in found.items()}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save everything that `load` needs to go on, atomically."""
        save_checkpoint(path, self._state())

    def load(self, path: str | os.PathLike[str], *, inherit: bool = False) -> None:
        """Go on from a checkpoint, after `setup`.

        Args:
            path: What `save` wrote.
            inherit: Whether it is another trial's, whose weights, λ, progress and cost this one
                takes over; see `JointOptimizer.inherit`.

        Raises:
            CheckpointError: If it cannot be read, is of another problem or configuration, or does
                not hold what was saved.
        """
        state = load_checkpoint(path)
        if inherit:
            self.joint.inherit(state["joint"])
        elif state["config"] == self.config.to_flat():
            self.joint.load_state_dict(state["joint"])
        else:
            raise CheckpointError(f"{path} is of a trial with other meta-hyperparameters")
        if self.fingerprint() != state["fingerprint"]:
            raise CheckpointError(f"{path} does not hold the weights that were saved")
        self._load_state(state)

    def fingerprint(self) -> str:
        """Return a hash of the weights and of λ."""
        problem = self.joint.problem
        return fingerprint([*problem.weights(), *problem.hypers()])

    def cleanup(self) -> None:
        """Free the problem's memory, on the GPU too."""
        if self.ready:
            del self.joint
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _peak(self) -> int | None:
        """Return the most memory so far: a retraining on the way begins the count anew."""
        now, before = peak_memory_bytes(self.device), self.metrics.get("peak_memory_bytes")
        return now if now is None or before is None else max(now, int(before))

    def _state(self) -> dict[str, Any]:
        return {
            "joint": self.joint.state_dict(),
            "metrics": self.metrics,
            "seconds": self._seconds,
            "config": self.config.to_flat(),
            "fingerprint": self.fingerprint(),
            "stop_reason": None if self.stop_reason is None else self.stop_reason.value,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.metrics, self._seconds = state["metrics"], state["seconds"]
        reason = state["stop_reason"]
        self.stop_reason = None if reason is None else StopReason(reason)

    def _build(self) -> BilevelProblem:
        return self._factory(self.config, self.device, self.seed)

    def _evaluate(self) -> dict[str, float]:
        found = self.joint.evaluate("search", charge=True) | self.joint.evaluate("test")
        found["gradient_equivalents"] = self.joint.cost.gradient_equivalents
        return found

    def _advance(self) -> dict[str, float]:
        """Take one step, and return its part of the row."""
        return self.joint.step()

    def _max_step_cost(self) -> float:
        """Return the most that the next step can cost."""
        return self.joint.max_step_cost()

    def _spent(self, started: float, due: bool) -> bool:
        """Whether a limit is reached, or one more outer step could go past the counted one."""
        b = self.budget
        seconds = self._seconds + time.perf_counter() - started
        if b.outer_steps is not None and self.joint.outer_steps >= b.outer_steps:
            return True
        if b.seconds is not None and seconds >= b.seconds:
            return True
        return not self._affordable(due)

    def _affordable(self, due: bool) -> bool:
        """Return whether one more step stays within the counted limit.

        The limit covers the search split's evaluations, of this step if it is `due`, and after the
        next step, which may turn out to be the last.
        """
        limit = self.budget.gradient_equivalents
        if limit is None:
            return True
        evaluation = FORWARD * self._search_examples / self.joint.first_batch("train")
        spent = self.joint.cost.gradient_equivalents + evaluation * due
        return spent + self._max_step_cost() + evaluation <= limit
