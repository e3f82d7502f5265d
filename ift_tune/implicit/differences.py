"""Products without second derivatives: central differences of gradients.

H·v is how ∂L_T/∂w changes along v, and vᵀ·∂²L_T/∂w∂λᵀ how ∂L_T/∂λ does (as in DARTS, Liu et al.
2019, and SAMA, Choe et al. 2023): two passes of plain training at w ± εv. So whatever can be
differentiated once will do (fused attention, compiled models, low precision, any checkpoints), on
the kernels of training and in its memory. The price is accuracy: a difference over ε errs by ε²,
and by the rounding of the gradient over ε.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.implicit.curvature import Operator
from ift_tune.implicit.hidden_curvature import graph_nodes
from ift_tune.implicit.pattern import Pattern
from ift_tune.implicit.penalty import Penalty
from ift_tune.implicit.precision import rounding_of_kernels
from ift_tune.implicit.vectors import Tensors, fill_missing, zeros_like
from ift_tune.implicit.vectors import precision as rounding_of

_LEAST_SCALE = 1e-2  # for a net that is zero as a whole
_UNSEEN_STEP = 1e-2  # where kinks cannot be seen: the more jumps, the better they average out
_STEP = 0.2  # of the cube root of rounding: measured on nets near their minimum


Sink = Callable[[int, Tensor], None]
"""Takes the number of a tensor, and a part of the gradient by it."""


class Passes(Protocol):
    """A training loss that can be run again: the same numbers at the same weights and λ."""

    parts: int
    """Of the batch."""

    def slope(self, inputs: Tensors) -> tuple[Tensor, list[Tensor | None]]:
        """Return L_T and ∂L_T/∂inputs at the present weights, None where nothing is reached."""

    def stream(self, inputs: Tensors, sink: Sink) -> None:
        """Give each gradient ∂L_T/∂inputs away as soon as it is there."""

    def value(self) -> Tensor:
        """Return L_T at the present weights and λ."""

    def output_slopes(self) -> list[Tensor]:
        """Return ∂L_T/∂o for the model's outputs o, of each part of the batch."""

    def pulled(self, slopes: Sequence[Tensor], inputs: Tensors) -> list[Tensor | None]:
        """Return Σ slopeᵀ·∂o/∂inputs over the parts of the batch."""


class Source(Protocol):
    """Where products of a training loss without its penalty come from, one pass or many each."""

    rounding: float
    """The relative error of a product, about."""

    def gradient(self, inputs: Tensors) -> list[Tensor | None]:
        """Return ∂L_T/∂inputs, None where nothing is reached."""

    def products(self, inputs: Tensors, vector: Tensors) -> list[Tensor | None]:
        """Return vᵀ·∂²L_T/∂w∂inputsᵀ, None where nothing is reached."""

    def curvature(self, vector: Tensors) -> list[Tensor | None]:
        """Return the product with the Hessian, or with the Gauss-Newton matrix in its place."""


