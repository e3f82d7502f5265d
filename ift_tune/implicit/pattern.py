"""The decisions of a net held still: which side of each kink, which element of each maximum.

A net of ReLUs or maxima is smooth only piece by piece, and so is its gradient: it jumps where a
unit changes sides. A finite difference of the gradient across such jumps holds their heights, by
no means small, which are no part of the Hessian that autograd computes on one piece. So the pattern
of one pass is recorded and kept in the next: the gradient of one piece, continued past its edge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten


class _Kink(NamedTuple):
    """Where a backward kernel looks up on which side of its kinks a unit was.

    Attributes:
        place: Of the tensor it looks at, among the kernel's arguments.
        edges: The places of the kinks, in ascending order, from the kernel's arguments.
    """

    place: int
    edges: Callable[[Sequence[Any]], Sequence[float]]


# Kernels that decide in silence. Whatever decides aloud, by booleans or indices (a comparison,
# a clamp, a pooling, a sort), is known by what it returns.
_KINKS: Mapping[Any, _Kink] = {
    _aten.threshold_backward: _Kink(1, lambda args: [args[2]]),  # of ReLU too
    _aten.leaky_relu_backward: _Kink(1, lambda args: [0.0]),
    _aten._prelu_kernel_backward: _Kink(1, lambda args: [0.0]),
    _aten.elu_backward: _Kink(5, lambda args: [0.0]),  # of CELU and SELU too
    _aten.rrelu_with_noise_backward: _Kink(1, lambda args: [0.0]),
    _aten.hardtanh_backward: _Kink(1, lambda args: [args[2], args[3]]),  # of ReLU6 too
    _aten.hardsigmoid_backward: _Kink(1, lambda args: [-3.0, 3.0]),
    _aten.hardswish_backward: _Kink(1, lambda args: [-3.0, 3.0]),
    _aten.hardshrink_backward: _Kink(1, lambda args: [-args[2], args[2]]),
    _aten.softshrink_backward: _Kink(1, lambda args: [-args[2], args[2]]),
}
_DISCRETE = (torch.bool, torch.int32, torch.int64)  # bytes are the workspaces of kernels
_RECTIFIERS = (_aten.relu, _aten.relu_)
_CONTINUED = (*_RECTIFIERS, _aten.threshold_backward)
_SIGNS = (_aten.sgn, _aten.sign)  # of absolute values


class Pattern(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the decisions of the first pass inside it in all further ones; used as a context.

    Each pass (``with pattern:``) has to be the same sequence of operations, forward and backward.
    Where a later one turns out not to be, what follows is left to itself.

    Attributes:
        coarsest: The relative rounding of the least precise tensor that the first pass has made.
        jumped: Whether a later pass would have decided differently somewhere. Gradients are kept on
            their piece, but values only a ReLU's, so that they are a little beside it then.

    Example:
        >>> import torch
        >>> from ift_tune.implicit.pattern import Pattern
        >>> w, pattern = torch.tensor([0.1], requires_grad=True), Pattern()
        >>> def slope(shift):
        ...     with pattern:
        ...         return torch.autograd.grad(((w + shift).relu() * 3.0).sum(), w)[0]
        >>> slope(0.0), slope(-1.0)  # on the other side of the kink, and still of the first piece
        (tensor([3.]), tensor([3.]))
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest, self.jumped = 0.0, False
        self._decisions: list[tuple[Any, list[Tensor]]] = []
        self._recording, self._next, self._passes = True, 0, 0

    @property
    def kinks(self) -> bool:
        """Whether anything was decided, so that the net is smooth only piece by piece."""
        return bool(self._decisions)

    def __enter__(self) -> Pattern:
        """Begin a pass: the first records, the others follow."""
        self._recording, self._next = self._passes == 0, 0
        self._passes += 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, with the decisions of the first pass."""
        kwargs = kwargs or {}
        kernel = func.overloadpacket
        if kernel in _KINKS:
            return func(*self._on_its_side(kernel, args), **kwargs)
        if kernel in _RECTIFIERS:
            return self._rectified(func, args)
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if kernel in _SIGNS:
            (kept,) = self._follow(kernel, [result.to(torch.int8)])
            return kept.to(result.dtype)
        if self._recording:
            roundings = (torch.finfo(t.dtype).eps for t in made if t.is_floating_point())
            self.coarsest = max(self.coarsest, *roundings, 0.0)
        discrete = [t for t in made if t.dtype in _DISCRETE]
        if not discrete or func._schema.is_mutable or not _sees_reals(args, kwargs):
            return result
        before = self._follow(func, discrete)
        instead = {id(now): then for now, then in zip(discrete, before, strict=True)}
        return tree_map(lambda t: instead.get(id(t), t), result)

    def _on_its_side(self, kernel: Any, args: Sequence[Any]) -> list[Any]:
        """Return the arguments with each unit moved back to the side where it was, if it left."""
        kink = _KINKS[kernel]
        where, edges = args[kink.place], list(kink.edges(args))
        bounds = torch.tensor(edges, dtype=where.dtype, device=where.device)
        sides = torch.bucketize(where, bounds).to(torch.int8)
        (kept,) = self._follow(kernel, [sides])
        changed = list(args)
        if not torch.equal(kept, sides):
            flipped = kept != sides
            # Those that left alone: on all of them this would take thrice the memory of the unit.
            moved, aim = where[flipped], kept[flipped]
            # A little inside its edges: on which side an edge itself is, kernels see differently.
            info = torch.finfo(bounds.dtype)
            for i, edge in enumerate(bounds):
                inside = (edge.abs() * info.eps).clamp(min=info.tiny)
                below, above = moved.clamp(max=edge - inside), moved.clamp(min=edge + inside)
                moved = torch.where(aim <= i, below, above)
            changed[kink.place] = where.clone()
            changed[kink.place][flipped] = moved
        return changed

    def _rectified(self, func: Any, args: Sequence[Any]) -> Tensor:
        """Return a ReLU's result, continued past the kink: a flipped unit goes on as it was."""
        active = args[0] > 0.0
        (kept,) = self._follow(func.overloadpacket, [active])
        result: Tensor = args[0] * kept if kept is not active else func(*args)
        return args[0].copy_(result) if func._schema.is_mutable else result

    def _follow(self, operation: Any, found: list[Tensor]) -> list[Tensor]:
        """Note what an operation has decided, or return what it had decided in the first pass."""
        if self._recording:
            self._decisions.append((operation, found))
            return found
        if self._next >= len(self._decisions):
            return found
        before, kept = self._decisions[self._next]
        if before is not operation or [t.shape for t in kept] != [t.shape for t in found]:
            self._next = len(self._decisions)  # another sequence: nothing to follow any more
            return found
        self._next += 1
        if operation not in _CONTINUED and not self.jumped:
            self.jumped = not all(map(torch.equal, kept, found))
        return kept


def _sees_reals(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    leaves = tree_leaves((args, kwargs))
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in leaves)
