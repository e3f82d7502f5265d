"""Tables of numbers with a number to predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tabular:
    """A data set for regression, every column with mean 0 and variance 1.

    Attributes:
        inputs: Shape (N, columns), float32.
        targets: Shape (N,), float32.
    """

    inputs: Tensor
    targets: Tensor

    def part(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return some rows, (n, columns), and their targets."""
        return self.inputs[index], self.targets[index]


def diabetes() -> Tabular:
    """Return scikit-learn's diabetes: 442 patients, 10 measurements, progression a year later."""
    from sklearn.datasets import load_diabetes  # takes a second to import: only when used

    found = load_diabetes(scaled=False)
    return Tabular(_standardised(found.data), _standardised(found.target))


def _standardised(columns: object) -> Tensor:
    values = torch.as_tensor(columns, dtype=torch.float64)
    scaled = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
    return scaled.to(torch.float32)