class Differences:
    """Products as central differences of first derivatives.

    Attributes:
        rounding: The relative error of a product, about.
        passes: The training loss that is differenced.
        step: How far a tensor is moved at most, in units of its scale.
        machine: Machine epsilon of the least precise value in the loss.
        kinks: Whether there may be any: False once a pass has shown none.
    """

    def __init__(
        self,
        passes: Passes,
        weights: Tensors,
        rounding: float,
        *,
        gauss_newton: bool = False,
        kinks: bool = True,
    ) -> None:
        """Fix how far is moved, by the size of the weights and the precision of the loss.

        Args:
            passes: The training loss, to be run again.
            weights: The leaf tensors it is differentiated by; moved in place during a product.
            rounding: Machine epsilon of the least precise value in the loss.
            gauss_newton: Whether `curvature` drops the second derivative of the model itself: then
                the slope by the outputs is differenced, and pulled back at the weights as they are.
            kinks: Whether there may be some to be looked for: not in code that is compiled, whose
                operations nobody sees.
        """
        self.passes, self._weights, self._gauss_newton = passes, list(weights), gauss_newton
        # Of a central difference the error is least where ε³ is about the rounding.
        self.machine = rounding
        self.step = _STEP * rounding ** (1.0 / 3.0)
        if not kinks:
            self.step = max(self.step, _UNSEEN_STEP)
        self.rounding = max(self.step**2, rounding / self.step)
        self.kinks = kinks
        self._patterns: dict[Hashable, Pattern] = {}
        scales = scales_of(weights)
        self._scales = torch.stack([s.to(scales[0]) for s in scales])
        self._versions = [w._version for w in weights]

    def gradient(self, inputs: Tensors) -> list[Tensor | None]:
        """Return ∂L_T/∂inputs, None where nothing is reached."""
        return self.passes.slope(inputs)[1]

    def products(
        self, inputs: Tensors, vector: Tensors, *, longer: float = 1.0
    ) -> list[Tensor | None]:
        """Return vᵀ·∂²L_T/∂w∂inputsᵀ, None where nothing is reached.

        Args:
            inputs: Weights, hyperparameters or both.
            vector: v, of the shapes of the weights.
            longer: Times the usual step.
        """
        return self._difference(
            vector, lambda sink: self.passes.stream(inputs, sink), len(inputs), longer
        )

    def curvature(self, vector: Tensors) -> list[Tensor | None]:
        """Return the product with the Hessian, or with the Gauss-Newton matrix in its place."""
        if not self._gauss_newton:
            return self.products(self._weights, vector)
        found = self._difference(vector, self._give_output_slopes, self.passes.parts)
        slopes = [slope for slope in found if slope is not None]
        return self.passes.pulled(slopes, self._weights)

    def _give_output_slopes(self, sink: Sink) -> None:
        for number, slope in enumerate(self.passes.output_slopes()):
            sink(number, slope)

    def _difference(
        self,
        vector: Tensors,
        take: Callable[[Sink], None],
        number: int,
        longer: float = 1.0,
    ) -> list[Tensor | None]:
        """Return how what is taken changes along v, by its values at w ± εv: (f₊ − f₋)/2ε.

        Args:
            vector: v.
            take: Gives the tensors f to a function, in parts.
            number: Of the tensors.
            longer: Times the usual step.
        """
        total: list[Tensor | None] = [None] * number

        def add(sign: float, i: int, part: Tensor) -> None:
            # Into tensors of its own: autograd may give the same one for several of its inputs.
            scale, before = (sign * 0.5 / step).to(part), total[i]
            total[i] = part * scale if before is None else before.addcmul_(part, scale)

        step = self.step_along(vector, longer)
        pattern = self._piece((number, take.__qualname__), take)
        with displaced(self._weights) as move:
            for sign in (1.0, -1.0):
                move(vector, step, sign)
                with pattern or contextlib.nullcontext():
                    take(partial(add, sign))
        return total

    def _piece(self, key: Hashable, take: Callable[[Sink], None]) -> Pattern | None:
        """Return the decisions of a pass at the weights as they are, to be kept on both sides.

        A net of ReLUs or maxima is smooth piece by piece, and its gradient jumps between them: the
        jumps would be all that a difference sees. One pass for all products by the same tensors.
        """
        if not self.kinks:
            return None
        if key not in self._patterns:
            pattern = Pattern()
            with pattern:
                take(lambda _number, _part: None)
            if not pattern.kinks:
                self.kinks = False
                return None
            self._patterns = {key: pattern}  # the last alone: they take memory
        return self._patterns[key]

    def step_along(self, vector: Tensors, longer: float = 1.0) -> Tensor:
        """Return ε, as a tensor: the tensor that moves most moves by the step times its scale."""
        if [w._version for w in self._weights] != self._versions:
            raise UsageError(
                "the weights must stay as they are until a hypergradient by differences is "
                "finished: linearise anew after each step of them, got weights that have moved"
            )
        lengths = torch.stack([torch.linalg.vector_norm(v).to(self._scales) for v in vector])
        roots = torch.tensor([max(v.numel(), 1) ** -0.5 for v in vector]).to(lengths)
        size = (lengths * roots / self._scales).max()
        return torch.where(size > 0.0, longer * self.step / size, torch.ones_like(size))


