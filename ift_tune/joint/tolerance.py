"""How far a net is moved for a difference quotient, and what a product may differ from it by.

All lengths are in the measure of the loss: a tensor's entries count per unit of its scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ift_tune.implicit.vectors import Tensors, sub

FURTHER = 16.0
"""Times the displacement, over which a difference in doubt is taken again."""

_LEAST = 0.05  # of a relative error that is allowed
_JUMPED = 0.15  # where units have left their piece: a part √h of them is a little off
_FLAT = 1e-3  # of the whole product: a tensor whose part is less is not judged
_RESIDUE = 100.0  # roundings of the whole: what is left of a gradient whose terms cancel
_ROUNDINGS = 4.0  # standard deviations of rounding that a difference may be off by


class Tolerance:
    """What is allowed at a precision, and the largest error that was seen and allowed.

    Attributes:
        eps: The relative rounding of the least precise value in the loss.
        step: Displacement, in units of each tensor's scale.
        relative: The largest relative error of a tensor's product.
        error: The largest so far that was allowed.
    """

    def __init__(self, scales: Tensors, eps: float, rounding: float) -> None:
        """Derive it from the precision.

        Args:
            scales: Of the weights.
            eps: The relative rounding of the least precise value in the loss.
            rounding: That of the kernels, which is more than `eps` where they compute in TF32.
        """
        self._scales, self.eps = scales, eps
        # A difference over h errs by h and by eps/h.
        self.step = math.sqrt(eps)
        # The product itself has been computed in the run's own precision: in a deep net on a GPU,
        # TF32 leaves a tenth of a small tensor's part of it in doubt.
        self.relative = max(_LEAST, 4.0 * self.step, 8.0 * math.sqrt(rounding))
        self.error = 0.0

    @property
    def noise(self) -> float:
        """The rounding of a difference quotient, relative to what is differenced."""
        return 10.0 * self.eps / self.step

    def loosen(self) -> None:
        """Allow what a difference is off by where units have left their piece."""
        self.relative = max(_JUMPED, self.relative)

    def lengths(self, tensors: Tensors) -> list[float]:
        """Return each tensor's length."""
        pairs = zip(self._scales, tensors, strict=True)
        return [float(s * torch.linalg.vector_norm(t)) for s, t in pairs]

    def length(self, tensors: Tensors) -> float:
        """Return the length of all of them."""
        return together(self.lengths(tensors))

    def doubt(self, near: Tensors, far: Tensors) -> list[float]:
        """Return by how much each part of a difference over the longer way may be off.

        A derivative is the same over both ways, the rounding of the gradient is not: what the
        shorter way's has of it, the longer way's has a part of.

        Args:
            near: The difference quotient over the usual displacement.
            far: That over `FURTHER` times as much.
        """
        return [_ROUNDINGS / FURTHER * part for part in self.lengths(sub(near, far))]

    def wrong(
        self,
        found: Tensors,
        truth: Tensors,
        slope: Tensors,
        doubt: Sequence[float] | None = None,
    ) -> list[tuple[float, int]]:
        """Return the relative error and the place of each tensor whose product is another.

        Args:
            found: The product.
            truth: The difference quotient.
            slope: The gradient.
            doubt: By how much each part of `truth` may be off, where that was measured.
        """
        errors, slopes = self.lengths(sub(found, truth)), self.lengths(slope)
        lengths = self.lengths(found), self.lengths(truth)
        sizes = [max(pair) for pair in zip(*lengths, strict=True)]
        whole, steepest = together(sizes), max(slopes)
        floor = _FLAT * whole + self.noise * steepest
        # A bias before batch normalisation has no gradient anywhere but what rounding leaves of
        # terms that cancel, and a difference quotient magnifies that.
        residue = _RESIDUE * self.eps
        cancels = [
            part > 0.0
            and max(part, self.step * change) <= residue * steepest
            and product <= residue * whole
            for part, product, change in zip(slopes, *lengths, strict=True)
        ]
        known = [0.0] * len(errors) if doubt is None else doubt
        wrong, worst = [], 0.0
        each = zip(errors, sizes, cancels, known, strict=True)
        for place, (error, size, zero, off) in enumerate(each):
            excess = max(error - floor - off, 0.0) / size if size and not zero else 0.0
            worst = max(worst, excess)
            if not excess <= self.relative:
                wrong.append((error / size, place))
        if not wrong:
            self.error = max(self.error, worst)
        return wrong

    def allows(self, found: float, truth: float, noise: float) -> bool:
        """Return whether two numbers may be the same, give or take some noise."""
        size = max(abs(found), abs(truth))
        excess = max(abs(found - truth) - noise, 0.0) / size if size else 0.0
        if not excess <= self.relative:
            return False
        self.error = max(self.error, excess)
        return True


def together(lengths: Sequence[float]) -> float:
    """Return the length of what has parts of these lengths."""
    return float(torch.linalg.vector_norm(torch.tensor(lengths, dtype=torch.float64)))
