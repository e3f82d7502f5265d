"""Joint optimisation of weights and hyperparameters: T inner steps, one outer step, again."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

from ift_tune.base.arguments import require_instance, require_list, require_seed
from ift_tune.base.errors import (
    CheckpointError,
    UsageError,
    nearest,
    renamed_method,
    require_integer,
)
from ift_tune.base.randomness import RandomStream, derive_seed
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import count
from ift_tune.joint.changed_model import saying_changes
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.cost import FORWARD, Cost, StepCost, signal_passes, training_passes
from ift_tune.joint.fresh_weights import FreshWeights
from ift_tune.joint.health import OuterNumbers, read_numbers, signal_columns
from ift_tune.joint.inner_loop import InnerLoop
from ift_tune.joint.outer_loop import OuterLoop
from ift_tune.joint.splits import Evaluator, Walks, require_finite
from ift_tune.joint.start_check import StartCheck
from ift_tune.joint.watch import Watch
from ift_tune.problem.batches import Batch
from ift_tune.problem.begun_again import OtherBatchesError
from ift_tune.problem.factory import require_factory
from ift_tune.problem.micro_batches import MicroBatch, random_parts
from ift_tune.problem.modes import TrainingModes
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size

SPLITS = ("train", "val", "search", "test")
"""What `JointOptimizer.evaluate` measures."""


class OuterStepHooks(Protocol):
    """What a `JointOptimizer` calls in each outer step; every `Callback` has them."""

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        """Run before the inner steps."""

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        """Run with a fresh hypergradient, before λ is updated."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Run with what `JointOptimizer.step` is about to return; additions are kept."""


class Parts(NamedTuple):
    """What a `JointOptimizer` is made of; a pack of runs has others stand in for them."""

    walks: Walks
    inner: InnerLoop
    outer: OuterLoop
    evaluator: Evaluator


