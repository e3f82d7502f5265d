"""The curvature of the training loss as linear operators: products, damping, largest eigenvalue.

Reverse over reverse: the product H·v is the derivative of ⟨∂L/∂w, v⟩ (Pearlmutter 1994), one
backward pass through the graph of the gradient. Only `Operator.dense` forms the matrix.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.double_backward import Kernels, partial_vjp, vjp
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.process_group import summed
from ift_tune.implicit.reading import choose
from ift_tune.implicit.vectors import (
    Tensors,
    axpy,
    common_dtype,
    count,
    dot,
    fill_missing,
    flatten,
    mul,
    norm,
    precision,
    scattered_like,
    unflatten,
    zeros_like,
)


class Operator(abc.ABC):
    """A symmetric linear map on weight space, known only by its products with vectors.

    Attributes:
        like: Tensors of the shapes, dtype and device of the vectors.
        products: How many have been taken.
        rounding: The relative error of a product, about: machine epsilon where it is exact.
    """

    def __init__(self, like: Tensors) -> None:
        """Start the count of products, and remember the kernels that are allowed now.

        Args:
            like: Tensors of the shapes, dtype and device of the vectors.
        """
        self.like = list(like)
        self.products = 0
        self.rounding = precision(like)
        self._kernels = Kernels.in_force()

    @final
    def matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with `vector`; both are lists of the shapes of `like`."""
        self.products += 1
        # Whoever takes a product, and wherever: an activation checkpoint recomputes its part of the
        # graph now, and with fast attention that part would have no second derivative.
        with self._kernels.active():
            return self._product(vector)

    @abc.abstractmethod
    def _product(self, vector: Tensors) -> list[Tensor]: ...

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the part that is known in closed form, which counts as none."""
        return zeros_like(vector)

    def dense(self) -> Tensor:
        """Return the matrix, of shape (P, P), by P products: for small problems and tests."""
        first = self.like[0]
        dtype = common_dtype(self.like)
        identity = torch.eye(count(self.like), dtype=dtype, device=first.device)
        columns = [flatten(self.matvec(unflatten(e, self.like))) for e in identity]
        return torch.stack(columns, dim=1)


class Matrix(Operator):
    """A given symmetric matrix of shape (P, P): the dense twin of the other operators."""

    def __init__(self, matrix: Tensor, like: Tensors | None = None) -> None:
        super().__init__([matrix.detach()[0]] if like is None else like)
        if matrix.shape != (count(self.like), count(self.like)):
            raise UsageError(
                f"a matrix over {count(self.like)} weights must be square of that size, "
                f"got {tuple(matrix.shape)}"
            )
        self.matrix = matrix

    def _product(self, vector: Tensors) -> list[Tensor]:
        return unflatten(self.matrix @ flatten(vector), self.like)

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return self.matrix


class Hessian(Operator):
    """∂²L_T/∂w∂wᵀ by reverse-over-reverse products on one retained graph.

    All products share the forward pass, so a dropout mask is the same in all of them.

    Example:
        >>> import torch, ift_tune
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> hessian = ift_tune.Hessian(gradient, [w])
        >>> hessian.matvec([torch.tensor([1.0, 1.0])])  # diag(6w)·v
        [tensor([ 6., 12.])]
        >>> hessian.dense()
        tensor([[ 6.,  0.],
                [ 0., 12.]])
        >>> hessian.products
        3
    """

    def __init__(
        self,
        gradient: Sequence[Tensor | None],
        weights: Tensors,
        penalty: Penalty | None = None,
    ) -> None:
        """Take the gradient whose derivative is wanted.

        Args:
            gradient: ∂L_T/∂w with its graph (``create_graph=True``), of the shapes of `weights`;
                None where unused.
            weights: The tensors it was taken by, of any shapes.
            penalty: A regulariser whose curvature is added in closed form.
        """
        super().__init__([w.detach() for w in weights])
        # A gradient without a graph is constant (a linear loss): its rows of H are 0.
        self._gradient = [g for g in gradient if g is not None and g.requires_grad]
        self._curved = [g is not None and g.requires_grad for g in gradient]
        self._weights = list(weights)
        self._penalty = penalty

    def _product(self, vector: Tensors) -> list[Tensor]:
        found = partial_vjp(
            self._gradient,
            self._weights,
            [v for v, curved in zip(vector, self._curved, strict=True) if curved],
        )
        products = fill_missing(summed(found, self._weights), self._weights)
        if self._penalty is None:
            return products
        return self._penalty.with_hvp(products, self.like, vector)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the penalty's curvature."""
        return zeros_like(vector) if self._penalty is None else self._penalty.hvp(self.like, vector)


