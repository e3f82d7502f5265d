"""What the first outer steps of a problem show: one measurement each, at a bounded price.

Each function measures one thing at the present weights and λ, and says it as a `Finding`, with the
setting to change where something is off. Their price, in gradients of the training loss on its
batch, does not depend on the problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import Enum
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.errors import IFTTuneError
from ift_tune.base.randomness import GlobalState, RandomStream, drawn_again
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.curvature import largest_eigenvalue
from ift_tune.implicit.hypergradient import Hypergradient, solve
from ift_tune.implicit.inverse import Inverse, Neumann, Nystrom
from ift_tune.implicit.preconditioner import NoPreconditioner
from ift_tune.implicit.vectors import Tensors, count, dot, fill_missing, norm, relative_error
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batch, to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.losses import aligned_penalty, linearise_problem, training_gradient
from ift_tune.problem.modes import evaluating, preserved_buffers
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size
from ift_tune.testing.frozen import as_double, double_batch
from ift_tune.testing.operations import ATTENTION, Operations, listed

DRAWS, FEWEST_DRAWS = 5, 3
"""Hypergradients whose noise is measured, and how many will do."""

_POWER_STEPS = 12
_BATCHES = 4  # whose mean gradient says how far the weights are from a minimum
_ALPHA_SMALL, _ALPHA_LARGE = 0.1, 2.0  # as in the diagnoses of a finished trial
_FAR, _NEAR = 1e-3, 1e-4  # of the training loss, what one step downhill would still take off
_WEAK = 1.0 / 3.0  # signal over noise: Adam's mean over some twenty steps makes it about 1
_COUNTED = 64  # batches of the validation split, whose examples are counted
_SAME, _LOST = 0.99, 0.3  # a cosine; and, of its length, what low precision may take


class Level(str, Enum):
    """What a finding asks of its reader."""

    OK = "ok"
    NOTE = "note"
    """To be known."""
    ADVICE = "advice"
    """It works, and a setting would make it better."""
    WRONG = "wrong"
    """The answer would be wrong, or none."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: A short key, for programs.
        level: What it asks of its reader.
        sentence: For readers; it has the numbers, and what to change.
        numbers: What was measured.
    """

    topic: str
    level: Level
    sentence: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return a line."""
        return f"{self.level.value:<6} {self.sentence}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values: what is not finite, as JSON cannot say, is None."""
        numbers = {k: v if math.isfinite(v) else None for k, v in self.numbers.items()}
        return {**asdict(self), "level": self.level.value, "numbers": numbers}


class SignalToNoise(NamedTuple):
    """A length over the noise of one draw, with its standard error."""

    ratio: float
    error: float


def signal_to_noise(products: np.ndarray[Any, np.dtype[np.float64]]) -> SignalToNoise:
    """Return ‖E g‖ over √(E‖g − E g‖²), from the inner products of at least three draws of g.

    Products of different draws have the mean ‖E g‖², without the bias of ‖ḡ‖². The standard error
    is the jackknife's.

    Example:
        >>> import numpy as np
        >>> from ift_tune.testing.symptoms import signal_to_noise
        >>> draws = np.array([[3.0, 0.1], [3.1, -0.1], [2.9, 0.0]])
        >>> signal_to_noise(draws @ draws.T).ratio > 10
        True
    """

    def ratio(kept: list[int]) -> float:
        part = products[np.ix_(kept, kept)]
        n = len(kept)
        own = float(np.trace(part)) / n
        signal = (float(part.sum()) - float(np.trace(part))) / (n * (n - 1))
        # Rounding leaves a little of draws that are all the same.
        noise = max(own - signal, 1e-12 * own)
        return math.sqrt(max(signal, 0.0) / noise) if own > 0.0 else 0.0

    n = len(products)
    every = list(range(n))
    without = np.array([ratio([j for j in every if j != i]) for i in every])
    error = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return SignalToNoise(ratio(every), error)


def batches_of(problem: BilevelProblem, split: str, most: int) -> list[Batch]:
    """Return the first batches of a split, on the problem's device; nobody's walk is moved."""
    loader = getattr(problem.splits, split)
    device = problem.weights()[0].device
    with RandomStream(0, device).aside():
        return [to_device(batch, device) for batch in islice(once_through(loader), most)]


