"""A run whose next step is computed together with those of others, and which does not know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.hypergradient import Begun, Hypergradient, WarmStart
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import Tensors, flatten, norm, precision
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.cost import GRADIENT, Cost
from ift_tune.joint.inner_loop import InnerLoop
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.outer_loop import OuterLoop
from ift_tune.joint.packed.grounds import Ground
from ift_tune.joint.packed.proofs import (
    Claim,
    PackMismatch,
    require_equal,
    require_same_gradient,
    require_same_metrics,
)
from ift_tune.joint.packed.walks import PlacedWalks
from ift_tune.joint.splits import Evaluator
from ift_tune.joint.start_check import StartCheck
from ift_tune.problem.batches import Batch


@dataclass
class Ahead:
    """What has been computed beforehand; each is used once. What is missing, the run computes.

    Attributes:
        sizes: Examples in each batch of the inner steps, where these have been taken.
        norms: Of the last inner step, on the CPU.
        result: The hypergradient.
        length: Its norm, on the CPU.
        first_loss: Of fresh weights, before their first step.
        doubted: The hypergradient, which is yet to be held against what the run itself has.
        agreement: With the mean of the earlier ones.
        batch_metrics: Of the batches of the outer step.
        splits: What is measured of each split, and its examples.
        change: How far λ is from where it began.
    """

    sizes: list[float] | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)
    first_loss: Tensor | None = None
    result: Hypergradient | None = None
    length: Tensor | None = None
    doubted: Claim | None = None
    agreement: float | None = None
    batch_metrics: dict[str, float] | None = None
    splits: dict[str, tuple[dict[str, float], float]] = field(default_factory=dict)
    change: float | None = None


class _Inner:
    """In place of an `InnerLoop`."""

    def __init__(self, inner: InnerLoop, ahead: Ahead) -> None:
        self._inner, self._ahead = inner, ahead
        self.descent = inner.descent

    @property
    def norms(self) -> dict[str, Tensor]:
        return self._inner.norms

    @property
    def penalty(self) -> Penalty | None:
        return self._inner.penalty

    @penalty.setter
    def penalty(self, penalty: Penalty | None) -> None:
        self._inner.penalty = penalty

    @property
    def first_loss(self) -> Tensor | None:
        return self._inner.first_loss

    @first_loss.setter
    def first_loss(self, loss: Tensor | None) -> None:
        self._inner.first_loss = loss

    def begin_anew(self) -> None:
        self._inner.begin_anew()

    def require_same_tensors(self) -> None:
        self._inner.require_same_tensors()

    def train(self, steps: int, cost: Cost, **options: Any) -> None:
        if (sizes := self._ahead.sizes) is None:
            self._inner.train(steps, cost, **options)
            return
        self._ahead.sizes = None
        cost.unit = cost.unit or sizes[0]
        for size in sizes:  # one by one, as it is added up otherwise
            cost.add(GRADIENT, size)
        self._inner.norms, self._inner.penalty = self._ahead.norms, None
        self._inner.first_loss = self._ahead.first_loss


class _Outer:
    """In place of an `OuterLoop`."""

    def __init__(
        self, outer: OuterLoop, ahead: Ahead, ground: Ground, weights: Sequence[Tensor]
    ) -> None:
        self._outer, self._ahead, self._ground, self._weights = outer, ahead, ground, weights
        self.descent = outer.descent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)  # what is not computed beforehand

    def hypergradient(
        self, config: MetaConfig, train_batch: Batch, val_batch: Batch
    ) -> Hypergradient:
        return self.begin(config, train_batch, val_batch).result.read()

    def begin(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        penalty: Penalty | None = None,
        val_parts: Sequence[Batch] = (),
    ) -> Begun:
        result, self._ahead.result = self._ahead.result, None
        if result is not None:
            length = norm(result.grads) if self._ahead.length is None else self._ahead.length
            return _begun(result, length)
        if (claim := self._claim()) is None:
            return self._outer.begin(config, train_batch, val_batch, penalty, val_parts)
        own = self._outer.linearise(config, train_batch, val_batch, penalty)
        return self._held(claim, own, config, val_batch)

    def begin_checked(
        self,
        config: MetaConfig,
        train_batch: Batch,
        val_batch: Batch,
        val_parts: Sequence[Batch] = (),
    ) -> tuple[Begun, StartCheck | None]:
        outer, ground = self._outer, self._ground
        if (claim := self._claim()) is None:
            return outer.begin_checked(config, train_batch, val_batch, val_parts)
        if (check := ground.checked) is None:
            own, check = outer.linearise_checked(config, train_batch, val_batch)
        else:
            own = outer.linearise(config, train_batch, val_batch)
        begun = self._held(claim, own, config, val_batch)
        # Whose losses and products are shown to be those of the pack has the check of the others.
        ground.checked = check
        return begun, check

    def _claim(self) -> Claim | None:
        claim, self._ahead.doubted = self._ahead.doubted, None
        return claim

    def _held(
        self, claim: Claim, own: Linearisation, config: MetaConfig, val_batch: Batch
    ) -> Begun:
        """Return the pack's hypergradient, once it has been held against the run's own losses."""

        def contract(solution: Tensors) -> list[Tensor]:
            return self._outer.contract(own, solution, config, val_batch)

        require_equal(own, self._weights, contract, claim)
        return _begun(claim.result, norm(claim.result.grads))

    def agreement(self, gradients: Tensors, length: Tensor) -> Later[float | None]:
        known, self._ahead.agreement = self._ahead.agreement, None
        return self._outer.agreement(gradients, length) if known is None else Later.known(known)

    def change(self) -> float:
        known, self._ahead.change = self._ahead.change, None
        return self._outer.change() if known is None else known


def _begun(result: Hypergradient, length: Tensor) -> Begun:
    known = Later.known(result)
    return Begun(result.grads, length, result.train_loss, result.val_loss, known)


class _Measuring:
    """In place of an `Evaluator`."""

    def __init__(self, evaluator: Evaluator, ahead: Ahead, precision: float) -> None:
        self._evaluator, self._ahead, self._precision = evaluator, ahead, precision
        self._proven: set[str] = set()  # splits whose measurements have been held against its own

    def evaluate(self, split: str) -> tuple[dict[str, float], float]:
        if (known := self._ahead.splits.pop(split, None)) is None:
            return self._evaluator.evaluate(split)
        numbers, examples = known
        packed = {f"{split}_{k}": v for k, v in numbers.items()}
        if split not in self._proven:
            own, _ = self._evaluator.evaluate(split)
            require_same_metrics(own, packed, examples, self._precision)
            self._proven.add(split)
        return packed, examples

    def batch_metrics(self, train_batch: Batch, val_batch: Batch) -> Later[dict[str, float]]:
        known, self._ahead.batch_metrics = self._ahead.batch_metrics, None
        if known is None:
            return self._evaluator.batch_metrics(train_batch, val_batch)
        return Later.known(known)

    def count_examples(self, split: str) -> float:
        return self._evaluator.count_examples(split)

    def first_batch(self, split: str) -> float:
        return self._evaluator.first_batch(split)


class Member:
    """A run that takes part in a pack.

    It keeps all of its state, and takes its steps itself: where something of a step has been
    computed beforehand, that is used in place of computing it.

    Attributes:
        joint: The run.
        walks: Its walks over the splits.
        inner: Its inner loop.
        outer: Its outer loop.
        ahead: What has been computed of its next step.
        ground: What its problem has beside weights and λ.
        proven: Whether one of the pack's hypergradients has been held against its own losses; of a
            plain training, a gradient.
        learns: Whether it takes outer steps.
        val_share: Of the validation loss in what it trains the weights by.
        penalty_scale: How many times it takes the penalty.
        kept_vector: The eigenvector of its latest solve, as one row.
    """

    def __init__(
        self,
        joint: JointOptimizer,
        *,
        learns: bool = True,
        val_share: float = 0.0,
        penalty_scale: float = 1.0,
        ground: Ground,
    ) -> None:
        """Let a run take part: its state stays as it is.

        Args:
            joint: The run.
            learns: Whether it takes outer steps; else it trains plainly.
            val_share: See `JointOptimizer.shares`.
            penalty_scale: Likewise.
            ground: See above; as its pack knows it, by `Pack.ground`.

        Raises:
            UsageError: If a loader does not tell which rows come next.
        """
        self.learns, self.val_share, self.penalty_scale = learns, val_share, penalty_scale
        self.ground = ground
        self.joint, self.config = joint, joint.config
        problem, parts = joint.problem, joint.parts
        self.ahead, self.proven = Ahead(), False
        self.walks = PlacedWalks(problem.splits, joint.device)
        self.walks.load_state_dict(parts.walks.state_dict())
        self.inner, self.outer, evaluator = parts.inner, parts.outer, parts.evaluator
        self.weights, self.hypers = problem.weights(), problem.hypers()
        self.kept_vector = torch.cat([w.detach().reshape(-1) for w in self.weights])
        self.start = torch.cat([s.reshape(-1) for s in self.outer.start])
        self.inner.walks = self.walks
        stand_ins: Any = (
            self.walks,
            _Inner(self.inner, self.ahead),
            _Outer(self.outer, self.ahead, ground, self.weights),
            _Measuring(evaluator, self.ahead, precision(self.weights)),
        )
        joint.parts = type(parts)(*stand_ins)

    def forget(self) -> None:
        """Compute the next step alone, if nothing else comes."""
        fresh = Ahead()
        for name in vars(fresh):
            setattr(self.ahead, name, getattr(fresh, name))
        self.walks.ready.clear()
        self.walks.settle()

    @property
    def trained_splits(self) -> tuple[str, ...]:
        """The splits that its weights are trained on, in the order in which batches are taken."""
        shares = {"train": 1.0 - self.val_share, "val": self.val_share}
        return tuple(split for split, share in shares.items() if share)

    def prove(self, loss: Tensor, gradient: Tensor, batches: Sequence[Mapping[str, Batch]]) -> None:
        """Hold the pack's gradient at the present weights against the run's own.

        Args:
            loss: The pack's, of the first batch of each split.
            gradient: The pack's, the penalty's included.
            batches: Of each split, as many as make up the gradient.

        Raises:
            PackMismatch: If it is another.
        """
        try:
            self.proven = require_same_gradient(
                self.joint.problem,
                batches,
                (loss, gradient),
                val_share=self.val_share,
                penalty_scale=self.penalty_scale,
            )
        except PackMismatch as error:
            error.member = self
            raise

    def course(self) -> tuple[int, int | None]:
        """Return how far a schedule of the learning rate has come; see `JointOptimizer.course`."""
        return self.joint.course(learning=self.learns)

    def withdraw(self) -> None:
        """Leave to the run what could not be computed of its next step, at the batches of then.

        Inner steps that have been taken remain so.
        """
        self.walks.give_back()
        fresh = Ahead()
        for name in ("result", "length", "doubted", "agreement", "batch_metrics"):
            setattr(self.ahead, name, getattr(fresh, name))

    def largest(self) -> Eigenpair | None:
        """Return what is known of λ_max before a solve, its vector, if it has one, as one row."""
        pair = self.outer.warm.eigenpair
        if pair is None or not pair.vector:
            return pair
        if pair.vector[0].data_ptr() != self.kept_vector.data_ptr():  # of a solve of its own
            self.kept_vector.copy_(flatten(pair.vector))
            self.outer.warm = WarmStart(
                self.outer.warm.solution, Eigenpair(pair.value, self._views())
            )
        return Eigenpair(pair.value, [self.kept_vector])

    def handed_on(self, pair: Eigenpair) -> Eigenpair:
        """Return a pair for the next solve, its vector the one that is kept in `kept_vector`."""
        return Eigenpair(pair.value, self._views() if pair.vector else [])

    def _views(self) -> list[Tensor]:
        parts = torch.split(self.kept_vector, [w.numel() for w in self.weights])
        return [part.view(w.shape) for part, w in zip(parts, self.weights, strict=True)]
