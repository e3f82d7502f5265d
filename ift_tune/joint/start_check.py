"""Is what autograd differentiates twice the training loss itself: looked at once, before λ moves.

A second derivative can be wrong without a word: a custom function that keeps what it should not, a
hook that changes gradients, a kernel of PyTorch's own. So the product H·d that a hypergradient is
made of is compared, tensor by tensor, with a finite difference of the gradient along d. Reverse
mode returns Hᵀ·d and the difference H·d: where both agree, uᵀ(H·d) = dᵀ(H·u) for every u at once,
and no second product is needed for the symmetry. The loss is repeated, and so are the differences'
losses used: they tell whether the gradient is the loss's own.

What makes differences of real nets unsound is held still: random numbers are drawn again, buffers
stand still, and units stay on their side of a kink (see `Pattern`). A sum over many examples may
cancel to a gradient that is hardly more than rounding: so before anything is refused, the
difference is taken over a longer way, and what both disagree about is not held against the product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from ift_tune.base.errors import StartCheckError
from ift_tune.implicit.culprits import name_culprits
from ift_tune.implicit.double_backward import BY_DIFFERENCES
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.pattern import Pattern
from ift_tune.implicit.precision import full_precision
from ift_tune.implicit.process_group import anywhere
from ift_tune.implicit.vectors import (
    Tensors,
    dot,
    fill_missing,
    mul,
    randn_like,
    sub,
    zeros_like,
)
from ift_tune.implicit.vectors import precision as rounding_of
from ift_tune.joint.cost import FORWARD, GRADIENT, HVP
from ift_tune.problem.batches import Batch
from ift_tune.problem.losses import outer_losses, training_gradient
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size

MAX_GRADIENTS = 6.0
"""The most that the check may cost, in gradients of the training loss on its batch; `DOUBT` more
where rounding leaves the first answer in doubt."""

DOUBT = 2.0
_FURTHER = 16.0  # times the displacement, over which a difference in doubt is taken again
_ROUNDINGS = 4.0  # standard deviations of rounding that a difference may be off by

_MEND = (
    "look for gradient hooks, for custom functions that keep more than save_for_backward does, and "
    "for .detach() or .data of what depends on the weights"
)
_PENALTY_MEND = "correct `Penalty.hvp`, `mixed` or `add_gradient_`"
_NAMED = 3  # culprits in one error
_OFF = "or set start_check=False to go without this check"

_LONG = 2.0**20
"""How much longer the vector of the product is than the displacement: a hook that clips long
gradients leaves short products alone. A power of two, so that nothing is rounded by it."""

_LEAST_SCALE = 1e-2
_JUMPED = 0.15  # tolerance where units have left their piece: a part √h of them is a little off
_FLAT = 1e-3  # of the whole product: a tensor whose part is less is not judged
_RESIDUE = 100.0  # roundings of the whole: what is left of a gradient whose terms cancel


@dataclass(frozen=True)
class StartCheck:
    """What the check at the start of a run found: nothing wrong, or it would have raised.

    Attributes:
        status: ``"passed"``; ``"coarse"`` where low precision inside the loss (autocast) allowed
            a rough comparison only.
        gradients: What it cost, in gradients of the training loss on its batch.
        error: The largest relative error of a product over all tensors.
        kinks: Whether the training loss is smooth only piece by piece, as with ReLU or maxima.
        products: How products are made: ``"exact"``, or by ``"difference"``. Of the latter `error`
            is how far two of different steps are apart.
    """

    status: str
    gradients: float
    error: float
    kinks: bool
    products: str = "exact"


class _Precision(NamedTuple):
    """How far to move, and what to allow.

    Attributes:
        eps: The relative rounding of the least precise value in the loss.
        step: Displacement, in units of each tensor's scale.
        tolerance: The largest relative error of a tensor's product.
    """

    eps: float
    step: float
    tolerance: float

    @classmethod
    def of(cls, eps: float) -> _Precision:
        """Return what a rounding allows."""
        # A difference over h errs by h and by eps/h.
        return cls(eps, eps**0.5, max(0.05, 4.0 * eps**0.5))

    @property
    def noise(self) -> float:
        """The rounding of a difference quotient, relative to what is differenced."""
        return 10.0 * self.eps / self.step


Shifts: TypeAlias = list[tuple[Tensors, Tensors]]
"""Leaf tensors, each list with the steps by which they are moved."""


class _Point(NamedTuple):
    """The training loss and its gradient somewhere, without the penalty."""

    loss: float
    gradient: list[Tensor]


def check_start(
    problem: BilevelProblem,
    linearisation: Linearisation,
    train_batch: Batch,
    val_batch: Batch,
    redrawn: Callable[[], AbstractContextManager[None]],
    *,
    seed: int = 0,
) -> StartCheck:
    """Compare the products of a linearised problem with finite differences.

    Args:
        problem: At the weights and λ of `linearisation`, and as before afterwards.
        linearisation: Of these batches.
        train_batch: Of the training loss.
        val_batch: Of the validation loss.
        redrawn: A context in which the losses draw the random numbers of the linearisation again.
        seed: Of the directions.

    Returns:
        What it cost, and how well they agreed.

    Raises:
        StartCheckError: If a loss differs on repetition, or a derivative is not that of the loss;
            what may be behind it is named.
    """
    with full_precision(linearisation.train_loss.device) as rounding:
        return _Check(problem, linearisation, train_batch, val_batch, redrawn, seed, rounding).run()


class _Check:
    """One check, with what it has cost so far."""

    def __init__(
        self,
        problem: BilevelProblem,
        linearisation: Linearisation,
        train_batch: Batch,
        val_batch: Batch,
        redrawn: Callable[[], AbstractContextManager[None]],
        seed: int,
        rounding: float,
    ) -> None:
        self.rounding = rounding
        self.problem, self.at, self.redrawn = problem, linearisation, redrawn
        self.train_batch, self.val_batch = train_batch, val_batch
        self.weights, self.hypers = linearisation.weights, list(linearisation.hypers.values())
        self.scales = _scales(self.weights)
        self.direction = _scaled(self.scales, randn_like(self.weights, seed))
        self.seed = seed
        self.pattern = Pattern()
        self.gradients = self.error = 0.0

    def run(self) -> StartCheck:
        """Make all comparisons."""
        here = self._point([])
        # λ may be of another type than the weights, and what the loss computes of a third.
        eps = max(self.pattern.coarsest, rounding_of(self.weights), rounding_of(self.hypers))
        precision = _Precision.of(eps)
        # H·d itself has been computed in the run's own precision: in a deep net on a GPU, TF32
        # leaves a tenth of a small tensor's part of it in doubt.
        allowed = max(precision.tolerance, 8.0 * self.rounding**0.5)
        self.precision = precision = precision._replace(tolerance=allowed)
        self._require_same("train_loss", self.at.train_loss, here.loss)
        self._repeat_val_loss()
        by_weights, by_hypers = self._products()
        there = self._point([(self.weights, mul(self.direction, precision.step))])
        self._loosen_if_jumped()
        self._compare_loss(here, there, by_weights)
        self._compare_product(by_weights, here, there)
        if self.reached:
            self._compare_mixed(by_hypers, here)
        self._compare_penalty()
        coarse = self.rounding > 0.0 or precision.eps > torch.finfo(torch.float32).eps
        status = "coarse" if coarse else "passed"
        return StartCheck(status, self.gradients, self.error, self.pattern.kinks)

    def _point(self, shifts: Shifts) -> _Point:
        """Return the training loss and its gradient somewhere else, on the same piece of both."""
        self.gradients += GRADIENT
        with _moved(shifts), self.redrawn(), self.pattern:
            loss, gradient = training_gradient(self.problem, self.train_batch, self.weights)
        return _Point(float(loss), gradient)

    def _repeat_val_loss(self) -> None:
        """Take the validation loss once more, if its batch is small enough for that."""
        train, val = (
            as_size(self.problem.batch_size(b)) for b in (self.train_batch, self.val_batch)
        )
        if not train:  # a loss may count what it is a mean over, and there may be nothing
            return
        cost = FORWARD * (1.0 + val / train)
        if self.gradients + cost + 2 * GRADIENT + HVP > MAX_GRADIENTS:
            return
        self.gradients += cost
        with self.redrawn():
            _, val_loss = outer_losses(self.problem, self.train_batch, self.val_batch)
        self._require_same("val_loss", self.at.val_loss, float(val_loss.detach()))

    def _require_same(self, name: str, before: Tensor, again: float) -> None:
        # Sums on a GPU may come in another order; whatever draws differs by far more.
        allowed = max(100.0 * self.precision.eps, 10.0 * self.rounding)
        if abs(float(before) - again) > allowed * abs(again):
            raise StartCheckError(
                f"{name} must be the same on the same batch, weights and random numbers: draw from "
                "the global generators, which a run holds still, and keep no state between calls, "
                f"{_OFF}, got {float(before):.9g} and then {again:.9g}"
            )

    def _products(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return H·d and dᵀ·∂²L_T/∂w∂λᵀ as autograd computes them."""
        self.gradients += HVP
        # A long vector would overflow in half precision.
        length = _LONG if self.precision.eps <= torch.finfo(torch.float32).eps else 1.0
        by_weights, by_hypers = self.at.products(mul(self.direction, length))
        self.reached = any(product is not None for product in by_hypers)
        return (
            mul(fill_missing(tuple(by_weights), self.weights), 1.0 / length),
            mul(fill_missing(tuple(by_hypers), self.hypers), 1.0 / length),
        )

    def _compare_loss(self, here: _Point, there: _Point, curved: Tensors) -> None:
        """Hold the gradient against the loss: L(w + hd) = L + h·gᵀd + h²/2·dᵀHd + ..."""
        step = self.precision.step
        found = float(dot(here.gradient, self.direction) + 0.5 * step * dot(curved, self.direction))
        truth = (there.loss - here.loss) / step
        size = max(_length(_lengths(self.scales, here.gradient)), abs(truth))
        noise = self.precision.noise * max(abs(here.loss), abs(there.loss))
        if not abs(found - truth) <= self.precision.tolerance * size + noise:
            self._refuse(
                "the gradient of the training loss is not its derivative",
                f"a slope of {found:.3g} where the loss changes by {truth:.3g}",
            )

    def _compare_product(self, found: Tensors, here: _Point, there: _Point) -> None:
        """Hold H·d against the difference of the gradient along d."""
        step = self.precision.step
        near = self._quotient(here, there, step)
        wrong = self._wrong(found, near, here.gradient)
        if wrong:
            step *= _FURTHER
            there = self._point([(self.weights, mul(self.direction, step))])
            self._loosen_if_jumped()
            far = self._quotient(here, there, step)
            wrong = self._wrong(found, far, here.gradient, self._doubt(near, far))
        self._refuse_if(wrong, "the product H·v of the training loss")

    def _quotient(self, here: _Point, there: _Point, step: float) -> list[Tensor]:
        return mul(sub(there.gradient, here.gradient), 1.0 / step)

    def _doubt(self, near: Tensors, far: Tensors) -> list[float]:
        """Return by how much each part of a difference over the longer way may be off.

        A derivative is the same over both ways, the rounding of the gradient is not: what the
        shorter way's has of it, the longer way's has a part of.
        """
        parts = _lengths(self.scales, sub(near, far))
        return [_ROUNDINGS / _FURTHER * part for part in parts]

    def _loosen_if_jumped(self) -> None:
        if anywhere([self.pattern.jumped])[0]:
            allowed = max(_JUMPED, self.precision.tolerance)
            self.precision = self.precision._replace(tolerance=allowed)

    def _compare(
        self, what: str, found: Tensors, truth: Tensors, slope: Tensors, mend: str
    ) -> None:
        """Hold a product in closed form against a difference quotient, tensor by tensor."""
        self._refuse_if(self._wrong(found, truth, slope), what, mend)

    def _wrong(
        self,
        found: Tensors,
        truth: Tensors,
        slope: Tensors,
        rounding: Sequence[float] | None = None,
    ) -> list[tuple[float, str]]:
        """Return the relative error and the name of each tensor whose product is another.

        Args:
            found: The product.
            truth: The difference quotient.
            slope: The gradient.
            rounding: By how much each part of `truth` may be off, where that was measured.
        """
        errors = _lengths(self.scales, sub(found, truth))
        lengths = _lengths(self.scales, found), _lengths(self.scales, truth)
        sizes = [max(pair) for pair in zip(*lengths, strict=True)]
        slopes = _lengths(self.scales, slope)
        floor = _FLAT * _length(sizes) + self.precision.noise * max(slopes)
        names = {id(w): name for name, w in self.problem.model.named_parameters()}
        # A bias before batch normalisation has no gradient anywhere but what rounding leaves of
        # terms that cancel, and a difference quotient magnifies that.
        residue = _RESIDUE * self.precision.eps
        cancels = [
            part > 0.0
            and max(part, self.precision.step * change) <= residue * max(slopes)
            and product <= residue * _length(sizes)
            for part, product, change in zip(slopes, *lengths, strict=True)
        ]
        known = [0.0] * len(errors) if rounding is None else rounding
        wrong, worst_of_all = [], 0.0
        for weight, error, size, zero, off in zip(
            self.weights, errors, sizes, cancels, known, strict=True
        ):
            excess = max(error - floor - off, 0.0) / size if size and not zero else 0.0
            worst_of_all = max(worst_of_all, excess)
            if not excess <= self.precision.tolerance:
                wrong.append((error / size, names[id(weight)]))
        if not wrong:
            self.error = max(self.error, worst_of_all)
        return wrong

    def _refuse_if(self, wrong: Sequence[tuple[float, str]], what: str, mend: str = "") -> None:
        """Refuse a product that is another in some tensors, which are named.

        Raises:
            StartCheckError: If there are some.
        """
        if wrong:
            worst = sorted(wrong, reverse=True)[:3]
            places = ", ".join(f"{name} ({100 * error:.0f} %)" for error, name in worst)
            self._refuse(
                f"{what} is not the derivative of the gradient",
                f"a difference at {places}",
                mend,
                BY_DIFFERENCES,
            )

    def _compare_mixed(self, products: Tensors, here: _Point) -> None:
        """Hold dᵀ·∂²L_T/∂w∂λᵀ against a difference along λ."""
        step = self.precision.step
        along = self._hyper_direction(products, self.hypers)
        found = float(dot(products, along))
        noise = self.precision.noise * _length(_lengths(self.scales, here.gradient))

        def quotient(step: float) -> list[Tensor]:
            return self._quotient(here, self._point([(self.hypers, mul(along, step))]), step)

        near = quotient(step)
        truth = float(dot(near, self.direction))
        if self._excess(found, truth, noise) > self.precision.tolerance:
            far = quotient(_FURTHER * step)
            truth = float(dot(far, self.direction))
            noise += _length(self._doubt(near, far))
        self._judge_mixed(found, truth, noise, "the training loss")

    def _hyper_direction(self, products: Tensors, hypers: Tensors) -> list[Tensor]:
        """Return a random direction of λ, each entry of the sign that makes its product positive.

        So the products of many hyperparameters add up instead of averaging out.
        """
        drawn = _scaled(_scales(hypers), randn_like(hypers, self.seed + 1))
        return [
            torch.where(p == 0.0, d, d.abs() * p.sign())
            for d, p in zip(drawn, products, strict=True)
        ]

    def _judge_mixed(
        self, found: float, truth: float, noise: float, whose: str, mend: str = ""
    ) -> None:
        excess = self._excess(found, truth, noise)
        self.error = max(self.error, excess)
        if not excess <= self.precision.tolerance:
            self._refuse(
                f"the mixed product by λ of {whose} is not the derivative of its gradient",
                f"a slope of {found:.3g} where the gradient changes by {truth:.3g}",
                mend,
                BY_DIFFERENCES,
            )

    @staticmethod
    def _excess(found: float, truth: float, noise: float) -> float:
        size = max(abs(found), abs(truth))
        return max(abs(found - truth) - noise, 0.0) / size if size else 0.0

    def _compare_penalty(self) -> None:
        """Hold a penalty's closed forms against differences of its gradient: no pass of the net."""
        penalty, step = self.at.penalty, self.precision.step
        if penalty is None:
            return
        pattern = Pattern()
        here = self._penalty_slope([], pattern)
        there = self._penalty_slope([(self.weights, mul(self.direction, step))], pattern)
        back = self._penalty_slope([(self.weights, mul(self.direction, -step))], pattern)
        product = penalty.hvp(self.weights, self.direction)
        self._compare(
            "the product H·v of the penalty in closed form",
            product,
            _within(product, mul(sub(there, here), 1.0 / step), mul(sub(here, back), 1.0 / step)),
            here,
            _PENALTY_MEND,
        )
        products = penalty.mixed(self.weights, self.direction)
        along = self._hyper_direction(products, penalty.hypers)
        there = self._penalty_slope([(penalty.hypers, mul(along, step))], pattern)
        change = mul(sub(there, here), 1.0 / step)
        noise = self.precision.noise * _length(_lengths(self.scales, here))
        found, truth = float(dot(products, along)), float(dot(change, self.direction))
        self._judge_mixed(found, truth, noise, "the penalty", _PENALTY_MEND)

    def _penalty_slope(self, shifts: Shifts, pattern: Pattern) -> list[Tensor]:
        """Return the penalty's gradient at weights, or λ, that are moved."""
        slope = zeros_like(self.weights)
        with _moved(shifts), torch.no_grad(), pattern:
            penalty = self.problem.penalty()
            if penalty is not None:
                penalty.aligned(self.weights).add_gradient_(slope, self.weights)
        return slope

    def _refuse(self, what: str, difference: str, mend: str = "", instead: str = "") -> NoReturn:
        """Refuse the problem, with what may be behind it."""
        if not mend:
            mends = [m for m in (self._culprits(), instead) if m]
            mend = ", ".join(mends)
        raise StartCheckError(f"{what}: {mend}; {_OFF}, got {difference}")

    def _culprits(self) -> str:
        """Return what may be behind a derivative that is wrong."""
        with self.redrawn():
            loss, _ = outer_losses(self.problem, self.train_batch, self.val_batch)
        found = name_culprits(loss, self.problem.model)
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return "; ".join(found[:_NAMED]) + more or _MEND


