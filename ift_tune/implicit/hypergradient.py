"""The hypergradient: direct term − mixed term · H⁻¹ · validation gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ift_tune.base.errors import UnreachableHyperparameterError, UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.curvature import Eigenpair, GaussNewton, Hessian, Operator
from ift_tune.implicit.double_backward import partial_vjp, refuse_hidden_curvature
from ift_tune.implicit.inverse import Inverse, Neumann, SolveStats
from ift_tune.implicit.inverse.neumann import GROWTH_LIMIT
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.vectors import Tensors, TensorSource, fill_missing, named, sub


@dataclass(frozen=True)
class WarmStart:
    """What one solve leaves for the next: the solution q, and the largest eigenpair if known."""

    solution: list[Tensor] | None = None
    eigenpair: Eigenpair | None = None


@dataclass(frozen=True)
class Hypergradient:
    """The gradient of the validation loss by the hyperparameters, and whether to trust it.

    Attributes:
        grads: One tensor per hyperparameter tensor, of its shape.
        status: How the linear solve came out; ``status.advice`` says which knob to turn.
        stats: HVPs, residual norm and seconds spent; see `SolveStats`.
        train_loss: The training loss without the penalty, detached.
        val_loss: The validation loss, detached.
        warm: For the next call's `warm`.
    """

    grads: list[Tensor]
    status: SolveStatus
    stats: SolveStats
    train_loss: Tensor
    val_loss: Tensor
    warm: WarmStart

    @property
    def usable(self) -> bool:
        """Whether an outer step may be taken with it.

        A diverging series with few terms is poor but not useless: with K = 3 and α·λ_max = 3 only
        the stiffest directions are wrong, and a scale-free outer optimiser still makes progress.
        Once a term has outgrown the first by `GROWTH_LIMIT`, nothing else is left in the sum.
        """
        residual = self.stats.relative_residual
        return self.status is not SolveStatus.NONFINITE and (
            residual is None or residual <= GROWTH_LIMIT
        )


def hypergradient(
    train_loss: Tensor,
    val_loss: Tensor,
    weights: TensorSource,
    hypers: TensorSource,
    *,
    inverse: Inverse | None = None,
    penalty: Penalty | None = None,
    outputs: Tensor | None = None,
    warm: WarmStart | None = None,
) -> Hypergradient:
    """Return dL_V/dλ by the implicit function theorem, at weights near a minimum of L_T.

    dL_V/dλ = ∂L_V/∂λ − (∂L_V/∂w) H⁻¹ ∂²L_T/∂w∂λᵀ (Lorraine, Vicol, Duvenaud 2020, eq. 2-3), with
    one inverse-Hessian-vector product whose cost does not depend on the number of hyperparameters.
    Pure: nothing is written to any ``.grad``, and the graphs of both losses stay usable.

    Args:
        train_loss: Scalar L_T that reaches `weights` and `hypers` through autograd.
        val_loss: Scalar L_V that reaches `weights`, and `hypers` or not.
        weights: The leaf tensors w: a module, a mapping or a list. Each may be unused in one loss.
        hypers: The leaf tensors λ, likewise.
        inverse: How to approximate H⁻¹. Default: ``Neumann()``, five terms with automatic α.
        penalty: A regulariser in closed form that belongs to L_T but is not in `train_loss`.
        outputs: The model's outputs that `train_loss` was computed from: the Gauss-Newton matrix
            takes the Hessian's place. It sees only what goes through them, so a regulariser of the
            weights must come as `penalty`.
        warm: ``result.warm`` of an earlier outer step: the solve starts from its solution and the
            power iteration from its eigenvector, whichever is there.

    Returns:
        The gradients, one for each of `hypers`, with status and stats.

    Raises:
        UsageError: If a loss is not a scalar with a graph to the weights, or an argument is wrong.
        UnreachableHyperparameterError: If some `hypers` do not influence ∂L_T/∂w; it names them.
        DoubleBackwardError: If an operation in `train_loss` has no second derivative.
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
    inverse = Neumann() if inverse is None else inverse
    n = len(w)
    by_val = torch.autograd.grad(
        val_loss, [*w.values(), *h.values()], retain_graph=True, allow_unused=True
    )
    by_train = torch.autograd.grad(
        train_loss, list(w.values()), create_graph=True, allow_unused=True
    )
    # Weights that L_T does not see have no row in the linear system: they cannot depend on λ.
    seen = [i for i, g in enumerate(by_train) if g is not None or penalty is not None]
    _require_reached(seen, w)
    seen_weights = [list(w.values())[i] for i in seen]
    gradient = [by_train[i] for i in seen]
    val_gradient = fill_missing(tuple(by_val[i] for i in seen), seen_weights)
    operator: Operator
    if outputs is None:
        operator = Hessian(gradient, seen_weights, penalty)
    else:
        operator = GaussNewton(train_loss, outputs, seen_weights, penalty)
    warm = warm or WarmStart()
    state = inverse.init(operator, warm.eigenpair)
    result = inverse.solve(state, val_gradient, warm.solution)
    mixed = _mixed(gradient, seen_weights, h, result.value, penalty)
    grads = sub(fill_missing(by_val[n:], list(h.values())), mixed)
    status = result.status
    if not all(bool(torch.isfinite(g).all()) for g in grads):
        status = SolveStatus.NONFINITE
    return Hypergradient(
        grads=grads,
        status=status,
        stats=replace(result.stats, seconds=time.perf_counter() - started),
        train_loss=train_loss.detach(),
        val_loss=val_loss.detach(),
        warm=WarmStart()
        if status is SolveStatus.NONFINITE
        else WarmStart(result.value, _still_largest(state.eigenpair, result.stats)),
    )


