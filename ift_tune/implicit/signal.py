"""How far a hypergradient stands out of its noise: of the validation examples it was taken on.

The validation loss is a mean over examples, and the hypergradient is linear in its gradient v: that
of a part of the examples takes another solve with the same H, and nothing else. What the parts'
hypergradients differ by is the standard error of their mean (as of any mean of K independent
numbers: σ/√K), which is the noise of the step that λ takes. A λ that has learned all that the
validation split can tell follows noise alone from there on: to stop where the signal falls below it
is to stop early without a further split (Mahsereci et al. 2017 do so for weights).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ift_tune.implicit.inverse import Inverse
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.reading import Later
from ift_tune.implicit.vectors import Tensors, add, sub


@dataclass(frozen=True)
class Signal:
    """The squares of what a hypergradient is made of, by tensor of λ.

    Attributes:
        lengths: ‖g‖² of the hypergradient.
        errors: Its squared standard error, all entries together.
    """

    lengths: Sequence[float]
    errors: Sequence[float]

    def ratio(self, tensors: Collection[int] | None = None) -> float | None:
        """Return the signal over the noise; None where one is not finite.

        The square of a hypergradient is that of its signal and that of its noise, on average; so
        what is above the noise is the signal, and 0 says that nothing is. At 1 they are equal.
        Without noise it is infinite, unless there is nothing at all.

        Args:
            tensors: The places of some; None for all.
        """
        places = range(len(self.lengths)) if tensors is None else tensors
        length = sum(self.lengths[i] for i in places)
        error = sum(self.errors[i] for i in places)
        if not math.isfinite(length + error):
            return None
        if error == 0.0:
            return math.inf if length > 0.0 else 0.0
        return math.sqrt(max(0.0, length - error) / error)

    def ratios(self, groups: Mapping[str, Collection[int]]) -> dict[str, float]:
        """Return the finite ratios of groups of tensors, by their names."""
        found = {name: self.ratio(places) for name, places in groups.items()}
        return {n: r for n, r in found.items() if r is not None and math.isfinite(r)}


@dataclass(frozen=True)
class BegunSignal:
    """A `Signal` whose numbers have not been read.

    Attributes:
        signal: It.
        parts: The solves that it took.
        products: The Hessian-vector products of these.
    """

    signal: Later[Signal]
    parts: int
    products: int


def begin_signal(
    linearisation: Linearisation,
    inverse: Inverse,
    state: object,
    gradients: Tensors,
    absent: Collection[str] = (),
) -> BegunSignal:
    """Return the signal of a hypergradient, from those of the parts of the validation batch.

    Args:
        linearisation: With parts.
        inverse: That the hypergradient was taken with.
        state: What its `init` has made: the work that all parts share.
        gradients: The hypergradient.
        absent: Names of hyperparameters that the training batch need not use.
    """
    before = linearisation.operator.products
    number = len(linearisation.parts)
    lengths = [torch.stack(torch._foreach_norm(list(gradients)))]
    total: Tensors | None = None
    for vector, direct in linearisation.parts:
        solved = inverse.begin(state, vector)
        part = replace(linearisation, direct=direct).contract(solved.value, absent)
        # From the whole, and not from 0: the squares of small differences of large numbers are lost
        # in single precision.
        away = sub(part, gradients)
        lengths.append(torch.stack(torch._foreach_norm(away)))
        total = away if total is None else add(total, away)
    lengths.append(torch.stack(torch._foreach_norm(list(total or gradients))))
    size = len(gradients)

    def make(numbers: list[float]) -> Signal:
        rows = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        squares = [[x * x for x in row] for row in rows]
        whole, *parts, summed = squares
        errors = [
            max(0.0, sum(part[i] for part in parts) - summed[i] / number) / (number * (number - 1))
            for i in range(size)
        ]
        return Signal(whole, errors)

    products = linearisation.operator.products - before
    return BegunSignal(Later(lengths, make), number, products)


def kinds_of(names: Sequence[str], kinds: Collection[str]) -> dict[str, list[int]]:
    """Return the places of the tensors of each of several kinds of hyperparameters.

    Args:
        names: Of the tensors, in order.
        kinds: What the names of each kind's tensors begin with, up to a point.
    """
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        for kind in kinds:
            if name.startswith(f"{kind}."):
                found.setdefault(kind, []).append(place)
    return found
