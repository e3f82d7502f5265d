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
from ift_tune.implicit.differences import displaced, scales_of
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
from ift_tune.joint.tolerance import FURTHER, Tolerance, together
from ift_tune.problem.batches import Batch
from ift_tune.problem.losses import outer_losses, training_gradient
from ift_tune.problem.padding import without_padding
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size

MAX_GRADIENTS = 6.0
"""The most that the check may cost, in gradients of the training loss on its batch; `DOUBT` more
where rounding leaves the first answer in doubt."""

DOUBT = 2.0

INSTEAD = "or set start_check=False to go without this check"
"""What else can be done about a problem that is refused."""

_MEND = (
    "look for gradient hooks, for custom functions that keep more than save_for_backward does, and "
    "for .detach() or .data of what depends on the weights"
)
_PENALTY_MEND = "correct `Penalty.hvp`, `mixed` or `add_gradient_`"
_NAMED = 3  # culprits in one error

_LONG = 2.0**20
"""How much longer the vector of the product is than the displacement: a hook that clips long
gradients leaves short products alone. A power of two, so that nothing is rounded by it."""

_NOTHING = 100.0  # roundings of a number around 1: of less, no derivative can be judged


@dataclass(frozen=True)
class StartCheck:
    """What the check at the start of a run found: nothing wrong, or it would have raised.

    Attributes:
        status: ``"passed"``; ``"coarse"`` where low precision inside the loss (autocast), or a
            training loss of which rounding is a large part, allowed a rough comparison only, or
            none but of the penalty.
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


Move: TypeAlias = tuple[Tensors, Tensors, float]
"""Leaf tensors, a direction of theirs, and how far they are moved along it."""


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


def require_same(name: str, before: Tensor, again: float, allowed: float) -> None:
    """Refuse a loss that does not repeat.

    Args:
        name: Of the loss.
        before: Its value.
        again: That on the same batch, weights and random numbers.
        allowed: The relative difference.

    Raises:
        StartCheckError: If they differ by more.
    """
    one, two = float(before), float(again)
    if abs(one - two) > allowed * max(abs(one), abs(two)):
        raise StartCheckError(
            f"{name} must be the same on the same batch, weights and random numbers: draw from the "
            "global generators, which a run holds still, and keep no state between calls but in "
            "buffers, "
            f"{INSTEAD}, got {one:.9g} and then {two:.9g}"
        )


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
        self.direction = without_padding(problem.model, self.weights, _drawn(self.weights, seed))
        self.seed = seed
        self.pattern = Pattern()
        self.gradients = 0.0

    def run(self) -> StartCheck:
        """Make all comparisons."""
        here = self._point()
        # λ may be of another type than the weights, and what the loss computes of a third.
        eps = max(self.pattern.coarsest, rounding_of(self.weights), rounding_of(self.hypers))
        self.tolerance = Tolerance(scales_of(self.weights), eps, self.rounding)
        remains = max(abs(here.loss), self.tolerance.length(here.gradient))
        # Where few examples are fitted by many weights, a loss and its gradient are what is left of
        # numbers around 1: log(1 + e⁻¹⁵) and 1/(1 + e⁻¹⁵) − 1 have their rounding, which is all
        # that can be seen if next to nothing is left. A loss alone may be 0 by its definition.
        if remains < _NOTHING * eps:
            self._compare_penalty()
            return StartCheck("coarse", self.gradients, self.tolerance.error, self.pattern.kinks)
        if remains <= eps**0.25:
            eps /= remains
            self.tolerance = Tolerance(scales_of(self.weights), eps, self.rounding)
        self._require_same("train_loss", self.at.train_loss, here.loss)
        self._repeat_val_loss()
        by_weights, by_hypers = self._products()
        there = self._point((self.weights, self.direction, self.tolerance.step))
        self._loosen_if_jumped()
        self._compare_loss(here, there, by_weights)
        self._compare_product(by_weights, here, there)
        if self.reached:
            self._compare_mixed(by_hypers, here)
        self._compare_penalty()
        coarse = self.rounding > 0.0 or eps > torch.finfo(torch.float32).eps
        status = "coarse" if coarse else "passed"
        return StartCheck(status, self.gradients, self.tolerance.error, self.pattern.kinks)

    def _point(self, move: Move | None = None) -> _Point:
        """Return the training loss and its gradient, here or elsewhere on the same piece."""
        self.gradients += GRADIENT
        with _moved(move), self.redrawn(), self.pattern:
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
        require_same(name, before, again, max(100.0 * self.tolerance.eps, 10.0 * self.rounding))

    def _products(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return H·d and dᵀ·∂²L_T/∂w∂λᵀ as autograd computes them."""
        self.gradients += HVP
        # A long vector would overflow in half precision.
        length = _LONG if self.tolerance.eps <= torch.finfo(torch.float32).eps else 1.0
        by_weights, by_hypers = self.at.products(mul(self.direction, length))
        self.reached = any(product is not None for product in by_hypers)
        return (
            mul(fill_missing(tuple(by_weights), self.weights), 1.0 / length),
            mul(fill_missing(tuple(by_hypers), self.hypers), 1.0 / length),
        )

    def _compare_loss(self, here: _Point, there: _Point, curved: Tensors) -> None:
        """Hold the gradient against the loss: L(w + hd) = L + h·gᵀd + h²/2·dᵀHd + ..."""
        step, allowed = self.tolerance.step, self.tolerance.relative
        found = float(dot(here.gradient, self.direction) + 0.5 * step * dot(curved, self.direction))
        truth = (there.loss - here.loss) / step
        size = max(self.tolerance.length(here.gradient), abs(truth))
        noise = self.tolerance.noise * max(abs(here.loss), abs(there.loss))
        if not abs(found - truth) <= allowed * size + noise:
            self._refuse(
                "the gradient of the training loss is not its derivative",
                f"a slope of {found:.3g} where the loss changes by {truth:.3g}",
            )

    def _compare_product(self, found: Tensors, here: _Point, there: _Point) -> None:
        """Hold H·d against the difference of the gradient along d."""
        step, allowed = self.tolerance.step, self.tolerance
        near = _quotient(here.gradient, there.gradient, step)
        wrong = allowed.wrong(found, near, here.gradient)
        if wrong:
            step *= FURTHER
            there = self._point((self.weights, self.direction, step))
            self._loosen_if_jumped()
            far = _quotient(here.gradient, there.gradient, step)
            wrong = allowed.wrong(found, far, here.gradient, allowed.doubt(near, far))
        self._refuse_if(wrong, "the product H·v of the training loss")

    def _loosen_if_jumped(self) -> None:
        if anywhere([self.pattern.jumped])[0]:
            self.tolerance.loosen()

    def _refuse_if(self, wrong: Sequence[tuple[float, int]], what: str, mend: str = "") -> None:
        """Refuse a product that is another in some tensors, which are named.

        Raises:
            StartCheckError: If there are some.
        """
        if wrong:
            names = {id(w): name for name, w in self.problem.model.named_parameters()}
            named = sorted(((e, names[id(self.weights[i])]) for e, i in wrong), reverse=True)
            places = ", ".join(f"{name} ({100 * error:.0f} %)" for error, name in named[:_NAMED])
            self._refuse(
                f"{what} is not the derivative of the gradient",
                f"a difference at {places}",
                mend,
                BY_DIFFERENCES,
            )

    def _compare_mixed(self, products: Tensors, here: _Point) -> None:
        """Hold dᵀ·∂²L_T/∂w∂λᵀ against a difference along λ."""
        step, allowed = self.tolerance.step, self.tolerance
        along = self._hyper_direction(products, self.hypers)
        found = float(dot(products, along))
        noise = allowed.noise * allowed.length(here.gradient)

        def quotient(step: float) -> list[Tensor]:
            there = self._point((self.hypers, along, step))
            return _quotient(here.gradient, there.gradient, step)

        near = quotient(step)
        truth = float(dot(near, self.direction))
        if not allowed.allows(found, truth, noise):
            far = quotient(FURTHER * step)
            truth = float(dot(far, self.direction))
            noise += together(allowed.doubt(near, far))
        self._judge_mixed(found, truth, noise, "the training loss")

    def _hyper_direction(self, products: Tensors, hypers: Tensors) -> list[Tensor]:
        """Return a random direction of λ, each entry of the sign that makes its product positive.

        So the products of many hyperparameters add up instead of averaging out.
        """
        pairs = zip(_drawn(hypers, self.seed + 1), products, strict=True)
        return [torch.where(p == 0.0, d, d.abs() * p.sign()) for d, p in pairs]

    def _judge_mixed(
        self, found: float, truth: float, noise: float, whose: str, mend: str = ""
    ) -> None:
        if not self.tolerance.allows(found, truth, noise):
            self._refuse(
                f"the mixed product by λ of {whose} is not the derivative of its gradient",
                f"a slope of {found:.3g} where the gradient changes by {truth:.3g}",
                mend,
                BY_DIFFERENCES,
            )

    def _compare_penalty(self) -> None:
        """Hold a penalty's closed forms against differences of its gradient: no pass of the net."""
        penalty, step = self.at.penalty, self.tolerance.step
        if penalty is None:
            return
        pattern = Pattern()
        here = self._penalty_slope(pattern)
        there = self._penalty_slope(pattern, (self.weights, self.direction, step))
        back = self._penalty_slope(pattern, (self.weights, self.direction, -step))
        product = penalty.hvp(self.weights, self.direction)
        truth = _within(product, _quotient(here, there, step), _quotient(back, here, step))
        wrong = self.tolerance.wrong(product, truth, here)
        self._refuse_if(wrong, "the product H·v of the penalty in closed form", _PENALTY_MEND)
        products = penalty.mixed(self.weights, self.direction)
        along = self._hyper_direction(products, penalty.hypers)
        there = self._penalty_slope(pattern, (penalty.hypers, along, step))
        found = float(dot(products, along))
        slope = float(dot(_quotient(here, there, step), self.direction))
        noise = self.tolerance.noise * self.tolerance.length(here)
        self._judge_mixed(found, slope, noise, "the penalty", _PENALTY_MEND)

    def _penalty_slope(self, pattern: Pattern, move: Move | None = None) -> list[Tensor]:
        """Return the penalty's gradient, at weights, or λ, that may be moved."""
        slope = zeros_like(self.weights)
        with _moved(move), torch.no_grad(), pattern:
            penalty = self.problem.penalty()
            if penalty is not None:
                penalty.aligned(self.weights).add_gradient_(slope, self.weights)
        return slope

    def _refuse(self, what: str, difference: str, mend: str = "", instead: str = "") -> NoReturn:
        """Refuse the problem, with what may be behind it."""
        if not mend:
            mends = [m for m in (self._culprits(), instead) if m]
            mend = ", ".join(mends)
        raise StartCheckError(f"{what}: {mend}; {INSTEAD}, got {difference}")

    def _culprits(self) -> str:
        """Return what may be behind a derivative that is wrong."""
        with self.redrawn():
            loss, _ = outer_losses(self.problem, self.train_batch, self.val_batch)
        found = name_culprits(loss, self.problem.model)
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return "; ".join(found[:_NAMED]) + more or _MEND


@contextlib.contextmanager
def _moved(move: Move | None) -> Iterator[None]:
    """Move leaf tensors in place inside the context; afterwards they have the same bits again."""
    if move is None:
        yield
        return
    tensors, direction, step = move
    with displaced(tensors) as by:
        by(direction, torch.tensor(step, dtype=torch.float64), 1.0)
        yield


def _drawn(tensors: Tensors, seed: int) -> list[Tensor]:
    """Return a random direction of tensors, in units of their scales."""
    pairs = zip(scales_of(tensors), randn_like(tensors, seed), strict=True)
    return [scale * direction for scale, direction in pairs]


def _quotient(here: Tensors, there: Tensors, step: float) -> list[Tensor]:
    return mul(sub(there, here), 1.0 / step)


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
