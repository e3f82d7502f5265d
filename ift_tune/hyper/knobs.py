"""The few numbers by which a search without gradients can set a whole kind of hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Knob:
    """A positive number, searched on a logarithmic scale.

    Attributes:
        low: The least value.
        high: The largest.
        start: What comes closest to how the kind is initialised.
        refines: Whether it shades another knob: a grid leaves it at `start`.
    """

    low: float
    high: float
    start: float
    refines: bool = False
