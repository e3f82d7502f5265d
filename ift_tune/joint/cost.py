"""The unit of cost, what has been spent in it, and the most that a step can cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ift_tune.joint.config import MetaConfig

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

    unit: float = 0
    example_passes: float = 0.0
    hvps: int = 0

    @property
    def gradient_equivalents(self) -> float:
        """The cost so far; 0 before the first training mini-batch gives the unit."""
        return self.example_passes / self.unit if self.unit else 0.0

    def add(self, passes: float, examples: float) -> None:
        """Add `passes` (in units of `GRADIENT`) over `examples` examples."""
        self.example_passes += passes * examples

    def add_hypergradient(
        self, products: int, passes: float, train_examples: float, val_examples: float
    ) -> None:
        """Add a hypergradient whose solve took `products` Hessian-vector products.

        Args:
            products: Of the linear solve.
            passes: What it took on the training batch, from `training_passes`.
            train_examples: Of the training batch.
            val_examples: Of the validation batch.
        """
        self.add(passes, train_examples)
        self.add(GRADIENT, val_examples)
        self.hvps += products


def training_passes(products: int, *, again: bool = False) -> float:
    """Return what a hypergradient takes on its training batch, in units of `GRADIENT`.

    Args:
        products: Of the linear solve; the mixed product comes on top.
        again: Whether each exact product computes its gradient again, as in micro-batches. (A
            product by differences is two gradients: as much as an exact one.)
    """
    return GRADIENT + (HVP + GRADIENT * again) * (products + 1)


def signal_passes(parts: int, products: int, *, again: bool = False, anew: bool = False) -> float:
    """Return what a hypergradient's signal takes on the training batch, beside the hypergradient.

    Args:
        parts: Of the validation batch; each has a mixed product.
        products: Of the linear solves of all of them.
        again: Whether each exact product computes its gradient again, as in micro-batches.
        anew: Whether the training loss is run anew for each part, as without a graph in memory.
    """
    return (HVP + GRADIENT * again) * (products + parts) + GRADIENT * anew * parts


class StepCost:
    """The most that a step can cost, in gradient-equivalents.

    A counted budget is kept by this bound, not by a guess: each inverse says how many products it
    takes at most. The first batch of each loader is taken for its largest.
    """

    def __init__(
        self, config: MetaConfig, weights: int, first_batch: Callable[[str], float], curvature: str
    ) -> None:
        """Take what does not change from step to step.

        Args:
            config: How steps are taken.
            weights: The number of weights.
            first_batch: Returns the examples in the first batch of a split.
            curvature: The split whose batches an outer step takes for the training loss.
        """
        self._config, self._weights = config, weights
        self._first_batch, self._curvature = first_batch, curvature

    def plain(self, *, train_on_val: bool = False, val_weight: float = 1.0) -> float:
        """Return what plain training for the inner steps of a step costs.

        Args:
            train_on_val: Whether it trains on the validation split too.
            val_weight: Infinite where it trains on nothing else.
        """
        on_train = not train_on_val or math.isfinite(val_weight)
        on_val = train_on_val * self._first_batch("val") / self._first_batch("train")
        return self._inner() * (on_train + on_val)

    def joint(self, *, warm: bool, signals: float, again: bool, anew: bool) -> float:
        """Return the most that the inner steps and the outer step cost.

        Args:
            warm: Whether an eigenpair is known.
            signals: How many measurements of the signal belong to the step.
            again: See `training_passes`.
            anew: See `signal_passes`.
        """
        config = self._config
        products = config.inverse.max_hvps(self._weights, warm)
        products += config.warm_start  # the residual of the guess
        products += config.inverse.measured != "never"  # that of the answer
        train, val = self._first_batch(self._curvature), GRADIENT * self._first_batch("val")
        outer = training_passes(products, again=again) * train + val
        if signals:
            parts = config.signal_parts
            most = config.inverse.max_further_hvps(self._weights)
            most += config.inverse.measured == "always"
            passes = signal_passes(parts, parts * most, again=again, anew=anew)
            outer += signals * (passes * train + val)
        return self._inner() + outer / self._first_batch("train")

    def _inner(self) -> float:
        return GRADIENT * self._config.inner_steps * self._config.accumulate