def _still_largest(eigenpair: Eigenpair | None, stats: SolveStats) -> Eigenpair | None:
    """Return the eigenpair, unless the solve has seen a larger eigenvalue: then begin anew."""
    largest = stats.largest_eigenvalue
    overtaken = eigenpair and largest is not None and largest > 1.05 * abs(eigenpair.value)
    return None if overtaken else eigenpair


def _mixed(
    gradient: Sequence[Tensor | None],
    weights: Tensors,
    hypers: dict[str, Tensor],
    solution: Tensors,
    penalty: Penalty | None,
) -> list[Tensor]:
    """Return qᵀ·∂²L_T/∂w∂λᵀ for each hyperparameter tensor.

    Raises:
        UnreachableHyperparameterError: If ∂L_T/∂w does not depend on one of them.
    """
    curved = [
        (g, q) for g, q in zip(gradient, solution, strict=True) if g is not None and g.requires_grad
    ]
    tensors = list(hypers.values())
    parts = list(partial_vjp([g for g, _ in curved], tensors, [q for _, q in curved]))
    if penalty is not None:
        closed = penalty.mixed(weights, solution)
        places = {id(t): i for i, t in enumerate(tensors)}
        for tensor, product in zip(penalty.hypers, closed, strict=True):
            if (place := places.get(id(tensor))) is not None:
                part = parts[place]
                parts[place] = product if part is None else part + product
    unreached = [name for name, part in zip(hypers, parts, strict=True) if part is None]
    if unreached:
        raise UnreachableHyperparameterError(
            f"{', '.join(unreached)}: the gradient of the training loss does not depend on "
            f"{'it' if len(unreached) == 1 else 'them'}. Use every hyperparameter in the training "
            "loss (or its penalty) without .detach() or .item(), or leave it to the outer search"
        )
    return fill_missing(tuple(parts), tensors)


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


def _require_reached(seen: list[int], weights: dict[str, Tensor]) -> None:
    if not seen:
        raise UsageError(
            f"train_loss depends on none of the weights ({', '.join(list(weights)[:3])}, ...)"
        )
