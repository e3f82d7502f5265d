"""Two losses linearised at the present weights: all that a hypergradient is made of but q = H⁻¹v.

One path leads from a problem to its hypergradient: `linearise`, solve H·q = v by any inverse,
`Linearisation.contract`. Training, the check and the studies differ in where q comes from alone.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ift_tune.base.errors import DoubleBackwardError, UnreachableHyperparameterError, UsageError
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.curvature import GaussNewton, Hessian, Operator
from ift_tune.implicit.differences import Source
from ift_tune.implicit.double_backward import BY_DIFFERENCES, Kernels, partial_vjp
from ift_tune.implicit.hidden_curvature import refuse_hidden_curvature, refuse_power_iteration
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.process_group import anywhere, summed
from ift_tune.implicit.vectors import Tensors, TensorSource, fill_missing, mul, named, norm, sub


@dataclass(frozen=True, eq=False)
class Linearisation:
    """Two losses to first order around the present weights.

    The graph of the training loss's gradient lives as long as this object does.

    Attributes:
        operator: H, over the weights that L_T sees.
        vector: v = ∂L_V/∂w over the same weights.
        direct: ∂L_V/∂λ at fixed weights, of the shapes of the hyperparameters.
        judging: Names of the hyperparameters that L_V itself depends on.
        train_loss: The training loss without the penalty, detached.
        val_loss: The validation loss, detached.
        gradient: ∂L_T/∂w without the penalty, with its graph; None where only the penalty reaches.
            Of this process's share, where several share the loss (see `process_group`).
        weights: The weights that L_T sees.
        hypers: λ by name.
        penalty: The regulariser in closed form, part of H and of the mixed term; or None.
        kernels: Those that the graph was built with.
        seconds: What making it took.
        source: Of products that are not on a graph in memory, but run the training loss again;
            `gradient` is empty then.
        acting: Names of the hyperparameters that L_T itself depends on, where that is known.
        parts: `vector` and `direct` of the validation loss of parts of its batch, where asked for.

    Example:
        >>> import ift_tune
        >>> from ift_tune.implicit.linearisation import linearise
        >>> problem = ift_tune.testing.Quadratic(weights=6, hypers=3)
        >>> losses = problem.train_loss(None), problem.val_loss(None)
        >>> linearisation = linearise(*losses, problem.model, problem.hyper)
        >>> matrix = linearisation.operator.dense()
        >>> q = [matrix.inverse() @ linearisation.vector[0]]
        >>> [grad.shape for grad in linearisation.contract(q)]
        [torch.Size([3])]
    """

    operator: Operator
    vector: list[Tensor]
    direct: list[Tensor]
    judging: frozenset[str]
    train_loss: Tensor
    val_loss: Tensor
    gradient: Sequence[Tensor | None]
    weights: list[Tensor]
    hypers: Mapping[str, Tensor]
    penalty: Penalty | None
    kernels: Kernels
    seconds: float
    source: Source | None = None
    acting: frozenset[str] | None = None
    parts: Sequence[tuple[list[Tensor], list[Tensor]]] = ()

    def gradient_norm(self) -> float:
        """Return ‖∂L_T/∂w‖, the penalty included: 0 where the implicit function theorem holds."""
        found = self.gradient if self.source is None else self.source.gradient(self.weights)
        slope = fill_missing(summed(tuple(found), self.weights), self.weights)
        slope = [g.detach().clone() for g in slope]  # the penalty adds to them in place
        if self.penalty is not None:
            self.penalty.add_gradient_(slope, self.weights)
        return float(norm(slope))

    def contract(self, solution: Tensors, absent: Collection[str] = ()) -> list[Tensor]:
        """Return ∂L_V/∂λ − qᵀ·∂²L_T/∂w∂λᵀ, of the shapes of the hyperparameters.

        Args:
            solution: q, of the shapes of `vector`.
            absent: Names of hyperparameters that need not be in this batch: 0 where they are not.

        Raises:
            UnreachableHyperparameterError: If neither ∂L_T/∂w nor L_V depends on one of the others.
        """
        with self.kernels.active():
            mixed = self._mixed(solution, self.judging.union(absent))
            found = sub(self.direct, mixed) if self.judging else mul(mixed, -1.0)
        # A penalty's products have the type of the weights, which need not be that of λ.
        return [g.to(h.dtype) for g, h in zip(found, self.hypers.values(), strict=True)]

    def products(self, vector: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Return H·v and vᵀ·∂²L_T/∂w∂λᵀ of the loss alone, without the penalty, in one pass.

        Args:
            vector: v, of the shapes of the weights.

        Returns:
            By tensor, None where autograd reaches nothing.
        """
        with self.kernels.active():
            found = self._data_products([*self.weights, *self.hypers.values()], vector)
        n = len(self.weights)
        return found[:n], found[n:]

    def _data_products(self, inputs: Tensors, vector: Tensors) -> list[Tensor | None]:
        """Return vᵀ·∂²L_T/∂w∂inputsᵀ of the loss alone, None where nothing is reached."""
        if self.source is not None:
            idle = {id(h) for n, h in self.hypers.items() if n not in (self.acting or ())}
            asked = [t for t in inputs if id(t) not in idle]
            # Two passes through a net tell nothing about what the loss does not depend on.
            found = self.source.products(asked, vector) if asked else []
            by_tensor = {id(t): part for t, part in zip(asked, found, strict=True)}
            return [by_tensor.get(id(t)) for t in inputs]
        curved = [
            (g, v)
            for g, v in zip(self.gradient, vector, strict=True)
            if g is not None and g.requires_grad
        ]
        parts = partial_vjp([g for g, _ in curved], inputs, [v for _, v in curved])
        return list(summed(parts, inputs))

    def reached(self) -> set[str]:
        """Return the names of the hyperparameters that a loss or the penalty depends on here."""
        _, parts = self.products(self.vector)
        closed = {id(t) for t in ([] if self.penalty is None else self.penalty.hypers)}
        named_parts = zip(self.hypers.items(), parts, strict=True)
        found = {n for (n, t), part in named_parts if part is not None or id(t) in closed}
        return found | self.judging

    def _mixed(self, solution: Tensors, absent: Collection[str]) -> list[Tensor]:
        """Return qᵀ·∂²L_T/∂w∂λᵀ: one backward pass, whatever the number of hyperparameters."""
        tensors = list(self.hypers.values())
        parts = self._data_products(tensors, solution)
        if self.penalty is not None:
            closed = self.penalty.mixed(self.weights, solution)
            places = {id(t): i for i, t in enumerate(tensors)}
            for tensor, product in zip(self.penalty.hypers, closed, strict=True):
                # A penalty may have hyperparameters that are not asked for.
                if (place := places.get(id(tensor))) is not None:
                    part = parts[place]
                    parts[place] = product if part is None else part + product
        # None is not a zero that happens to be: λ is nowhere on the way to the gradient, a mistake.
        unreached = [name for name, part in zip(self.hypers, parts, strict=True) if part is None]
        if missing := [name for name in unreached if name not in absent]:
            raise UnreachableHyperparameterError(missing)
        return fill_missing(tuple(parts), tensors)


