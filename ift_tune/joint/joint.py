"""Joint optimisation of weights and hyperparameters: T inner steps, one outer step, again."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from ift_tune.base.errors import CheckpointError, NonFiniteError, UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import Hypergradient, WarmStart, hypergradient
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.cost import FORWARD, GRADIENT, HVP, Cost
from ift_tune.joint.health import health
from ift_tune.joint.optimizers import make_optimizer
from ift_tune.problem.batches import Batch, Cursor, batch_size, once_through, to_device
from ift_tune.problem.modes import (
    captured_outputs,
    evaluating,
    preserved_buffers,
    without_gradients,
)
from ift_tune.problem.problem import BilevelProblem


class OuterStepHooks(Protocol):
    """What a `JointOptimizer` calls in each outer step; every `Callback` has them."""

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        """Run before the inner steps."""

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        """Run with a fresh hypergradient, before λ is updated."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Run with what `JointOptimizer.step` is about to return; additions are kept."""


class JointOptimizer:
    """Alternates `inner_steps` weight updates with one hyperparameter update.

    Lorraine, Vicol, Duvenaud 2020, algorithm 1. Both optimisers, the random numbers and the
    loaders' positions belong to this object, so two of them never disturb each other, and one that
    was saved and loaded goes on with the same bits on the CPU.

    Attributes:
        problem: The problem; its model and hyperparameters are updated in place.
        config: The meta-hyperparameters.
        outer_steps: Outer steps taken.
        inner_steps: Inner steps taken.
        status: How the last hypergradient came out; None before the first.
        skips: Hypergradients in a row that were unusable, so that λ was left alone.
        cost: What has been spent so far.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: MetaConfig,
        *,
        seed: int = 0,
        callbacks: Sequence[OuterStepHooks] = (),
    ) -> None:
        """Check the problem and build the optimisers.

        Args:
            problem: What to optimise.
            config: How.
            seed: Of the random numbers drawn while stepping (dropout, shuffling by the loaders).
            callbacks: Called in order.

        Raises:
            UsageError: Listing everything that is wrong with the problem.
        """
        problem.validate()
        self.problem, self.config, self.callbacks = problem, config, list(callbacks)
        self.outer_steps = self.inner_steps = self.skips = 0
        self.status: SolveStatus | None = None
        self._weights, self._hypers = problem.weights(), problem.hypers()
        self.device = self._weights[0].device
        self._inner = make_optimizer(config.inner_optimizer, self._weights, config.inner_lr)
        self._outer = make_optimizer(config.meta_optimizer, self._hypers, config.meta_lr)
        self._random = RandomStream(seed, self.device)
        # Search and test are never walked, but their generators' states are saved with the rest.
        self._cursors = {
            name: Cursor(name, loader, self.device)
            for name, loader in vars(problem.splits).items()
            if loader is not None
        }
        self._warm = WarmStart()
        self._batch_sizes: dict[str, int] = {}
        self._val_share: float | None = None  # of all examples, once it is asked for
        self.cost = Cost()

    def step(self) -> dict[str, float]:
        """Take `config.inner_steps` inner steps and one outer step.

        Returns:
            Finite floats: losses (and errors) on the batches of the outer step, the health
            columns, and the cost so far. `train_loss` is without the closed-form penalty.

        Raises:
            NonFiniteError: If a loss is infinite or NaN; λ is as before the step.
        """
        for callback in self.callbacks:
            callback.on_outer_step_begin(self)
        with self._random.active():
            self._train_weights(self.config.inner_steps)
            metrics = self._update_hypers()
        self.outer_steps += 1
        metrics["gradient_equivalents"] = self.cost.gradient_equivalents
        metrics["hvps"] = float(self.cost.hvps)
        for callback in self.callbacks:
            callback.on_outer_step_end(self, metrics)
        # What callbacks add may be NumPy's or a tensor, which no checkpoint can be loaded with.
        return {name: float(value) for name, value in metrics.items()}

    def baseline_step(self, *, train_on_val: bool = False) -> dict[str, float]:
        """Take the inner steps of an outer step and leave λ as it is: plain training.

        Args:
            train_on_val: Whether to train on the validation split too: the mean of `train_loss` and
                `val_loss`, weighted by the numbers of examples.

        Returns:
            The cost so far.
        """
        if train_on_val and self._val_share is None:
            val = self.count_examples("val")
            self._val_share = val / (val + self.count_examples("train"))
        with self._random.active():
            share = self._val_share or 0.0
            self._train_weights(self.config.inner_steps, val_share=share if train_on_val else 0.0)
        self.outer_steps += 1
        return {"gradient_equivalents": self.cost.gradient_equivalents, "hvps": 0.0}

    def train_weights(self, steps: int) -> None:
        """Take `steps` inner steps with λ as it is: plain training."""
        with self._random.active():
            self._train_weights(steps)

    def max_step_cost(self, *, plain: bool = False, train_on_val: bool = False) -> float:
        """Return the most that the next step can cost, in gradient-equivalents.

        It takes the first batch of each loader for its largest.

        Args:
            plain: Whether it will be a `baseline_step`.
            train_on_val: Whether that trains on the validation split too.
        """
        train, steps = self.first_batch("train"), self.config.inner_steps
        if plain:
            return GRADIENT * steps * (1.0 + train_on_val * self.first_batch("val") / train)
        inverse = self.config.inverse
        products = inverse.max_hvps(
            sum(w.numel() for w in self._weights), self._warm.eigenpair is not None
        )
        products += 1 + self.config.warm_start  # the mixed product, the residual of the guess
        curvature = self.first_batch("curvature") if "curvature" in self._cursors else train
        outer = (GRADIENT + HVP * products) * curvature + GRADIENT * self.first_batch("val")
        return GRADIENT * steps + outer / train

    def evaluate(self, split: str, *, charge: bool = False) -> dict[str, float]:
        """Return the problem's metrics over a whole split, as ``{"<split>_<metric>": mean}``.

        Args:
            split: ``"train"``, ``"val"``, ``"search"`` or ``"test"``.
            charge: Whether to count the cost. A split that decides something (search) is charged;
                one that is only reported is not.

        Raises:
            NonFiniteError: If a metric is infinite or NaN.
        """
        totals: dict[str, float] = {}
        examples = 0
        with self._random.aside(), torch.no_grad(), evaluating(self.problem.model):
            for batch in once_through(getattr(self.problem.splits, split)):
                size = batch_size(batch)
                examples += size
                for name, value in self.problem.metrics(to_device(batch, self.device)).items():
                    totals[name] = totals.get(name, 0.0) + float(value) * size
        if examples == 0:
            raise UsageError(f"the {split} loader yields no batch")
        if charge:
            self.cost.add(FORWARD, examples)
        return _finite({f"{split}_{name}": total / examples for name, total in totals.items()})

    def count_examples(self, split: str) -> int:
        """Return the number of examples in one pass over a split."""
        with self._random.aside():
            loader = getattr(self.problem.splits, split)
            return sum(batch_size(batch) for batch in once_through(loader))

    def first_batch(self, split: str) -> int:
        """Return the number of examples in the first batch of a split."""
        if split not in self._batch_sizes:
            batches = once_through(getattr(self.problem.splits, split))
            with self._random.aside(), contextlib.closing(batches):
                self._batch_sizes[split] = batch_size(next(batches))
        return self._batch_sizes[split]

    def _train_weights(self, steps: int, *, val_share: float = 0.0) -> None:
        """The inner loop: λ is constant, and only the data loss goes through autograd.

        The validation loss is part of it at weight `val_share`, 0 but for train_on_val training.
        """
        problem, weights = self.problem, self._weights
        penalty = problem.penalty()
        with without_gradients(self._hypers):
            for _ in range(steps):
                batch = self._next("train")
                for weight in weights:
                    weight.grad = None
                loss = problem.train_loss(batch)
                if val_share:
                    val_batch = self._next("val")
                    loss = (1.0 - val_share) * loss + val_share * problem.val_loss(val_batch)
                    self.cost.add(GRADIENT, batch_size(val_batch))
                loss.backward()  # type: ignore[no-untyped-call]
                if penalty is not None:
                    penalty.add_gradient_([_gradient(w) for w in weights], weights)
                self._inner.step()
                self.cost.add(GRADIENT, batch_size(batch))
        self.inner_steps += steps

    def _update_hypers(self) -> dict[str, float]:
        """The outer step: a hypergradient at the present weights, and one step along it."""
        train_batch = self._next("curvature" if "curvature" in self._cursors else "train")
        val_batch = self._next("val")
        result = self._hypergradient(train_batch, val_batch)
        metrics = _finite(
            {"train_loss": float(result.train_loss), "val_loss": float(result.val_loss)}
            | self._reported(train_batch, val_batch)
        )
        for callback in self.callbacks:
            callback.on_hypergradient(self, result)
        self.status = result.status
        if result.usable:
            for hyper, gradient in zip(self._hypers, result.grads, strict=True):
                hyper.grad = gradient
            self._outer.step()
            self._outer.zero_grad(set_to_none=True)
            self._warm = (
                result.warm
                if self.config.warm_start
                else WarmStart(eigenpair=result.warm.eigenpair)
            )
            self.skips = 0
        else:
            self._warm = WarmStart()
            self.skips += 1
        self._charge_outer(result, batch_size(train_batch), batch_size(val_batch))
        return metrics | health(result)

    def _hypergradient(self, train_batch: Batch, val_batch: Batch) -> Hypergradient:
        problem = self.problem
        gauss_newton = self.config.curvature == "gauss_newton"
        capture: AbstractContextManager[list[Tensor]] = (
            captured_outputs(problem.model) if gauss_newton else nullcontext([])
        )
        with safe_kernels(problem.model):
            with preserved_buffers(problem.model), capture as outputs:
                train_loss = problem.train_loss(train_batch)
            with evaluating(problem.model):
                val_loss = problem.val_loss(val_batch)
            return hypergradient(
                train_loss,
                val_loss,
                problem.model,
                problem.hyper,
                inverse=self.config.inverse,
                penalty=problem.penalty(),
                outputs=outputs[0] if gauss_newton else None,
                warm=self._warm,
            )

    def _charge_outer(self, result: Hypergradient, train_examples: int, val_examples: int) -> None:
        products = result.stats.hvps + 1  # and the mixed product
        self.cost.add(GRADIENT + HVP * products, train_examples)
        self.cost.add(GRADIENT, val_examples)
        self.cost.hvps += result.stats.hvps

    def _reported(self, train_batch: Batch, val_batch: Batch) -> dict[str, float]:
        """Return the metrics other than the loss on the outer step's batches, at its weights."""
        if type(self.problem).metrics is BilevelProblem.metrics:
            return {}
        found: dict[str, float] = {}
        with torch.no_grad(), evaluating(self.problem.model):
            for split, batch in (("train", train_batch), ("val", val_batch)):
                values = self.problem.metrics(batch)
                found |= {f"{split}_{k}": float(v) for k, v in values.items() if k != "loss"}
        return found

    def _next(self, split: str) -> Batch:
        batch = to_device(self._cursors[split].next(), self.device)
        if split == "train" and not self.cost.unit:
            self.cost.unit = batch_size(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything a resumed run needs, as tensors and plain values."""
        eigenpair = self._warm.eigenpair
        return copy.deepcopy(
            {
                "outer_steps": self.outer_steps,
                "inner_steps": self.inner_steps,
                "skips": self.skips,
                "status": None if self.status is None else self.status.value,
                "model": self.problem.model.state_dict(),
                "hyper": self.problem.hyper.state_dict(),
                "optimizers": [self.config.inner_optimizer, self.config.meta_optimizer],
                "inner_optimizer": self._inner.state_dict(),
                "outer_optimizer": self._outer.state_dict(),
                "warm_solution": self._warm.solution,
                "warm_eigenpair": None
                if eigenpair is None
                else [eigenpair.value, eigenpair.vector],
                "cost": asdict(self.cost),
                "cursors": {name: cursor.state_dict() for name, cursor in self._cursors.items()},
                "random": self._random.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: If it is not the state of this problem and configuration.
        """
        state = copy.deepcopy(state)
        try:
            if state["optimizers"] != [self.config.inner_optimizer, self.config.meta_optimizer]:
                raise ValueError(f"its optimisers are {' and '.join(state['optimizers'])}")
            self.problem.model.load_state_dict(state["model"])
            self.problem.hyper.load_state_dict(state["hyper"])
            self._load_optimizer(self._inner, state["inner_optimizer"], self.config.inner_lr)
            self._load_optimizer(self._outer, state["outer_optimizer"], self.config.meta_lr)
            with self._random.active():
                for name, cursor in self._cursors.items():
                    cursor.load_state_dict(state["cursors"][name])
            self._random.load_state_dict(state["random"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"this state belongs to another problem or configuration: {error}"
            ) from error
        self._load_progress(state)
        self.skips = state["skips"]
        self.status = None if state["status"] is None else SolveStatus(state["status"])
        pair = to_device(state["warm_eigenpair"], self.device)
        solution = to_device(state["warm_solution"], self.device)
        self._warm = WarmStart(solution, None if pair is None else Eigenpair(*pair))

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over weights and λ from the state of a run with another configuration.

        What population based training calls an exploit. Progress and cost go on from that state,
        and so does the inner optimiser if it is of the same kind. λ's optimiser, the warm start and
        the random numbers begin afresh: they belonged to other settings.

        Raises:
            CheckpointError: If it is not the state of this problem.
        """
        state = copy.deepcopy(state)
        try:
            self.problem.model.load_state_dict(state["model"])
            self.problem.hyper.load_state_dict(state["hyper"])
            if state["optimizers"][0] == self.config.inner_optimizer:
                self._load_optimizer(self._inner, state["inner_optimizer"], self.config.inner_lr)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"this state belongs to another problem: {error}") from error
        self._load_progress(state)

    @staticmethod
    def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], lr: float) -> None:
        optimizer.load_state_dict(state)
        for group in optimizer.param_groups:
            group["lr"] = lr  # the configuration's, not that of the state

    def _load_progress(self, state: dict[str, Any]) -> None:
        self.outer_steps, self.inner_steps = state["outer_steps"], state["inner_steps"]
        self.cost = Cost(**state["cost"])


def _gradient(weight: Tensor) -> Tensor:
    """Return the weight's gradient, zeros where the data loss does not see it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    wrong = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if wrong:
        raise NonFiniteError(
            f"{', '.join(f'{k} is {v}' for k, v in wrong.items())}. {SolveStatus.NONFINITE.advice}"
        )
    return metrics