def curvature_split(problem: BilevelProblem) -> str:
    """Return the split whose batches an outer step takes for the training loss."""
    return "train" if problem.splits.curvature is None else "curvature"


def scale_of_alpha(joint: JointOptimizer, train: Batch, val: Batch) -> tuple[Finding, float]:
    """Compare the series' step α with the largest eigenvalue of the Hessian, for some 40 gradients.

    Args:
        joint: At the weights to be looked at.
        train: A batch of the curvature loader.
        val: A batch of the validation loader.

    Returns:
        What was found, and the eigenvalue.
    """
    inverse = joint.config.inverse
    with _held_still(joint.problem):
        linearisation = joint.linearise(train, val)
        largest = largest_eigenvalue(linearisation.operator, steps=_POWER_STEPS).value
        stats = solve(linearisation, inverse).stats if isinstance(inverse, Neumann) else None
    numbers = {"lambda_max": largest}
    if largest < 0.0:
        return Finding(
            "alpha",
            Level.ADVICE,
            f"the Hessian's largest eigenvalue is negative ({largest:.3g}), so the weights are not "
            "near a minimum: take more inner steps, or set curvature=gauss_newton",
            numbers,
        ), largest
    if stats is None or stats.alpha is None:
        return Finding(
            "alpha",
            Level.NOTE,
            f"the Hessian's largest eigenvalue is about {largest:.3g}; {inverse.name} takes no α",
            numbers,
        ), largest
    plain = isinstance(getattr(inverse, "preconditioner", None), NoPreconditioner | None)
    whole = largest if plain else (stats.largest_eigenvalue or largest)
    product = stats.alpha * whole
    numbers |= {"alpha": stats.alpha, "alpha_lambda_max": product, "recommended": 1.0 / whole}
    found = f"α·λ_max = {product:.2g} (α = {stats.alpha:.3g}, λ_max = {whole:.3g})"
    mend = f"set alpha_scale=1, which is α = 1/λ_max, {1.0 / whole:.3g} here"
    if product > _ALPHA_LARGE:
        text = f"{found} is beyond 2, so that each further term makes the answer worse: {mend}"
        return Finding("alpha", Level.ADVICE, text, numbers), largest
    if product < _ALPHA_SMALL:
        text = f"{found} is tiny, so that the terms hardly differ from none: {mend}"
        return Finding("alpha", Level.ADVICE, text, numbers), largest
    return Finding("alpha", Level.OK, f"{found}: recommended is about 1", numbers), largest


def distance_from_minimum(
    joint: JointOptimizer, largest: float, first_loss: float, first_norm: float
) -> Finding:
    """Say how far the training is from converged, for at most 4 gradients.

    The gradient's length alone has no scale. A step of it over λ_max lowers the loss by at least
    ‖g‖²/(2λ_max), and that is compared with the loss.

    Args:
        joint: At the weights to be looked at.
        largest: λ_max there.
        first_loss: The training loss in the first outer step.
        first_norm: The length of the gradient before training, or NaN.
    """
    length, loss = gradient_and_loss(joint.problem)
    whole = max(abs(first_loss), abs(loss), 1e-12)
    gain = length**2 / (2.0 * abs(largest)) / whole if largest else math.inf
    numbers = {"gradient_norm": length, "gain": gain, "inner_steps": float(joint.inner_steps)}
    first = ""
    if first_norm > 0.0:
        numbers["gradient_share"] = length / first_norm
        first = f", {100.0 * length / first_norm:.0f} % of the one at the start"
    found = (
        f"after {joint.inner_steps} inner steps one step downhill would lower the training loss by "
        f"{100.0 * gain:.2g} % (gradient norm {length:.2g}{first})"
    )
    if gain > _FAR:
        text = (
            f"{found}: the inner problem is not converged, and the hypergradient is that of a net "
            "on its way: raise inner_steps or inner_lr, or train the weights before λ moves "
            "(JointOptimizer.train_weights)"
        )
        return Finding("convergence", Level.ADVICE, text, numbers)
    level = Level.OK if gain <= _NEAR else Level.NOTE
    return Finding("convergence", level, f"{found}: near a minimum", numbers)


