"""Regularisers with closed-form derivatives, so that only the data loss goes through autograd."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from torch import Tensor

from ift_tune.implicit.vectors import Tensors, add


class Penalty(abc.ABC):
    """A regulariser r(w, λ) that is added to the training loss, at one fixed value of λ.

    Built once per outer step, so whatever depends on λ alone (a softplus over a million decays)
    is computed once and serves all inner steps. `value` is the definition; the other methods are
    its derivatives, and `testing.check_hypergradient` compares them with autograd.
    """

    hypers: list[Tensor]
    """The tensors of λ that the penalty depends on, in the order `mixed` answers in."""

    @abc.abstractmethod
    def value(self, weights: Tensors) -> Tensor:
        """Return r(w, λ) as a scalar that autograd can follow to `weights` and to `hypers`."""

    @abc.abstractmethod
    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add ∂r/∂w, of the shapes of `weights`, to `gradient` in place."""

    @abc.abstractmethod
    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return (∂²r/∂w∂wᵀ) · vector, of the shapes of `weights`."""

    @abc.abstractmethod
    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return vectorᵀ · ∂²r/∂w∂λᵀ, one tensor for each of `hypers`, of its shape."""


class SumPenalty(Penalty):
    """The sum of several penalties over the same weights, each with hyperparameters of its own."""

    def __init__(self, parts: Sequence[Penalty]) -> None:
        self.parts = list(parts)
        self.hypers = [h for part in parts for h in part.hypers]

    def value(self, weights: Tensors) -> Tensor:
        """Return the sum of the parts' values."""
        total = self.parts[0].value(weights)
        for part in self.parts[1:]:
            total = total + part.value(weights)
        return total

    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add every part's gradient in place."""
        for part in self.parts:
            part.add_gradient_(gradient, weights)

    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the sum of the parts' products."""
        total = self.parts[0].hvp(weights, vector)
        for part in self.parts[1:]:
            total = add(total, part.hvp(weights, vector))
        return total

    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the parts' products one after the other."""
        return [product for part in self.parts for product in part.mixed(weights, vector)]