@contextlib.contextmanager
def _moved(shifts: Shifts) -> Iterator[None]:
    """Move leaf tensors in place inside the context; afterwards they have the same bits again."""
    if not shifts:
        yield
        return
    tensors = [t for moved, _ in shifts for t in moved]
    saved = [t.detach().clone() for t in tensors]
    # By `.data`: the graphs that have saved these tensors are used again when they are back.
    places = [t.data for t in tensors]
    try:
        torch._foreach_add_(places, [s for _, steps in shifts for s in steps])
        yield
    finally:
        torch._foreach_copy_(places, saved)


def _scales(tensors: Tensors) -> list[Tensor]:
    """Return a typical size of each tensor's entries: moved by a part of it, a net stays alike."""
    sizes = [t.detach().square().mean().sqrt() for t in tensors]
    # A tensor that begins at zero, as biases do, goes by what the others are like.
    others = torch.stack([s.to(sizes[0]) for s in sizes]).mean()
    least = torch.clamp(0.1 * others, min=_LEAST_SCALE)
    return [torch.maximum(s, least.to(s)) for s in sizes]


def _scaled(scales: Tensors, tensors: Tensors) -> list[Tensor]:
    return [s * t for s, t in zip(scales, tensors, strict=True)]


def _within(found: Tensors, ahead: Tensors, behind: Tensors) -> list[Tensor]:
    """Return what two one-sided difference quotients tell: of that, what is nearest to `found`.

    Where they differ, as at a smoothed |w| whose width is that of the step, they tell no more than
    their mean, give or take their difference.
    """
    known = []
    for f, a, b in zip(found, ahead, behind, strict=True):
        middle, unknown = 0.5 * (a + b), (a - b).abs()
        known.append(middle + (f - middle).clamp(-unknown, unknown))
    return known


def _lengths(scales: Tensors, tensors: Tensors) -> list[float]:
    """Return each tensor's length in the measure of the loss: per unit of its scale."""
    return [float(s * torch.linalg.vector_norm(t)) for s, t in zip(scales, tensors, strict=True)]


def _length(lengths: list[float]) -> float:
    return float(torch.linalg.vector_norm(torch.tensor(lengths, dtype=torch.float64)))
