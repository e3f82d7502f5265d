"""Regularisers with closed-form derivatives, so that only the data loss goes through autograd."""

from __future__ import annotations

import abc
from collections.abc import Sequence

from torch import Tensor

from ift_tune.implicit.vectors import Tensors, add


class Penalty(abc.ABC):
    """A regulariser r(w, λ) that is added to the training loss, at one fixed value of λ.

    Built once per outer step, so whatever depends on λ alone (a softplus over a million decays)
    is computed once and serves all inner steps. In closed form, so that the inner loop builds no
    graph to λ: a million decays cost one fused multiply-add a step. `value` is the definition; the
    other methods are its derivatives, and `testing.check_hypergradient` compares them with
    autograd.

    Example:
        >>> import torch, ift_tune
        >>> class Ridge(ift_tune.Penalty):  # r = exp(λ)·‖w‖²
        ...     def __init__(self, raw):
        ...         self.hypers, self.decay = [raw], raw.detach().exp()
        ...     def value(self, weights):
        ...         return self.hypers[0].exp() * sum(w.square().sum() for w in weights)
        ...     def add_gradient_(self, gradient, weights):
        ...         for g, w in zip(gradient, weights):
        ...             g.add_(2.0 * self.decay * w.detach())
        ...     def hvp(self, weights, vector):
        ...         return [2.0 * self.decay * v for v in vector]
        ...     def mixed(self, weights, vector):
        ...         return [2.0 * self.decay * sum((w.detach() * v).sum()
        ...                                        for w, v in zip(weights, vector))]
        >>> raw, w = torch.zeros(()).requires_grad_(), torch.tensor([1.0, 2.0], requires_grad=True)
        >>> slope = [torch.zeros(2)]
        >>> Ridge(raw).add_gradient_(slope, [w])
        >>> slope, torch.autograd.grad(Ridge(raw).value([w]), [w])
        ([tensor([2., 4.])], (tensor([2., 4.]),))
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
