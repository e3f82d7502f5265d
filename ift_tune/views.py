"""What hyperparameters look like, as data: drawn by the report, kept in the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """Images side by side.

    Attributes:
        title: What they are.
        images: Shape (N, C, H, W), C = 1 or 3.
        columns: Images in a row.
        captions: One for each image, or none at all.
        low: The value drawn black.
        high: The value drawn white.
    """

    title: str
    images: Tensor
    columns: int = 10
    captions: tuple[str, ...] = ()
    low: float = -1.0
    high: float = 1.0


@dataclass(frozen=True)
class HeatMap:
    """A matrix of numbers with a colour bar.

    Attributes:
        title: What they are.
        values: Shape (rows, columns).
        rows: What a row is.
        columns: What a column is.
        log: Whether colours go by factors.
    """

    title: str
    values: Tensor
    rows: str = ""
    columns: str = ""
    log: bool = False


@dataclass(frozen=True)
class Histogram:
    """How numbers are distributed, in one or more groups.

    Attributes:
        title: What is counted.
        values: The numbers of each group, any shape, by its name.
        axis: What the numbers are.
        log: Whether the axis is logarithmic; the numbers must then be positive.
    """

    title: str
    values: Mapping[str, Tensor] = field(default_factory=dict)
    axis: str = ""
    log: bool = False


View: TypeAlias = ImageGrid | HeatMap | Histogram
"""One picture."""
