"""What leaving out a training example would change of another split's loss, without retraining.

Where the weights w are a minimum of the training loss (1/N)·Σ cᵢ·ℓᵢ(w), penalty included, the loss
L of another split follows the weight cᵢ of an example by

    dL/dcᵢ = ∂L/∂cᵢ − (1/N)·∇ℓᵢᵀ·H⁻¹·∇L,

H being the Hessian of the training loss (Koh and Liang 2017; here by the package's own path from a
problem to its hypergradient). To leave the example out is to take cᵢ to 0, which to first order
changes L by −cᵢ·dL/dcᵢ: above 0 where the example helps, below 0 where it harms, in units of L. N
stays as it is, as it does where a trainer is given a weight of 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import RandomStream, derive_seed
from ift_tune.base.status import SolveStatus
from ift_tune.hyper import ExampleWeights
from ift_tune.hyper.predictions import positions
from ift_tune.hyper.transforms import TRANSFORMS
from ift_tune.implicit.curvature import Operator
from ift_tune.implicit.inverse import ConjugateGradient, InverseResult
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import Tensors, add, mul
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batch, Loader, to_device
from ift_tune.problem.loaders import drawn_batches, first_batch, once_through
from ift_tune.problem.losses import linearise_problem
from ift_tune.problem.sizes import as_size
from ift_tune.testing.symptoms import curvature_split

_CURVATURE = 8  # batches, drawn, over which H is averaged: their graphs are in memory together
_NOT_POSITIVE = (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR)


class Influence(NamedTuple):
    """What leaving out each training example would change.

    Attributes:
        changes: Of the split's loss, by position in the training split; NaN for what no batch of a
            pass has brought.
        slopes: dL/dcᵢ, likewise.
        status: How the solve of H·q = ∇L came out.
        gauss_newton: Whether the Gauss-Newton matrix has taken the place of the Hessian, which was
            not positive definite.
        products: Of the solve.
    """

    changes: Tensor
    slopes: Tensor
    status: SolveStatus
    gauss_newton: bool
    products: int


class _Mean(Operator):
    """The mean of the operators of several batches."""

    def __init__(self, operators: Sequence[Operator], sizes: Sequence[float]) -> None:
        super().__init__(operators[0].like)
        self._operators, self._sizes = operators, sizes
        self.rounding = max(operator.rounding for operator in operators)

    def _product(self, vector: Tensors) -> list[Tensor]:
        return _mean([o.matvec(vector) for o in self._operators], self._sizes)


def influence(
    joint: JointOptimizer, kind: ExampleWeights, *, split: str = "search", products: int = 100
) -> Influence:
    """Return what leaving out each training example would change of a split's loss.

    Args:
        joint: Of the problem, at weights that the training loss is minimal at.
        kind: The example weights, part of the problem's hyperparameters; as before afterwards.
        split: ``"search"``, ``"val"`` or ``"test"``: whose loss.
        products: Most products of the solve.

    Raises:
        UsageError: If the training batches do not tell which examples they hold.
    """
    joint.train_weights(0)  # nothing but the modes of training
    with RandomStream(derive_seed("influence"), joint.device).aside(), _linear_in(kind):
        found = _Influences(joint, split)
        solved, gauss_newton = found.solve(products, gauss_newton=False), False
        if solved.status in _NOT_POSITIVE:
            with contextlib.suppress(UsageError):  # of a loss that has no such matrix
                solved, gauss_newton = found.solve(products, gauss_newton=True), True
        slopes, met = found.contract(solved.value, kind)
        changes = torch.where(met, -kind.raw.detach() * slopes, torch.nan)
    return Influence(changes, slopes, solved.status, gauss_newton, solved.stats.hvps)


@contextmanager
def _linear_in(kind: ExampleWeights) -> Iterator[None]:
    """Let λ be the weights themselves, so that its hypergradient is dL/dc where c is saturated."""
    raw, transform = kind.raw.detach().clone(), kind.transform
    with torch.no_grad():
        kind.raw.copy_(transform.forward(raw))
    kind.transform = TRANSFORMS["none"]
    try:
        yield
    finally:
        kind.transform = transform
        with torch.no_grad():
            kind.raw.copy_(raw)


class _Influences:
    """A solve on whole splits and its contraction, batch by batch."""

    def __init__(self, joint: JointOptimizer, split: str) -> None:
        self._problem, self._products = joint.problem, joint.config.products
        self._train = getattr(self._problem.splits, curvature_split(self._problem))
        self._device = joint.device
        self._val = getattr(self._problem.splits, split)
        first = to_device(first_batch("training", self._train), self._device)
        self.val_batch = to_device(first_batch(split, self._val), self._device)
        sizes, vectors, direct = [], [], []
        for batch in self._batches(self._val):
            linearisation = self._linearise(first, batch)
            sizes.append(as_size(self._problem.loss_size(batch)))
            vectors.append(linearisation.vector)
            direct.append(linearisation.direct)
        self.vector, self.direct = _mean(vectors, sizes), _mean(direct, sizes)

    def solve(self, products: int, *, gauss_newton: bool) -> InverseResult:
        """Return q = H⁻¹·∇L by conjugate gradients."""
        drawn = drawn_batches(self._train, _CURVATURE, derive_seed("influence", "curvature"))
        batches = [to_device(batch, self._device) for batch in drawn]
        operators = [self._linearise(b, self.val_batch, gauss_newton).operator for b in batches]
        operator = _Mean(operators, [as_size(self._problem.loss_size(b)) for b in batches])
        inverse = ConjugateGradient(max_steps=products)
        return inverse.solve(inverse.init(operator), self.vector)

    def contract(self, solution: Tensors, kind: ExampleWeights) -> tuple[Tensor, Tensor]:
        """Return dL/dc, and which examples the pass has met."""
        place = next(i for i, h in enumerate(self._problem.hypers()) if h is kind.raw)
        mixed = torch.zeros_like(kind.raw)
        met = torch.zeros_like(kind.raw, dtype=torch.bool)
        examples = 0.0
        for batch in self._batches(self._train):
            linearisation = self._linearise(batch, self.val_batch)
            found = linearisation.contract(solution, absent=set(linearisation.hypers))[place]
            size = as_size(self._problem.loss_size(batch))
            mixed += size * (found - linearisation.direct[place])
            met[positions(self._problem, batch)] = True
            examples += size
        return self.direct[place] + mixed / examples, met

    def _linearise(self, train: Batch, val: Batch, gauss_newton: bool = False) -> Linearisation:
        return linearise_problem(
            self._problem, train, val, gauss_newton=gauss_newton, products=self._products
        )

    def _batches(self, loader: Loader) -> Iterator[Batch]:
        return (to_device(batch, self._device) for batch in once_through(loader))


def _mean(parts: Sequence[Tensors], sizes: Sequence[float]) -> list[Tensor]:
    """Return the mean of vectors, weighted by sizes."""
    total = mul(parts[0], sizes[0])
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        total = add(total, mul(part, size))
    return mul(total, 1.0 / sum(sizes))