class GaussNewton(Operator):
    """Jᵀ·(∂²L_T/∂o²)·J for the model's outputs o: positive semi-definite for a convex loss of o.

    It drops the second derivative of the model itself, and of every term of the loss that reaches
    the weights past the outputs, except a `Penalty`, which is added whole.

    Example:
        >>> import torch, ift_tune
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> outputs = w**2
        >>> loss = (outputs - 5.0).square().sum()
        >>> ift_tune.GaussNewton(loss, outputs, [w]).dense()  # J = 2w = 4, and 2·J²; H is 28
        tensor([[32.]])
    """

    def __init__(
        self,
        loss: Tensor,
        outputs: Tensor,
        weights: Tensors,
        penalty: Penalty | None = None,
    ) -> None:
        """Build the graph of Jᵀ once, for all products.

        Args:
            loss: Scalar training loss, computed from `outputs`.
            outputs: The model's outputs, any shape, with their graph to the weights.
            weights: The weights.
            penalty: A regulariser whose curvature is added in closed form.

        Raises:
            UsageError: If the loss does not depend on `outputs`.
        """
        super().__init__([w.detach() for w in weights])
        self._weights = list(weights)
        self._outputs = outputs
        self._penalty = penalty
        (loss_gradient,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
        if loss_gradient is None:
            raise UsageError(
                "the loss does not depend on outputs: pass the very tensor it was computed from"
            )
        self._loss_gradient = loss_gradient
        # Jᵀu is linear in u, so its derivative by u, in the direction v, is Jv: a product with J by
        # two backward passes, where forward mode would need a rule from every operation.
        self._u = torch.zeros_like(outputs, requires_grad=True)
        jt_u = partial_vjp([outputs], self._weights, [self._u], create_graph=True)
        self._jt_u = [j for j in jt_u if j is not None]
        self._reached = [j is not None for j in jt_u]

    def _product(self, vector: Tensors) -> list[Tensor]:
        reached = [v for v, is_reached in zip(vector, self._reached, strict=True) if is_reached]
        (jv,) = vjp(self._jt_u, [self._u], reached)
        curved = [g for g in (self._loss_gradient,) if g.requires_grad]
        (hjv,) = vjp(curved, [self._outputs], [jv] * len(curved))
        found = partial_vjp([self._outputs], self._weights, [hjv])
        products = fill_missing(summed(found, self._weights), self._weights)
        if self._penalty is None:
            return products
        return self._penalty.with_hvp(products, self.like, vector)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the penalty's curvature."""
        return zeros_like(vector) if self._penalty is None else self._penalty.hvp(self.like, vector)


class Damped(Operator):
    """operator + damping · identity; the operator inside counts the products too."""

    def __init__(self, operator: Operator, damping: float) -> None:
        super().__init__(operator.like)
        self.rounding = operator.rounding
        self._operator = operator
        self._damping = damping

    def _product(self, vector: Tensors) -> list[Tensor]:
        return axpy(self._operator.matvec(vector), self._damping, vector)

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with what the operator inside knows, and with the damping."""
        return axpy(self._operator.penalty_matvec(vector), self._damping, vector)


def damped(operator: Operator, damping: float) -> Operator:
    """Return `operator` + `damping` · identity, the operator itself when `damping` is 0."""
    return Damped(operator, damping) if damping else operator


@dataclass(frozen=True)
class Eigenpair:
    """An estimate of the largest magnitude of an eigenvalue, and the unit vector it was seen at.

    The value is below 0 where the Rayleigh quotient there is: that proves negative curvature. The
    vector is empty where the value is all that is known, as of Ritz values.
    """

    value: float
    vector: list[Tensor]


class Estimate(NamedTuple):
    """An `Eigenpair` whose value has not been read."""

    value: Tensor
    vector: list[Tensor]


Precondition: TypeAlias = Callable[[Tensors], Tensors]
"""v ↦ M⁻¹v for a symmetric positive definite M; may return its very argument where M = I."""


def no_precondition(vector: Tensors) -> Tensors:
    """Return the vector: M = I."""
    return vector


def dual_length(vector: Tensors, image: Tensors) -> Tensor:
    """Return √(vᵀM⁻¹v), given M⁻¹v as `image`; the Euclidean norm where that is `vector` itself."""
    if image is vector:
        return norm(vector).double()
    return dot(vector, image).double().clamp(min=0.0).sqrt()


def dual_norm(vector: Tensors, image: Tensors) -> float:
    """Return `dual_length` as a number, which is waited for."""
    return float(dual_length(vector, image))


def largest_eigenvalue(
    operator: Operator,
    *,
    steps: int,
    start: Eigenpair | None = None,
    seed: int = 0,
    precondition: Precondition = no_precondition,
) -> Eigenpair:
    """Estimate the eigenvalue of largest magnitude by power iteration.

    Args:
        operator: The operator H.
        steps: Products spent, at least 1.
        start: An estimate to start from, as of an earlier outer step; else a pseudo-random vector.
        seed: Of that vector.
        precondition: v ↦ M⁻¹v, for the eigenvalue of M⁻¹H; the vector is then M times the
            eigenvector, and of length 1 in the norm √(vᵀM⁻¹v).

    Returns:
        The length of H·w for the last unit vector w, with the sign of the Rayleigh quotient there,
        and the next vector. It is a lower bound of the largest |λ| that rises with every step. The
        quotient itself would not do: where λ_min ≈ −λ_max it cancels, whatever their size.

    Example:
        >>> import torch, ift_tune
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> gradient = torch.autograd.grad((w**3).sum(), [w], create_graph=True)
        >>> pair = ift_tune.largest_eigenvalue(ift_tune.Hessian(gradient, [w]), steps=20)
        >>> round(pair.value, 3)
        12.0
    """
    value, vector = estimate_largest(
        operator, steps=steps, start=start, seed=seed, precondition=precondition
    )
    return Eigenpair(float(value), vector)


def estimate_largest(
    operator: Operator,
    *,
    steps: int,
    start: Eigenpair | None = None,
    seed: int = 0,
    precondition: Precondition = no_precondition,
) -> Estimate:
    """Return the same as `largest_eigenvalue`, without a wait for its value."""
    cold = start is None or not start.vector
    dual: Tensors = scattered_like(operator.like, seed) if cold or start is None else start.vector
    dual = mul(dual, 1.0 / dual_length(dual, precondition(dual)))
    rounding = operator.rounding
    value = torch.zeros((), dtype=torch.float64, device=operator.like[0].device)
    alive = torch.ones_like(value, dtype=torch.bool)
    for _ in range(steps):
        # M⁻¹H is self-adjoint in the inner product of M, where the quotient is wᵀHw/wᵀMw. With
        # y = Mw kept in place of w, a step is w = M⁻¹y, y ← Hw: M itself is never needed.
        primal = precondition(dual)
        product = operator.matvec(primal)
        quotient = dot(primal, product).double()
        length = dual_length(product, precondition(product))
        # A quotient within rounding of 0 has no sign.
        signed = torch.where(quotient < -10.0 * rounding * length, -length, length)
        value = torch.where(alive, signed, value)
        # 0: the vector lies in the kernel; infinite: the loss is lost. Neither can be normalised.
        alive = alive & (length > 0.0) & (length < math.inf)
        if alive.is_cpu and not bool(alive):
            break
        dual = choose(alive, mul(product, 1.0 / length), dual)
    return Estimate(value, list(dual))


def ritz_interval(moments: Sequence[float], precision: float) -> tuple[float, float]:
    """Return the extreme Ritz values of a symmetric A on span{v, Av, A²v, ...} from its moments.

    Ritz values lie between A's extreme eigenvalues, so they are proofs, not guesses: one beyond a
    bound shows that an eigenvalue is. A series v, Av, A²v, ... gives the moments for free, as
    inner products of neighbours: ⟨Aⁱv, Aʲv⟩ = m_{i+j}.

    Args:
        moments: m_0 ... m_{2k-1} of a Krylov space of dimension k, m_j = vᵀAʲv.
        precision: Machine epsilon of the arithmetic that made them; directions that are not
            distinguished by its square root are dropped.

    Returns:
        The smallest and the largest Ritz value.
    """
    size = len(moments) // 2
    # On the basis vᵢ = Aⁱv the Gram matrix is G = (m_{i+j}) and A's is M = (m_{i+j+1}), so the Ritz
    # values are the θ of M·x = θ·G·x.
    hankel = np.array([[moments[i + j] for j in range(size)] for i in range(size)])
    shifted = np.array([[moments[i + j + 1] for j in range(size)] for i in range(size)])
    # The powers Aⁱv soon point the same way, so G is nearly singular: what rounding has eaten of it
    # is dropped, and G is whitened by the rest.
    scales, basis = np.linalg.eigh(hankel)
    keep = scales > np.sqrt(precision) * scales[-1]
    basis = basis[:, keep] / np.sqrt(scales[keep])
    ritz = np.linalg.eigvalsh(basis.T @ shifted @ basis)
    return float(ritz[0]), float(ritz[-1])
