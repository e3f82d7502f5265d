"""The deterministic unit of cost: gradient-equivalents, counted and not timed."""

from __future__ import annotations

from dataclasses import dataclass

FORWARD = 1.0 / 3.0
GRADIENT = 1.0
HVP = 2.0


@dataclass
class Cost:
    """What a run has spent so far.

    One forward and backward pass of one training mini-batch is 1, a forward alone 1/3, a
    Hessian-vector product (and the mixed product, which is one as well) 2. A pass over a batch of
    another size counts in proportion to its number of examples, so that a large batch in the outer
    step is not had for free.

    Attributes:
        unit: Examples in a training mini-batch.
        gradient_equivalents: The sum so far.
        hvps: Hessian-vector products of the linear solves so far.
    """

    unit: int
    gradient_equivalents: float = 0.0
    hvps: int = 0

    def charge(self, passes: float, examples: int) -> None:
        """Add `passes` (in units of `GRADIENT`) over `examples` examples."""
        self.gradient_equivalents += passes * examples / self.unit