def linearise(
    train_loss: Tensor,
    val_loss: Tensor,
    weights: TensorSource,
    hypers: TensorSource,
    *,
    penalty: Penalty | None = None,
    outputs: Tensor | None = None,
    parts: Sequence[Tensors | Sequence[Tensor | None]] = (),
) -> Linearisation:
    """Return what `hypergradient` solves and contracts; its arguments and errors are the same.

    In `parts` are gradients of further validation losses by the weights and then by λ, as autograd
    gives them.
    """
    started = time.perf_counter()
    w, h = named(weights, "weights"), named(hypers, "hypers")
    _check_losses(train_loss, val_loss, w)
    shared = [name for name, t in h.items() if any(t is weight for weight in w.values())]
    if shared:
        raise UsageError(f"{', '.join(shared)}: a tensor is a weight or a hyperparameter, not both")
    if outputs is not None and not outputs.requires_grad:
        raise UsageError("outputs has no graph to the weights: pass it without .detach()")
    refuse_hidden_curvature(train_loss)
    if isinstance(weights, nn.Module):
        refuse_power_iteration(weights)
    with ordinary_autograd("hypergradient()", train_loss.device):
        n = len(w)
        by_val: tuple[Tensor | None, ...] = torch.autograd.grad(
            val_loss, [*w.values(), *h.values()], retain_graph=True, allow_unused=True
        )
        by_train = torch.autograd.grad(
            train_loss, list(w.values()), create_graph=True, allow_unused=True
        )
        _refuse_sparse(by_train, list(w))
        by_val = _whole(by_val, [*w.values(), *h.values()])
        # Weights that L_T does not see are left out of the linear system: they cannot depend on λ,
        # and their rows of zeros would make H singular. A penalty sees those that it is over.
        every = list(w.values())
        penalised = set() if penalty is None else penalty.aligned(every).reached(n)
        reached = anywhere([g is not None for g in by_train])
        seen = [i for i in range(n) if reached[i] or i in penalised]
        _require_reached(seen, w)
        seen_weights = [every[i] for i in seen]
        if penalty is not None:
            penalty = penalty.aligned(seen_weights)
        gradient = [by_train[i] for i in seen]
        operator: Operator
        if outputs is None:
            operator = Hessian(gradient, seen_weights, penalty)
        else:
            operator = GaussNewton(train_loss, outputs, seen_weights, penalty)

        def split(slopes: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
            vector = fill_missing(tuple(slopes[i] for i in seen), seen_weights)
            return vector, fill_missing(tuple(slopes[n:]), list(h.values()))

        vector, direct = split(by_val)
        others = [split(_whole(part, [*w.values(), *h.values()])) for part in parts]
    return Linearisation(
        operator=operator,
        vector=vector,
        direct=direct,
        judging=frozenset(name for name, g in zip(h, by_val[n:], strict=True) if g is not None),
        train_loss=train_loss.detach(),
        val_loss=val_loss.detach(),
        gradient=gradient,
        weights=seen_weights,
        hypers=h,
        penalty=penalty,
        kernels=Kernels.in_force(),
        seconds=time.perf_counter() - started,
        parts=others,
    )


def _whole(slopes: Sequence[Tensor | None], inputs: Tensors) -> tuple[Tensor | None, ...]:
    """Return a gradient of a validation loss, all processes' shares of it, in a dense form."""
    dense = [g.to_dense() if g is not None and _is_sparse(g) else g for g in slopes]
    return summed(dense, inputs)


def _check_losses(train_loss: Tensor, val_loss: Tensor, weights: dict[str, Tensor]) -> None:
    for name, loss in (("train_loss", train_loss), ("val_loss", val_loss)):
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UsageError(f"{name} must be a scalar tensor, got {shape}; reduce it with .mean()")
        if not loss.requires_grad:
            raise UsageError(
                f"{name} has no graph to the weights ({', '.join(list(weights)[:3])}, ...): "
                "compute it outside torch.no_grad() and without .detach()"
            )


def _is_sparse(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout is not torch.strided


def _refuse_sparse(gradients: Sequence[Tensor | None], names: list[str]) -> None:
    """Refuse gradients in a sparse form: there are no products with their derivatives.

    Raises:
        DoubleBackwardError: If there is one; its weight is named.
    """
    for name, gradient in zip(names, gradients, strict=True):
        if _is_sparse(gradient):
            raise DoubleBackwardError(
                f"the gradient of the training loss by {name} is sparse, which has no second "
                "derivative: compute the losses inside `ift_tune.safe_kernels()`, where embeddings "
                "have dense ones, or leave out sparse=True and sparse_grad=True, "
                f"{BY_DIFFERENCES}"
            )


def _require_reached(seen: list[int], weights: dict[str, Tensor]) -> None:
    if not seen:
        raise UsageError(
            f"train_loss depends on none of the weights ({', '.join(list(weights)[:3])}, ...)"
        )