class Repeated(Operator):
    """The curvature of a training loss that is run again for each product."""

    def __init__(self, source: Source, weights: Tensors, penalty: Penalty | None = None) -> None:
        """Take where products come from.

        Args:
            source: Of the training loss without its penalty.
            weights: The weights.
            penalty: A regulariser whose curvature is added in closed form.
        """
        super().__init__([w.detach() for w in weights])
        self.rounding = max(self.rounding, source.rounding)
        self._source, self._penalty = source, penalty

    def _product(self, vector: Tensors) -> list[Tensor]:
        found = fill_missing(tuple(self._source.curvature(vector)), self.like)
        if self._penalty is not None:
            self._penalty.add_hvp_(found, self.like, vector)
        return found

    def penalty_matvec(self, vector: Tensors) -> list[Tensor]:
        """Return the product with the penalty's curvature."""
        return zeros_like(vector) if self._penalty is None else self._penalty.hvp(self.like, vector)


class _Move(Protocol):
    def __call__(self, vector: Tensors, step: Tensor, sign: float) -> None: ...


@contextlib.contextmanager
def displaced(weights: Tensors) -> Iterator[_Move]:
    """Let leaf tensors be moved inside; afterwards they have the same bits again."""
    saved = [w.detach().clone() for w in weights]
    # By `.data`: graphs that have saved these tensors may be used again when they are back.
    places = [w.data for w in weights]
    moved = False

    def move(vector: Tensors, step: Tensor, sign: float) -> None:
        nonlocal moved
        if moved:
            torch._foreach_copy_(places, saved)
        moved = True
        # A step that is a tensor: on a GPU nothing waits for it.
        steps = [step.to(p) for p in places]
        torch._foreach_addcmul_(places, [v.detach() for v in vector], steps, value=sign)

    try:
        yield move
    finally:
        if moved:
            torch._foreach_copy_(places, saved)


def scales_of(tensors: Tensors) -> list[Tensor]:
    """Return a typical size of each tensor's entries: moved by a part of it, a net stays alike."""
    sizes = [t.detach().square().mean().sqrt() if t.numel() else t.new_zeros(()) for t in tensors]
    # A tensor that begins at zero, as biases do, goes by what the others are like.
    others = torch.stack([s.to(sizes[0]) for s in sizes]).mean()
    least = torch.clamp(0.1 * others, min=_LEAST_SCALE)
    return [torch.maximum(s, least.to(s)) for s in sizes]


def coarsest_rounding(loss: Tensor, weights: Tensors) -> float:
    """Return machine epsilon of the least precise value on the way to a loss, as autocast makes.

    Args:
        loss: With its graph.
        weights: The leaf tensors.
    """
    found = {loss.dtype}
    for node in graph_nodes(loss):
        with contextlib.suppress(AttributeError, RuntimeError):
            found.update(each.dtype for each in node._input_metadata)
        if hasattr(node, "_forward_cls"):  # compiled code does all of its work in one node
            found.update(t.dtype for t in node.saved_tensors if isinstance(t, Tensor))
    eps = max(torch.finfo(dtype).eps for dtype in found if dtype.is_floating_point)
    return max(eps, rounding_of(weights), rounding_of_kernels(loss.device))


def reached_leaves(loss: Tensor) -> set[int]:
    """Return the identities of the leaf tensors that a loss depends on, from its graph alone."""
    leaves = (getattr(node, "variable", None) for node in graph_nodes(loss))
    return {id(leaf) for leaf in leaves if leaf is not None}


def is_compiled(loss: Tensor) -> bool:
    """Return whether part of a loss was computed by compiled code, whose operations are hidden."""
    names = (getattr(node, "_forward_cls", type).__name__ for node in graph_nodes(loss))
    return any(name.startswith("CompiledFunction") for name in names)
