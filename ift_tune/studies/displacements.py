"""Displacements of λ, and what hypergradients say that each changes of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import derive_seed
from ift_tune.hyper import ExampleWeights, kinds_in
from ift_tune.implicit.vectors import (
    Tensors,
    count,
    dot,
    mul,
    unflatten,
)
from ift_tune.problem.problem import BilevelProblem

SIZES = (0.025, 0.05, 0.1, 0.2, 0.4)
"""Steps along the hypergradient, by their largest entry; each is twice the one before."""

_GONE = 1e-4  # the weight of an example that is left out

Change: TypeAlias = Callable[[BilevelProblem], None]

Slopes: TypeAlias = Mapping[str, Mapping[str, list[Tensor]]]
"""Hypergradients by inverse and split."""


class Displacement(NamedTuple):
    """A displaced λ.

    Attributes:
        kind: ``"gradient"``, ``"random"`` or ``"left out"``.
        size: Of the displacement: its largest entry, its root mean square, or the examples.
        change: Makes it.
        predicted: Changes of the losses, by split, for each inverse.
        repeated: Whether its training is repeated, for the noise.
        opposite: Makes the opposite displacement, where half the difference of both is what counts:
            near an optimum of λ curvature would hide the slope.
    """

    kind: str
    size: float
    change: Change
    predicted: Mapping[str, Mapping[str, float]]
    repeated: bool
    opposite: Change | None = None


def nothing(problem: BilevelProblem) -> None:
    """Leave λ as found."""


def along_hypergradient(slopes: Slopes) -> list[Displacement]:
    """Return steps against the hypergradient of the validation loss, each with its opposite."""
    gradient = slopes["predicted"]["val"]
    largest = max(float(g.abs().max()) for g in gradient)
    if not 0.0 < largest < math.inf:
        raise UsageError(
            "the hypergradient at the λ found must be finite and not zero: see solve_status in the "
            f"run's steps, and lower alpha, got a largest entry of {largest}"
        )
    steps = {size: mul(gradient, -size / largest) for size in SIZES}
    return [_both_ways("gradient", size, step, slopes, True) for size, step in steps.items()]


def along_random_directions(slopes: Slopes, directions: int) -> list[Displacement]:
    """Return steps along random directions, each with its opposite."""
    like = slopes["predicted"]["val"]
    generator = torch.Generator().manual_seed(derive_seed("certificate", "directions"))
    found = []
    for index in range(directions):
        flat = torch.randn(count(like), generator=generator, dtype=torch.float64)
        step = unflatten(flat.to(like[0]) * SIZES[-2], like)
        found.append(_both_ways("random", SIZES[-2], step, slopes, index % 2 == 0))
    return found


def _both_ways(
    kind: str, size: float, step: Tensors, slopes: Slopes, repeated: bool
) -> Displacement:
    predicted = {
        name: {split: float(dot(slope, step)) for split, slope in by_split.items()}
        for name, by_split in slopes.items()
    }
    return Displacement(kind, size, _moving(step), predicted, repeated, _moving(mul(step, -1.0)))


def _moving(step: Tensors) -> Change:
    """Return what moves λ by a step."""

    def change(problem: BilevelProblem) -> None:
        for hyper, piece in zip(problem.hypers(), step, strict=True):
            hyper.add_(piece.to(hyper))

    return change


def left_out(problem: BilevelProblem, slopes: Slopes, groups: int) -> list[Displacement]:
    """Return groups of training examples to be left out; none without example weights.

    Half of the groups are drawn, half are neighbours in the order of what they are said to do. The
    prediction is linear in the weight, not in the raw λ: that would have to go to −∞.
    """
    found: list[Displacement] = []
    for kind in kinds_in(problem.hyper, ExampleWeights):
        place = next(i for i, h in enumerate(problem.hypers()) if h is kind.raw)
        raw = kind.raw.detach().clone().requires_grad_()
        given = kind.transform.forward(raw)
        (steepness,) = torch.autograd.grad(given.sum(), raw)
        weight = given.detach()
        # dL/dc = (dL/dλ)/(dc/dλ); where the transform is saturated nothing is known, nor changed.
        inner = steepness > 1e-6
        effects = {
            name: {
                split: torch.where(inner, -weight * slope[place] / steepness.clamp(min=1e-6), 0.0)
                for split, slope in by_split.items()
            }
            for name, by_split in slopes.items()
        }
        generator = torch.Generator().manual_seed(derive_seed("certificate", "groups"))
        drawn = torch.randperm(len(raw), generator=generator)
        ordered = effects["predicted"]["search"].argsort().cpu()
        half = groups // 2
        for order, number in ((drawn, half), (ordered, groups - half)):
            for group in torch.tensor_split(order, max(number, 1))[:number]:
                found.append(_without(group.to(raw.device), kind, place, effects, len(found)))
    return found


def _without(
    group: Tensor,
    kind: ExampleWeights,
    place: int,
    effects: Mapping[str, Mapping[str, Tensor]],
    number: int,
) -> Displacement:
    gone = kind.transform.inverse(torch.tensor(_GONE))

    def change(problem: BilevelProblem) -> None:
        problem.hypers()[place][group] = gone

    predicted = {
        name: {split: float(effect[group].sum()) for split, effect in by_split.items()}
        for name, by_split in effects.items()
    }
    return Displacement("left out", float(len(group)), change, predicted, repeated=number % 4 == 0)
