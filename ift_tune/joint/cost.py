"""The deterministic unit of cost: gradient-equivalents, counted and not timed.

A budget in this unit is the same on every machine, so that two searches can be given equally much.
"""

from __future__ import annotations

from dataclasses import dataclass

# A backward pass takes about two forward passes, so a forward pass alone is a third of both; a
# product with the Hessian differentiates the whole gradient once more, for about twice its price.
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
        unit: Examples in a training mini-batch; 0 until the first one is seen.
        example_passes: Forward-and-backward passes so far, each times its number of examples.
        hvps: Hessian-vector products of the linear solves so far.
    """

    unit: int = 0
    example_passes: float = 0.0
    hvps: int = 0

    @property
    def gradient_equivalents(self) -> float:
        """The cost so far; 0 before the first training mini-batch gives the unit."""
        return self.example_passes / self.unit if self.unit else 0.0

    def add(self, passes: float, examples: int) -> None:
        """Add `passes` (in units of `GRADIENT`) over `examples` examples."""
        self.example_passes += passes * examples

    def add_hypergradient(self, products: int, train_examples: int, val_examples: int) -> None:
        """Add a hypergradient whose solve took `products` Hessian-vector products."""
        self.add(training_passes(products), train_examples)
        self.add(GRADIENT, val_examples)
        self.hvps += products


def training_passes(products: int) -> float:
    """Return what a hypergradient takes on its training batch, in units of `GRADIENT`.

    Args:
        products: Of the linear solve; the mixed product comes on top.
    """
    return GRADIENT + HVP * (products + 1)
