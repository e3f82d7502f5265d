"""Tensors of several problems as one matrix, a row for each problem."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ift_tune.implicit.vectors import Tensors


class Columns:
    """Where the tensors of one problem lie in its row.

    One matrix and no list of stacks: a step of an optimiser, or of a linear solve, is then a
    handful of operations, however many tensors a model has.
    """

    def __init__(self, names: Sequence[str], like: Tensors) -> None:
        """Take the names and the shapes of the tensors."""
        self.names = list(names)
        self._shapes = [tuple(t.shape) for t in like]
        self._sizes = [t.numel() for t in like]
        self.width = sum(self._sizes)
        self._ends = list(accumulate(self._sizes))

    @torch.no_grad()
    def join(self, problems: Sequence[Tensors]) -> Tensor:
        """Return the matrix (P, width) of the tensors of each problem, detached."""
        parts = [
            torch.stack([tensors[i] for tensors in problems]).reshape(len(problems), -1)
            for i in range(len(self.names))
        ]
        return torch.cat(parts, dim=1)

    def views(self, matrix: Tensor) -> list[Tensor]:
        """Return a matrix's parts, of shapes (P, ...)."""
        rows = len(matrix)
        parts = torch.split(matrix, self._sizes, dim=1)
        return [p.view(rows, *shape) for p, shape in zip(parts, self._shapes, strict=True)]

    def named(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the same by name."""
        return dict(zip(self.names, self.views(matrix), strict=True))

    def rows(self, matrix: Tensor) -> list[list[Tensor]]:
        """Return the tensors of each problem, as views."""
        parts = [part.unbind(0) for part in self.views(matrix)]
        return [[part[row] for part in parts] for row in range(len(matrix))]

    def row(self, vector: Tensor) -> list[Tensor]:
        """Return the tensors that one row holds, as views."""
        parts = torch.split(vector, self._sizes)
        return [p.view(shape) for p, shape in zip(parts, self._shapes, strict=True)]


@torch.no_grad()
def write_back(targets: Sequence[Tensors], sources: Sequence[Tensors]) -> None:
    """Copy tensors of each problem to where they belong, in one operation for all of them."""
    into = [t for tensors in targets for t in tensors]
    if into:
        torch._foreach_copy_(into, [t for tensors in sources for t in tensors])


def norms(rows: Tensor) -> Tensor:
    """Return the length of each row."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def number(value: float) -> Tensor:
    """Return a number that has been read as the tensor that it is read from otherwise."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return numbers on the device, in its type."""
    return torch.tensor(values, dtype=torch.float64).to(like)
