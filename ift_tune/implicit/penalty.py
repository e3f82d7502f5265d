"""Regularisers with closed-form derivatives, so that only the data loss goes through autograd."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.vectors import Tensors, add, zeros_like


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

    places: Sequence[int] | None = None
    """Which of the weights it is over, by their numbers; None for all of them."""

    def aligned(self, weights: Tensors) -> Penalty:
        """Return this penalty as one over `weights`, which may be more than those that it is of.

        Args:
            weights: All weights of a problem, in order.

        Raises:
            UsageError: If it is of a tensor that is not among them.
        """
        return self

    def reached(self, weights: int) -> set[int]:
        """Return which of so many weights it is over, by their numbers."""
        return set(range(weights) if self.places is None else self.places)

    def stacked(self, hypers: Tensors) -> Penalty | None:
        """Return the penalties of several problems as one; None where they cannot be stacked.

        Its weights, gradients and vectors have one dimension more, the first, with an entry for
        each problem. The problems differ in nothing but the values of λ.

        Args:
            hypers: λ of all of them likewise, in the order of `self.hypers`.
        """
        return None

    @abc.abstractmethod
    def value(self, weights: Tensors) -> Tensor:
        """Return r(w, λ) as a scalar that autograd can follow to `weights` and to `hypers`."""

    @abc.abstractmethod
    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add ∂r/∂w, of the shapes of `weights`, to `gradient` in place."""

    @abc.abstractmethod
    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return (∂²r/∂w∂wᵀ) · vector, of the shapes of `weights`."""

    def add_hvp_(self, products: Tensors, weights: Tensors, vector: Tensors) -> None:
        """Add (∂²r/∂w∂wᵀ) · vector to `products` in place."""
        torch._foreach_add_(list(products), self.hvp(weights, vector))

    def with_hvp(self, products: Tensors, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return `products` + (∂²r/∂w∂wᵀ) · vector; no tensor of `products` is changed."""
        return add(products, self.hvp(weights, vector))

    @abc.abstractmethod
    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return vectorᵀ · ∂²r/∂w∂λᵀ, one tensor for each of `hypers`, of its shape."""


class PartPenalty(Penalty):
    """A penalty over some of the weights: no derivative by the others."""

    def __init__(self, part: Penalty, places: Sequence[int]) -> None:
        """Take the penalty, and the numbers of its weights among all."""
        self._part, self.places, self.hypers = part, list(places), part.hypers

    def aligned(self, weights: Tensors) -> Penalty:
        """Return the part as a penalty over other weights."""
        return self._part.aligned(weights)

    def stacked(self, hypers: Tensors) -> Penalty | None:
        """Return the stacked part, over the same of the weights."""
        part = self._part.stacked(hypers)
        return None if part is None else PartPenalty(part, self.places or ())

    def _of(self, tensors: Tensors) -> list[Tensor]:
        return [tensors[place] for place in self.places or ()]

    def value(self, weights: Tensors) -> Tensor:
        """Return the part's value."""
        return self._part.value(self._of(weights))

    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add the part's gradient in place."""
        self._part.add_gradient_(self._of(gradient), self._of(weights))

    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the part's product, zeros for the other weights."""
        whole = zeros_like(vector)
        products = self._part.hvp(self._of(weights), self._of(vector))
        for place, product in zip(self.places or (), products, strict=True):
            whole[place] = product
        return whole

    def with_hvp(self, products: Tensors, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the sum for the part's weights, and the others' products as they are."""
        found = list(products)
        part = self._part.with_hvp(self._of(products), self._of(weights), self._of(vector))
        for place, product in zip(self.places or (), part, strict=True):
            found[place] = product
        return found

    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the part's products."""
        return self._part.mixed(self._of(weights), self._of(vector))


def aligned_to(penalty: Penalty, own: Tensors, weights: Tensors) -> Penalty:
    """Return a penalty over the tensors `own` as one over `weights`.

    Where none of the tensors is there but `weights` have their shapes, they stand in for them:
    iterates of an unrolled loop, copies in another precision.

    Raises:
        UsageError: If some of them are not there.
    """
    numbers = {id(weight): i for i, weight in enumerate(weights)}
    places = [numbers[id(tensor)] for tensor in own if id(tensor) in numbers]
    if places == list(range(len(weights))) or (not places and _are_alike(own, weights)):
        return penalty
    if len(places) < len(own):
        raise UsageError(
            f"the penalty is over {len(own)} tensors, of which {len(own) - len(places)} are not "
            "trained: make it from the model, or a part of it, that the problem trains"
        )
    return PartPenalty(penalty, places)


def _are_alike(own: Tensors, others: Tensors) -> bool:
    """Return whether tensors may stand in for others: one by one, of the same shapes."""
    return [t.shape for t in own] == [t.shape for t in others]


class RemadePenalty(Penalty):
    """A penalty that is made anew for each use: what it computes from λ takes no memory between."""

    def __init__(self, make: Callable[[], Penalty]) -> None:
        """Take what makes it: always the same at the present λ."""
        self._make = make
        made = make()
        self.hypers, self.places = made.hypers, made.places

    def aligned(self, weights: Tensors) -> Penalty:
        """Return the same over other weights, made anew likewise."""
        return RemadePenalty(lambda: self._make().aligned(weights))

    def value(self, weights: Tensors) -> Tensor:
        """Return the penalty's value."""
        return self._make().value(weights)

    def add_gradient_(self, gradient: Tensors, weights: Tensors) -> None:
        """Add the penalty's gradient in place."""
        self._make().add_gradient_(gradient, weights)

    def hvp(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the penalty's product."""
        return self._make().hvp(weights, vector)

    def add_hvp_(self, products: Tensors, weights: Tensors, vector: Tensors) -> None:
        """Add the penalty's product in place."""
        self._make().add_hvp_(products, weights, vector)

    def with_hvp(self, products: Tensors, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the sum with the penalty's product."""
        return self._make().with_hvp(products, weights, vector)

    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the penalty's products."""
        return self._make().mixed(weights, vector)


class SumPenalty(Penalty):
    """The sum of several penalties over the same weights, each with hyperparameters of its own."""

    def __init__(self, parts: Sequence[Penalty]) -> None:
        self.parts = list(parts)
        self.hypers = [h for part in parts for h in part.hypers]
        if all(part.places is not None for part in self.parts):
            self.places = sorted({place for part in self.parts for place in part.places or ()})

    def aligned(self, weights: Tensors) -> Penalty:
        """Return the sum of the parts, each over its own of the weights."""
        return SumPenalty([part.aligned(weights) for part in self.parts])

    def stacked(self, hypers: Tensors) -> Penalty | None:
        """Return the sum of the stacked parts."""
        rest, parts = list(hypers), []
        for part in self.parts:
            own, rest = rest[: len(part.hypers)], rest[len(part.hypers) :]
            if (stacked := part.stacked(own)) is None:
                return None
            parts.append(stacked)
        return SumPenalty(parts)

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
        first, *others = self.parts
        return _with_parts(others, first.hvp(weights, vector), weights, vector)

    def with_hvp(self, products: Tensors, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the sum with every part's product."""
        return _with_parts(self.parts, products, weights, vector)

    def mixed(self, weights: Tensors, vector: Tensors) -> list[Tensor]:
        """Return the parts' products one after the other."""
        return [product for part in self.parts for product in part.mixed(weights, vector)]


def _with_parts(
    parts: Sequence[Penalty], products: Tensors, weights: Tensors, vector: Tensors
) -> list[Tensor]:
    """Return a sum of products with that of each part."""
    total = list(products)
    for part in parts:
        total = part.with_hvp(total, weights, vector)
    return total