def gradient_and_loss(problem: BilevelProblem) -> tuple[float, float]:
    """Return the length of the training objective's mean gradient, and its mean without penalty.

    Over several batches by the products of different ones, which are free of their noise.
    """
    grads, losses = [], []
    weights = problem.weights()
    with _held_still(problem):
        penalty = aligned_penalty(problem)
        for batch in batches_of(problem, curvature_split(problem), _BATCHES):
            loss, gradient = training_gradient(problem, batch, weights)
            gradient = [g.clone() for g in gradient]
            if penalty is not None:
                penalty.add_gradient_(gradient, weights)
            grads.append(gradient)
            losses.append(float(loss))
    table = _products(grads)
    n = len(grads)
    square = (table.sum() - np.trace(table)) / (n * (n - 1)) if n > 1 else float(table[0, 0])
    return math.sqrt(max(float(square), 0.0)), float(np.mean(losses))


def hypergradients(joint: JointOptimizer, draws: int) -> list[Hypergradient]:
    """Return the hypergradients of the next pairs of batches, λ standing still."""
    return [joint.hypergradient() for _ in range(draws)]


def noise(drawn: Sequence[Hypergradient]) -> Finding:
    """Compare the hypergradient with its noise from one outer step to the next."""
    usable = [result.grads for result in drawn if result.usable]
    if len(usable) < FEWEST_DRAWS:
        text = (
            f"{len(drawn) - len(usable)} of {len(drawn)} hypergradients were unusable: "
            f"{drawn[0].status.advice}"
        )
        return Finding("noise", Level.ADVICE, text, {"unusable": float(len(drawn) - len(usable))})
    ratio, error = signal_to_noise(_products(usable))
    numbers = {"signal_to_noise": ratio, "standard_error": error, "draws": float(len(usable))}
    if ratio > 1e3:
        text = "the hypergradient has no noise: its batches are the same in every outer step"
        return Finding("noise", Level.OK, text, numbers)
    found = (
        f"hypergradient over its noise from batch to batch: {ratio:.2g} ± {error:.2g} (standard "
        f"error, {len(usable)} pairs of batches)"
    )
    if ratio + error < _WEAK:
        text = f"{found}: below its noise: larger validation and curvature batches, or a lower "
        return Finding("noise", Level.ADVICE, f"{text}meta_lr", numbers)
    return Finding("noise", Level.OK, found, numbers)


def without_effect(joint: JointOptimizer, drawn: Sequence[Hypergradient]) -> list[Finding]:
    """Name the hyperparameters whose hypergradient is zero in every entry and every draw."""
    names = [n for n, p in joint.problem.hyper.named_parameters() if p.requires_grad]
    still = [
        name
        for i, name in enumerate(names)
        if not any(bool(result.grads[i].any()) for result in drawn)
    ]
    if not still:
        return []
    text = (
        f"hyperparameters without effect: the hypergradient of {listed(still)} is exactly zero: "
        "look for what multiplies them by zero (a mask, a dead unit, a saturated transform)"
    )
    return [Finding("effect", Level.ADVICE, text, {"tensors": float(len(still))})]


