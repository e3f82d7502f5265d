"""The hypergradient: direct − mixed · H⁻¹ · ∇L_V, or through the last steps of gradient descent."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.curvature import Eigenpair
from ift_tune.implicit.hidden_curvature import refuse_repetition
from ift_tune.implicit.inverse import Inverse, Neumann, SolveStats
from ift_tune.implicit.inverse.neumann import GROWTH_LIMIT
from ift_tune.implicit.linearisation import Linearisation, linearise
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.reading import Later
from ift_tune.implicit.signal import BegunSignal, begin_signal
from ift_tune.implicit.vectors import TensorSource, all_finite, fill_missing, named, norm


@dataclass(frozen=True)
class WarmStart:
    """What one solve leaves for the next: the solution q, and the largest eigenpair if known.

    Attributes:
        solution: q, of the shapes of the weights that the training loss sees.
        eigenpair: An estimate of λ_max for the next solve, with an eigenvector to go on from where
            one is needed.

    Example:
        >>> import ift_tune
        >>> problem = ift_tune.testing.Quadratic()
        >>> losses = problem.train_loss(None), problem.val_loss(None)
        >>> inverse, warm = ift_tune.Neumann(terms=3, alpha=1.0), None
        >>> for _ in range(3):
        ...     result = ift_tune.hypergradient(
        ...         *losses, problem.model, problem.hyper, inverse=inverse, warm=warm
        ...     )
        ...     print(f"{result.stats.relative_residual:.2f}")
        ...     warm = result.warm
        0.31
        0.19
        0.12
    """

    solution: list[Tensor] | None = None
    eigenpair: Eigenpair | None = None


@dataclass(frozen=True)
class Hypergradient:
    """The gradient of the validation loss by the hyperparameters, and whether to trust it.

    Attributes:
        grads: One tensor per hyperparameter tensor, of its shape.
        status: How the linear solve came out; ``status.advice`` says which setting to change.
        stats: HVPs, residual norm and seconds spent; see `SolveStats`.
        train_loss: The training loss without the penalty, detached.
        val_loss: The validation loss, detached.
        warm: For the next call's `warm`.

    Example:
        >>> import ift_tune
        >>> problem = ift_tune.testing.Quadratic()
        >>> result = ift_tune.hypergradient(
        ...     problem.train_loss(None), problem.val_loss(None), problem.model, problem.hyper
        ... )
        >>> result.status.value, result.usable, result.stats.hvps
        ('truncated', True, 17)
        >>> [grad.shape for grad in result.grads]
        [torch.Size([3])]
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
            estimate of the largest eigenvalue from its eigenpair, whichever is there.

    Returns:
        The gradients, one for each of `hypers`, with status and stats.

    Raises:
        UsageError: If a loss is not a scalar with a graph to the weights, an argument is wrong, or
            it is called under autocast.
        UnreachableHyperparameterError: If some `hypers` influence neither ∂L_T/∂w nor L_V; it names
            them.
        DoubleBackwardError: If an operation in `train_loss` has no second derivative, or PyTorch's
            is wrong; it is named.

    Example:
        >>> import torch, ift_tune
        >>> decay = torch.tensor([0.5], requires_grad=True)
        >>> w = torch.tensor([2.0], requires_grad=True)  # the minimum of the training loss
        >>> train_loss = ((w - 3.0) ** 2 + decay * w**2).sum()  # w* = 3/(1 + decay)
        >>> val_loss = ((w - 1.0) ** 2).sum()
        >>> result = ift_tune.hypergradient(
        ...     train_loss, val_loss, [w], [decay], inverse=ift_tune.Dense()
        ... )
        >>> result.grads  # 2(w* − 1)·dw*/dλ, where dw*/dλ = −3/(1 + decay)²
        [tensor([-2.6667])]
    """
    if isinstance(weights, nn.Module):
        refuse_repetition((train_loss, val_loss), weights)
    linearisation = linearise(
        train_loss, val_loss, weights, hypers, penalty=penalty, outputs=outputs
    )
    return solve(linearisation, Neumann() if inverse is None else inverse, warm)


def solve(
    linearisation: Linearisation,
    inverse: Inverse,
    warm: WarmStart | None = None,
    absent: Collection[str] = (),
) -> Hypergradient:
    """Solve H·q = v and contract: the second half of `hypergradient`.

    Args:
        linearisation: H, v and the two terms, from `linearise`.
        inverse: How to approximate H⁻¹.
        warm: ``result.warm`` of an earlier outer step.
        absent: Names of hyperparameters that this batch need not use; see `Linearisation.contract`.

    Raises:
        UnreachableHyperparameterError: If ∂L_T/∂w does not depend on a hyperparameter.
        DoubleBackwardError: If an operation in the training loss has no second derivative.
    """
    return begin(linearisation, inverse, warm, absent).result.read()


@dataclass(frozen=True)
class Begun:
    """A `Hypergradient` whose numbers have not been read.

    Attributes:
        grads: Its gradients.
        length: The norm of all of them.
        train_loss: Its training loss.
        val_loss: Its validation loss.
        result: All of it, once they are read.
        signal: How far it stands out of its noise, where the linearisation has parts.
    """

    grads: list[Tensor]
    length: Tensor
    train_loss: Tensor
    val_loss: Tensor
    result: Later[Hypergradient]
    signal: BegunSignal | None = None


def begin(
    linearisation: Linearisation,
    inverse: Inverse,
    warm: WarmStart | None = None,
    absent: Collection[str] = (),
) -> Begun:
    """Return the same as `solve`, with its numbers unread: the device goes on meanwhile."""
    started = time.perf_counter()
    warm = warm or WarmStart()
    # The kernels once here, so that no product has to switch.
    with _surroundings(linearisation), linearisation.kernels.active():
        state = inverse.init(linearisation.operator, warm.eigenpair)
        solved = inverse.begin(state, linearisation.vector, warm.solution)
        grads = linearisation.contract(solved.value, absent)
        signal = None
        if linearisation.parts:
            signal = begin_signal(linearisation, inverse, state, grads, absent)
    seconds = linearisation.seconds + time.perf_counter() - started

    def finish(numbers: list[float]) -> Hypergradient:
        with _surroundings(linearisation):
            result = solved.result.make(numbers[1:])
        status = result.status
        if not all_finite(grads, numbers[0]):
            status = SolveStatus.NONFINITE
        # What is not finite would spoil every later solve.
        left = WarmStart()
        if status is not SolveStatus.NONFINITE:
            left = WarmStart(result.value, inverse.handed_on(state, result.stats))
        return Hypergradient(
            grads=grads,
            status=status,
            stats=replace(result.stats, seconds=seconds),
            train_loss=linearisation.train_loss,
            val_loss=linearisation.val_loss,
            warm=left,
        )

    length = norm(grads)
    result = Later([length, *solved.result.tensors], finish)
    losses = linearisation.train_loss, linearisation.val_loss
    return Begun(grads, length, *losses, result, signal)


def _surroundings(linearisation: Linearisation) -> AbstractContextManager[None]:
    return ordinary_autograd("hypergradient()", linearisation.train_loss.device)


@dataclass(frozen=True)
class UnrolledHypergradient(Hypergradient):
    """A `Hypergradient` with the weights that the unrolled steps arrived at, detached."""

    weights: list[Tensor]


def unrolled_hypergradient(
    train_loss: Callable[[list[Tensor]], Tensor],
    val_loss: Callable[[list[Tensor]], Tensor],
    weights: TensorSource,
    hypers: TensorSource,
    *,
    steps: int,
    lr: float,
) -> UnrolledHypergradient:
    """Return dL_V(w_k)/dλ through w_{i+1} = w_i − lr·∂L_T/∂w(w_i, λ), i < k, from the given w_0.

    Keeps k iterates in memory. From w_0 = w*(λ), k steps equal ``Neumann(terms=k-1, alpha=lr)``
    exactly (Lorraine, Vicol, Duvenaud 2020, section 4): the relation between the implicit
    function theorem and differentiating through optimisation.

    Args:
        train_loss: L_T as a function of a list of weight tensors, the penalty included.
        val_loss: L_V as a function of a list of weight tensors.
        weights: w_0; never modified.
        hypers: λ, the tensors the two functions read.
        steps: k, at least 1.
        lr: Step size of gradient descent, above 0.

    Returns:
        The gradients, zero for a hyperparameter without influence, and the final weights;
        `stats.hvps` counts one product a step.

    Raises:
        UsageError: If `steps` or `lr` is out of range, or `val_loss` ignores the weights.

    Example:
        >>> import torch, ift_tune
        >>> decay = torch.tensor([0.5], requires_grad=True)
        >>> result = ift_tune.unrolled_hypergradient(
        ...     lambda w: ((w[0] - 3.0) ** 2 + decay * w[0] ** 2).sum(),
        ...     lambda w: ((w[0] - 1.0) ** 2).sum(),
        ...     [torch.tensor([2.0], requires_grad=True)],  # the minimum, 3/(1 + decay)
        ...     [decay],
        ...     steps=20,
        ...     lr=0.2,
        ... )
        >>> result.grads, result.weights  # as by the implicit function theorem
        ([tensor([-2.6667])], [tensor([2.])])
    """
    if steps < 1 or not lr > 0.0:
        raise UsageError(f"unrolling needs steps >= 1 and lr > 0, got steps={steps}, lr={lr}")
    started = time.perf_counter()
    h = list(named(hypers, "hypers").values())
    # New leaves: the caller's weights are constants here, and get no gradient.
    iterate = [w.detach().requires_grad_() for w in named(weights, "weights").values()]
    with torch.enable_grad():
        for _ in range(steps):
            last_train = train_loss(iterate)
            # With its graph: the step itself is differentiated, which is where H and ∂²L_T/∂w∂λ
            # come in, one factor (I − lr·H) a step.
            slopes = torch.autograd.grad(last_train, iterate, create_graph=True, allow_unused=True)
            iterate = [w if g is None else w - lr * g for w, g in zip(iterate, slopes, strict=True)]
        last_val = val_loss(iterate)
        if not last_val.requires_grad:
            raise UsageError("val_loss must depend on the list of weights that it is given")
        grads = fill_missing(torch.autograd.grad(last_val, h, allow_unused=True), h)
    finite = all_finite(grads)
    return UnrolledHypergradient(
        grads=grads,
        status=SolveStatus.TRUNCATED if finite else SolveStatus.NONFINITE,
        stats=SolveStats(hvps=steps, alpha=lr, seconds=time.perf_counter() - started),
        train_loss=last_train.detach(),
        val_loss=last_val.detach(),
        warm=WarmStart(),
        weights=[w.detach() for w in iterate],
    )