class JointOptimizer:
    """Alternates `inner_steps` weight updates with one hyperparameter update.

    Lorraine, Vicol, Duvenaud 2020, algorithm 1. Both optimisers, the random numbers and the
    loaders' positions belong to this object, so two of them never disturb each other, and one that
    was saved and loaded goes on with the same bits on the CPU.

    Attributes:
        problem: The problem; its model and hyperparameters are updated in place.
        config: The meta-hyperparameters.
        total_steps: Inner steps of the whole training, where it has an end that is known.
        outer_steps: Outer steps taken.
        inner_steps: Inner steps taken.
        status: How the last hypergradient came out; None before the first.
        skips: Hypergradients in a row that were unusable, so that λ was left alone.
        cost: What has been spent so far, without the check at the start.
        start_check: What the check in the first outer step has found; None before, where
            `config.start_check` is off, and in plain training.

    Example:
        >>> import ift_tune
        >>> problem = ift_tune.testing.Quadratic()
        >>> config = ift_tune.MetaConfig(
        ...     inverse=ift_tune.Dense(), inner_steps=20, inner_lr=0.1, meta_lr=0.2
        ... )
        >>> joint = ift_tune.JointOptimizer(problem, config)
        >>> norms = [joint.step()["hypergradient_norm"] for _ in range(30)]
        >>> norms[-1] < 0.5 * norms[0]
        True
        >>> joint.outer_steps, joint.inner_steps, joint.status.value
        (30, 600, 'converged')
        >>> sorted(joint.evaluate("test"))
        ['test_loss']
    """

    def __init__(
        self,
        problem: BilevelProblem,
        config: MetaConfig,
        *,
        seed: int = 0,
        callbacks: Sequence[OuterStepHooks] = (),
        total_steps: int | None = None,
        problem_factory: Callable[..., Any] | None = None,
    ) -> None:
        """Check the problem and build the optimisers.

        Args:
            problem: What to optimise.
            config: How.
            seed: Of the random numbers drawn while stepping (dropout, shuffling by the loaders).
            callbacks: Called in order.
            total_steps: Inner steps of the whole training, which `inner_schedule` leads to.
            problem_factory: What has built the problem, ``factory(config, device, seed)``, for
                weights that begin anew (`MetaConfig.reinit_every`).

        Raises:
            UsageError: Listing everything that is wrong with the problem.
        """
        require_instance(
            "problem", problem, BilevelProblem, "a BilevelProblem, such as a ClassificationProblem"
        )
        require_instance("config", config, MetaConfig, "a configuration such as MetaConfig()")
        callbacks, seed = require_list("callbacks", callbacks, "callbacks"), require_seed(seed)
        for callback in callbacks:
            if isinstance(callback, type) or not hasattr(callback, "on_outer_step_begin"):
                raise UsageError(f"callbacks must hold ift_tune.Callback objects, got {callback!r}")
        problem.validate()
        self.problem, self.config, self.callbacks = problem, config, list(callbacks)
        self.outer_steps = self.inner_steps = self.skips = 0
        self.status: SolveStatus | None = None
        self.cost = Cost()
        self.start_check: StartCheck | None = None
        self.device = problem.weights()[0].device
        # All that draws, draws from here: the global generators are swapped out meanwhile, so that
        # a run and its surroundings do not disturb each other, and a resumed run has the same bits.
        self._random = RandomStream(seed, self.device)
        # Whatever callbacks draw, they repeat it, and what is trained does not depend on it.
        self._random_of_callbacks = RandomStream(derive_seed(seed, "callbacks"), self.device)
        self._walks = Walks(problem.splits, self.device)
        self.total_steps = total_steps
        self._modes = TrainingModes(problem.model)
        self._inner = InnerLoop(problem, config, self._walks, self.device)
        self._outer = OuterLoop(problem, config, self._inner.descent)
        self._evaluator = Evaluator(problem, self._random, self.device)
        self._sizes: tuple[float, float] | None = None  # of train and val, once they are asked for
        self._changing: set[str] = set()  # hooks of callbacks that change the model
        if problem_factory is not None:
            require_factory(problem_factory)
        self._fresh = FreshWeights(problem, config, problem_factory, seed)
        self._seed, self._watch = seed, Watch()
        weights = count(problem.weights())
        self._bound = StepCost(config, weights, self.first_batch, self._walks.curvature)

    def step(self) -> dict[str, float]:
        """Take `config.inner_steps` inner steps and one outer step.

        Before them the weights begin anew, where that is due (`config.reinit_every`).

        Returns:
            Finite floats: losses (and errors) on the batches of the outer step, the health
            columns, and the cost so far. `train_loss` is without the closed-form penalty.

        Raises:
            NonFiniteError: If a loss is infinite or NaN; λ is as before the step.
            UsageError: If it is called under autocast, parameters have been frozen, unfrozen or
                replaced since the optimisers were built (they are named), or weights are to begin
                anew and there is no `problem_factory`.
            StartCheckError: In the first step, if a loss differs on repetition or a derivative is
                not that of the loss; λ is as before.
        """
        self._begin_anew()
        self._call("on_outer_step_begin")
        with self._stepping("step()"):
            self._train_weights(self.config.inner_steps, learning=True)
            metrics = self._update_hypers()
        self.outer_steps += 1
        metrics["gradient_equivalents"] = self.cost.gradient_equivalents
        metrics["hvps"] = float(self.cost.hvps)
        self._call("on_outer_step_end", metrics)
        # What callbacks add may be NumPy's or a tensor, which no checkpoint can be loaded with.
        return {name: float(value) for name, value in metrics.items()}

    def baseline_step(
        self,
        *,
        train_on_val: bool = False,
        val_weight: float = 1.0,
        penalty_weight: float | None = None,
    ) -> dict[str, float]:
        """Take the inner steps of an outer step and leave λ as it is: plain training.

        Args:
            train_on_val: Whether to train on the validation split too. What is minimised is then
                (n·`train_loss` + c·m·`val_loss`) / (n + c·m) plus the penalty, for n training and m
                validation examples.
            val_weight: c, the weight of a validation example where that of a training example is 1;
                infinite: on the validation split alone.
            penalty_weight: a, by which the penalty joins `train_loss`: it is multiplied by
                a·n / (n + c·m), and so has a times the strength against the sum of the training
                losses that λ was learned with. None: it stays as it is.

        Returns:
            The cost so far.
        """
        share, scale = self.shares(
            train_on_val=train_on_val, val_weight=val_weight, penalty_weight=penalty_weight
        )
        if share == 1.0:  # no training batch says what the unit is
            self.cost.unit = self.cost.unit or self.first_batch("train")
        with self._stepping("baseline_step()"):
            steps = self.config.inner_steps
            self._train_weights(steps, learning=False, val_share=share, penalty_scale=scale)
        self.outer_steps += 1
        return {"gradient_equivalents": self.cost.gradient_equivalents, "hvps": 0.0}

    def shares(
        self, *, train_on_val: bool, val_weight: float, penalty_weight: float | None
    ) -> tuple[float, float]:
        """Return what a plain training minimises: see `baseline_step`, for the arguments too.

        Returns:
            The weight of the validation loss, beside one minus it of the training loss; and what
            the penalty is multiplied by.
        """
        share = self._val_share(val_weight) if train_on_val else 0.0
        return share, 1.0 if penalty_weight is None else penalty_weight * (1.0 - share)

    def train_weights(self, steps: int) -> None:
        """Take `steps` inner steps with λ as it is: plain training."""
        require_integer("steps", steps, 0)
        with self._stepping("train_weights()"):
            self._train_weights(steps, learning=False)

    def begin_anew(self) -> None:
        """Let the weights begin anew if that is due, as the next `step` otherwise does.

        Raises:
            UsageError: If it is, and the factory is missing or builds another model.
        """
        self._begin_anew()

    def course(self, *, learning: bool) -> tuple[int, int | None]:
        """Return how far a schedule of the learning rate has come, and where it leads to.

        Args:
            learning: Whether λ learns, whose weights may begin anew; else this is plain training.

        Returns:
            Inner steps, and all of them; None where the end is not known.
        """
        if not learning:
            return self.inner_steps, self.total_steps
        return self._fresh.course(self.inner_steps, self.total_steps)

    def hypergradient(self) -> Hypergradient:
        """Return the hypergradient on the next batches, as an outer step takes it; λ stays.

        Its cost is not counted.

        Example:
            >>> import ift_tune
            >>> problem = ift_tune.testing.Quadratic()
            >>> joint = ift_tune.JointOptimizer(problem, ift_tune.MetaConfig())
            >>> joint.train_weights(100)
            >>> joint.hypergradient().usable
            True
        """
        with self._stepping("hypergradient()"):
            train_batch = self._walks.next(self._walks.curvature)
            val_batch = self._walks.next("val")
            return self._outer.hypergradient(self.config, train_batch, val_batch)

    def linearise(self, train_batch: Batch, val_batch: Batch) -> Linearisation:
        """Return the problem linearised on two batches as an outer step linearises it.

        By the configured curvature and products. The weights must stay as they are until the last
        product is taken.
        """
        return self._outer.linearise(self.config, train_batch, val_batch)

    @property
    def micro_batch(self) -> MicroBatch | None:
        """In which parts an outer step takes its batches; None for whole, or before the first."""
        return self._outer.micro_batch

    def max_step_cost(
        self, *, plain: bool = False, train_on_val: bool = False, val_weight: float = 1.0
    ) -> float:
        """Return the most that the next step can cost, in gradient-equivalents.

        A counted budget is kept by this bound. The first batch of each loader is taken for its
        largest.

        Args:
            plain: Whether it will be a `baseline_step`.
            train_on_val: Whether that trains on the validation split too.
            val_weight: Infinite where that trains on nothing else.
        """
        if plain:
            return self._bound.plain(train_on_val=train_on_val, val_weight=val_weight)
        warm = self._outer.warm.eigenpair is not None and not self._fresh.due(self.outer_steps)
        return self._joint_cost(warm=warm, signals=float(self.measures_signal))

    def usual_step_cost(self) -> float:
        """Return what a step costs at most in the long run, on average, in gradient-equivalents.

        Unlike `max_step_cost`, which is of the next step: the first looks for the largest
        eigenvalue, and one in `signal_every` measures the signal.
        """
        every = self.config.signal_every
        return self._joint_cost(warm=True, signals=1.0 / every if every else 0.0)

    def _joint_cost(self, *, warm: bool, signals: float) -> float:
        again, anew = self._outer.runs_again, self._outer.runs_anew
        return self._bound.joint(warm=warm, signals=signals, again=again, anew=anew)

    def evaluate(
        self, split: str, *, charge: bool = False, finite: bool = True
    ) -> dict[str, float]:
        """Return what the problem's `evaluate` says of a split, as ``{"<split>_<metric>": value}``.

        Args:
            split: ``"train"``, ``"val"``, ``"search"`` or ``"test"``.
            charge: Whether to count the cost. A split that decides something (search) is charged;
                one that is only reported is not.
            finite: Whether every metric has to be a finite number; else they are as they come.

        Raises:
            NonFiniteError: If one has to be, and is infinite or NaN; it is named.
            UsageError: If the split is empty, what the problem returns is no number, or it is
                called under autocast.
        """
        if split not in SPLITS:
            raise UsageError(f"there is no split {split!r}{nearest(split, SPLITS)}")
        with ordinary_autograd("evaluate()", self.device):
            metrics, examples = self._evaluator.evaluate(split)
        if finite:
            require_finite(metrics)
        if charge:
            self.cost.add(FORWARD, examples)
        return metrics

    def count_examples(self, split: str) -> float:
        """Return the number of examples in one pass over a split."""
        return self._evaluator.count_examples(split)

    def first_batch(self, split: str) -> float:
        """Return the number of examples in the first batch of a split."""
        return self._evaluator.first_batch(split)

    def close(self) -> None:
        """End the worker processes of the loaders; whoever steps on starts them again."""
        self._walks.close()

    @property
    def parts(self) -> Parts:
        """What walks over the splits, trains, takes hypergradients and measures."""
        return Parts(self._walks, self._inner, self._outer, self._evaluator)

    @parts.setter
    def parts(self, parts: Parts) -> None:
        self._walks, self._inner, self._outer, self._evaluator = parts

    plain_step = renamed_method("plain_step", "baseline_step", {"pooled": "train_on_val"})
    dearest_step = renamed_method("dearest_step", "max_step_cost", {"pooled": "train_on_val"})

    def _call(self, hook: str, *arguments: Any) -> None:
        if self.callbacks:
            with self._random_of_callbacks.active():
                for callback in self.callbacks:
                    who = f"{type(callback).__name__}.{hook}"
                    with saying_changes(self.problem.model, who, self._changing):
                        getattr(callback, hook)(self, *arguments)

    @contextlib.contextmanager
    def _stepping(self, what: str) -> Iterator[None]:
        """Let weights and λ be moved inside, whatever the caller's surroundings are."""
        with ordinary_autograd(what, self.device), self._random.active():
            self._inner.require_same_tensors()
            self._modes.enter()
            yield

    @property
    def measures_signal(self) -> bool:
        """Whether the next outer step measures how far its hypergradient is above the noise."""
        every = self.config.signal_every
        return every > 0 and (self.outer_steps + 1) % every == 0

    @property
    def exhausted(self) -> bool:
        """Whether so many measurements in a row have found more noise than signal.

        As many as `config.signal_patience`; whoever drives the steps may end with that.
        """
        return 0 < self.config.signal_patience <= self._watch.faint

    def _begin_anew(self) -> None:
        self._fresh.require_factory()
        if self._fresh.due(self.outer_steps):
            self._fresh.begin(self.outer_steps, self.inner_steps)
            self._inner.begin_anew()
            self._outer.begin_anew()
            self._watch.begin_anew()

    def _train_weights(self, steps: int, *, learning: bool, **minimised: float) -> None:
        taken, total = self.course(learning=learning)
        self._inner.train(steps, self.cost, taken=taken, total=total, **minimised)
        self.inner_steps += steps

    def _val_share(self, val_weight: float) -> float:
        """Return the share of the validation split in what is trained on, at a weight."""
        if math.isinf(val_weight):
            return 1.0
        if self._sizes is None:
            self._sizes = self.count_examples("train"), self.count_examples("val")
        train, val = self._sizes
        return val_weight * val / (train + val_weight * val)

    def _update_hypers(self) -> dict[str, float]:
        """The outer step: a hypergradient at the present weights, and one step along it."""
        train_batch = self._walks.next(self._walks.curvature)
        val_batch = self._walks.next("val")
        inner, outer, config = self._inner, self._outer, self.config
        parts = self._val_parts(val_batch) if self.measures_signal else []
        if outer.runs_anew:
            inner.penalty = None  # which may be as large as the weights, and would be idle
        if config.start_check and self.outer_steps == 0:
            begun, self.start_check = outer.begin_checked(config, train_batch, val_batch, parts)
        else:
            begun = outer.begin(config, train_batch, val_batch, inner.penalty, parts)
        metrics = self._evaluator.batch_metrics(train_batch, val_batch)
        numbers = read_numbers(begun, metrics, inner, outer)
        del begun  # and with it the graph: from here on there is room for the step of λ
        result = numbers.result
        self._compare(result, train_batch, val_batch)
        # Before anything is changed: a step that cannot be completed leaves λ as it was.
        row = require_finite(numbers.losses | numbers.metrics)
        versions = [g._version for g in result.grads]
        self._call("on_hypergradient", result)
        if versions != [g._version for g in result.grads]:  # a callback has changed them
            numbers.measure(outer)
        inner.first_loss = None
        if numbers.first_loss is not None:
            self._fresh.first_loss = numbers.first_loss
        self._fresh.loss = train_loss = row["train_loss"]
        self.status = result.status
        outer.update(result, config)
        inner.penalty = None  # λ is elsewhere now
        self.skips = 0 if result.usable else self.skips + 1
        self._charge(numbers, train_batch, val_batch)
        row |= numbers.norms
        if numbers.signal is not None and result.usable:
            self._watch.measured(numbers.signal.ratio())
            row |= signal_columns(numbers.signal, self.problem.hyper)
        if numbers.agreement is not None and result.usable:
            row["hypergradient_agreement"] = numbers.agreement
        gone = self._watch.stepped(
            train_loss, self._fresh.first_loss, numbers.length, result.stats.alpha
        )
        return row | numbers.columns() | {"memorised": float(gone)}

    def _charge(self, numbers: OuterNumbers, train_batch: Batch, val_batch: Batch) -> None:
        """Add the cost of an outer step."""
        again, anew = self._outer.runs_again, self._outer.runs_anew
        sizes = [as_size(self.problem.batch_size(b)) for b in (train_batch, val_batch)]
        products = numbers.result.stats.hvps
        self.cost.add_hypergradient(products, training_passes(products, again=again), *sizes)
        if parts := numbers.signal_parts:
            products = numbers.signal_products
            passes = signal_passes(parts, products, again=again, anew=anew)
            self.cost.add_hypergradient(products, passes, *sizes)

    def _val_parts(self, val_batch: Batch) -> list[Batch]:
        """Return the parts of a validation batch whose hypergradients are compared.

        Of one example there are none, and nothing is measured.
        """
        seed = derive_seed(self._seed, "parts", self.outer_steps)
        parts = random_parts(val_batch, self.config.signal_parts, seed)
        return parts if len(parts) > 1 else []

    def _compare(self, result: Hypergradient, train_batch: Batch, val_batch: Batch) -> None:
        """Look at a hypergradient before anything is done with it, where there is a reason to."""

    def hyper_change(self) -> float:
        """Return how far λ is from where it began: the root of the mean square.

        In units of the spread of its initial values where they differ (pixels, a network's
        weights), else of its own, which for kinds that live in logarithms makes .69 a factor of 2.
        """
        return self._outer.change()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything a resumed run needs, as tensors and plain values."""
        # A deep copy: torch's state dicts share their tensors with what goes on being trained.
        return copy.deepcopy(
            {
                "outer_steps": self.outer_steps,
                "inner_steps": self.inner_steps,
                "skips": self.skips,
                "status": None if self.status is None else self.status.value,
                "model": self.problem.model.state_dict(),
                "hyper": self.problem.hyper.state_dict(),
                "optimizers": self._optimizers(),
                "inner_optimizer": self._inner.descent.state_dict(),
                **self._outer.state_dict(),
                "fresh_weights": self._fresh.state_dict(),
                "watch": self._watch.state_dict(),
                "cost": asdict(self.cost),
                "start_check": None if self.start_check is None else asdict(self.start_check),
                "cursors": self._walks.state_dict(),
                "random": self._random.state_dict(),
                "random_of_callbacks": self._random_of_callbacks.state_dict(),
            }
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            CheckpointError: If it is not the state of this problem and configuration.
            OtherBatchesError: If a loader does not begin its pass as it did.
        """
        state = copy.deepcopy(state)
        try:
            if state["optimizers"] != self._optimizers():
                raise ValueError(f"its optimisers are {' and '.join(state['optimizers'])}")
            self.problem.model.load_state_dict(state["model"])
            self.problem.hyper.load_state_dict(state["hyper"])
            self._inner.descent.load_state_dict(state["inner_optimizer"])
            self._outer.load_state_dict(state)
            # A walk finds its place by drawing as it once did: with this run's random numbers.
            with self._random.active():
                self._walks.load_state_dict(state["cursors"])
            self._random.load_state_dict(state["random"])
            if "random_of_callbacks" in state:  # not in checkpoints of earlier versions
                self._random_of_callbacks.load_state_dict(state["random_of_callbacks"])
        except OtherBatchesError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"this state belongs to another problem or configuration: {error}"
            ) from error
        self._load_progress(state)
        self.skips = state["skips"]
        self.status = None if state["status"] is None else SolveStatus(state["status"])

    def inherit(self, state: dict[str, Any]) -> None:
        """Take over weights and λ from the state of a run with another configuration.

        What population based training calls an exploit. Progress and cost go on from that state,
        and so does what the inner optimiser knows of each weight (its moments), if it is of the
        same kind. Its learning rate, momentum and every other option stay this run's, those of a
        problem's own `configure_inner` too, whose scheduler comes to the same step. λ's optimiser,
        the warm start and the random numbers begin afresh: they belonged to other settings.

        Raises:
            CheckpointError: If it is not the state of this problem.
        """
        state = copy.deepcopy(state)
        try:
            self.problem.model.load_state_dict(state["model"])
            self.problem.hyper.load_state_dict(state["hyper"])
            self._load_progress(state)
            alike = state["optimizers"][0] == self._inner.descent.name
            taken, _ = self._fresh.course(self.inner_steps, None)
            self._inner.inherit(state["inner_optimizer"] if alike else None, taken)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"this state belongs to another problem: {error}") from error

    def _optimizers(self) -> list[str]:
        return [self._inner.descent.name, self._outer.descent.name]

    def _load_progress(self, state: dict[str, Any]) -> None:
        self.outer_steps, self.inner_steps = state["outer_steps"], state["inner_steps"]
        self.cost = Cost(**state["cost"])
        # Older checkpoints have neither.
        self._fresh.load_state_dict(state.get("fresh_weights"))
        self._watch.load_state_dict(state.get("watch"))
        check = state.get("start_check")  # older checkpoints have none
        self.start_check = None if check is None else StartCheck(**check)