def effect_of_precision(joint: JointOptimizer, train: Batch, val: Batch, largest: float) -> Finding:
    """Compare the hypergradient with that of a copy in float64, for the price of two.

    In evaluation mode: random numbers of another precision are others.
    """
    problem, inverse = joint.problem, _comparable(joint.config.inverse, largest)
    own = str(problem.weights()[0].dtype).removeprefix("torch.")
    if _draws(problem, train):
        text = "precision not looked at: the losses draw random numbers in evaluation mode too"
        return Finding("precision", Level.NOTE, text)
    try:
        double = as_double(problem, same_splits=True)
        products = joint.config.products
        mine = _in_evaluation(problem, train, val, inverse, products)
        theirs = _in_evaluation(double, double_batch(train), double_batch(val), inverse, products)
    except (IFTTuneError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        text = f"precision not looked at: the problem does not run in float64 ({reason})"
        return Finding("precision", Level.NOTE, text)
    ours = [g.double() for g in mine]
    cosine, lost = _cosine(ours, theirs), relative_error(ours, theirs)
    found = (
        f"the hypergradient in {own} has the cosine {cosine:.4f} with the one in float64, and "
        f"differs by {100.0 * lost:.2g} %"
    )
    numbers = {"cosine": cosine, "error": lost}
    if not (cosine >= _SAME and lost <= _LOST):
        text = f"{found}: compute the losses of outer steps in a higher precision, without autocast"
        return Finding("precision", Level.ADVICE, text, numbers)
    return Finding("precision", Level.OK, found, numbers)


def effect_of_kernels(
    problem: BilevelProblem, train: Batch, operations: Operations
) -> list[Finding]:
    """Compare the gradient on fast attention with that of plain mathematics, for two gradients."""
    if not any(r.operation == ATTENTION for r in operations.replaced):
        return []
    weights = problem.weights()
    with _held_still(problem), evaluating(problem.model), preserved_buffers(problem.model):
        fast = torch.autograd.grad(problem.train_loss(train), weights, allow_unused=True)
        _, plain = training_gradient(problem, train, weights)
    cosine = _cosine([g.double() for g in fill_missing(fast, weights)], [g.double() for g in plain])
    text = f"the gradient on fast attention has the cosine {cosine:.4f} with that of mathematics"
    level = Level.OK if cosine >= _SAME else Level.ADVICE
    if level is Level.ADVICE:
        text += ": inner and outer steps see different losses; compute attention in float32"
    return [Finding("attention", level, text, {"cosine": cosine})]


@contextmanager
def _held_still(problem: BilevelProblem) -> Iterator[None]:
    """Draw the same random numbers in each such context, and leave the generators as they are."""
    device = problem.weights()[0].device
    with ordinary_autograd("the check", device), RandomStream(0, device).aside():
        yield


def _draws(problem: BilevelProblem, batch: Batch) -> bool:
    """Return whether the training loss draws random numbers in evaluation mode."""
    device = problem.weights()[0].device
    with (
        _held_still(problem),
        torch.no_grad(),
        evaluating(problem.model),
        evaluating(problem.hyper),
    ):
        before = GlobalState(device)
        first = float(problem.train_loss(batch))
        with drawn_again(before, device):
            again = float(problem.train_loss(batch))
        return first == again and float(problem.train_loss(batch)) != first


def _in_evaluation(
    problem: BilevelProblem, train: Batch, val: Batch, inverse: Inverse, products: str
) -> list[Tensor]:
    with _held_still(problem), evaluating(problem.model), evaluating(problem.hyper):
        return solve(linearise_problem(problem, train, val, products=products), inverse).grads


def _comparable(inverse: Inverse, largest: float) -> Inverse:
    """Return an inverse that does the same in every precision: nothing of it is drawn.

    An automatic α comes from a random vector, and so does Nyström's sketch.
    """
    alpha = 1.0 / abs(largest) if largest else 1.0
    if isinstance(inverse, Neumann):
        return Neumann(terms=inverse.terms, alpha=alpha)
    return Neumann(alpha=alpha) if isinstance(inverse, Nystrom) else inverse


def _products(vectors: Sequence[Tensors]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([[float(dot(a, b)) for b in vectors] for a in vectors])


def _cosine(a: Tensors, b: Tensors) -> float:
    lengths = float(norm(a)) * float(norm(b))
    return float(dot(a, b)) / lengths if lengths > 0.0 else math.nan


def many_hypers(problem: BilevelProblem) -> list[Finding]:
    """Say so where λ has more entries than there are examples to judge it by."""
    hypers = count(problem.hypers())
    batches = batches_of(problem, "val", _COUNTED)
    examples = sum(as_size(problem.batch_size(batch)) for batch in batches)
    if hypers <= examples or len(batches) == _COUNTED:
        return []
    text = (
        f"{hypers:,} hyperparameters and {examples:,.0f} validation examples: λ can fit them by "
        "heart, so believe the search and test splits only"
    )
    return [Finding("overfitting", Level.NOTE, text, {"hypers": hypers, "examples": examples})]
