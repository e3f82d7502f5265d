"""Small problems: one whose hypergradient is known, and one of any size for what it costs."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ift_tune.base.randomness import RandomStream
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batch, Batches
from ift_tune.problem.problem import BilevelProblem, Splits


def random_spd(size: int, *, condition: float = 10.0, seed: int = 0) -> Tensor:
    """Return a random symmetric positive definite matrix, eigenvalues from 1/condition to 1.

    Args:
        size: n, for a matrix of shape (n, n), float64.
        condition: Ratio of the largest to the smallest eigenvalue.
        seed: Of its eigenvectors.

    Example:
        >>> import torch
        >>> from ift_tune.testing import random_spd
        >>> torch.linalg.eigvalsh(random_spd(3, condition=100.0))
        tensor([0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(gaussian).Q
    values = torch.logspace(0.0, -math.log10(condition), size, dtype=torch.float64)
    matrix = basis @ torch.diag(values) @ basis.T
    symmetric: Tensor = 0.5 * (matrix + matrix.T)
    return symmetric


class Quadratic(BilevelProblem):
    """L_T = ½wᵀAw − wᵀBλ, L_V = ½‖w − t‖² + ½‖λ‖²: everything is known in closed form.

    w*(λ) = A⁻¹Bλ and dL_V/dλ = λ + BᵀA⁻¹(w*(λ) − t).

    Attributes:
        matrix: A, shape (P, P), symmetric positive definite.
        coupling: B, shape (P, H).
        goal: t, shape (P,).

    Example:
        >>> import torch, ift_tune
        >>> problem = ift_tune.testing.Quadratic(weights=6, hypers=3)
        >>> with torch.no_grad():
        ...     _ = problem.model.value.copy_(problem.solution())
        >>> result = ift_tune.hypergradient(
        ...     problem.train_loss(None),
        ...     problem.val_loss(None),
        ...     problem.model,
        ...     problem.hyper,
        ...     inverse=ift_tune.Dense(),
        ... )
        >>> torch.allclose(result.grads[0], problem.exact_hypergradient())
        True
    """

    def __init__(self, weights: int = 6, hypers: int = 3, seed: int = 0) -> None:
        """Draw A, B, t and λ in float64, and start at w = 0."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.matrix = random_spd(weights, seed=seed)
        self.coupling, self.goal = normal(weights, hypers), normal(weights)
        self.model = _Vector(torch.zeros(weights, dtype=torch.float64))
        self.hyper = _Vector(normal(hypers))
        loader = [torch.zeros(1, dtype=torch.float64)]
        self.splits = Splits(loader, loader, loader, loader)

    def train_loss(self, batch: Batch) -> Tensor:
        """Return ½wᵀAw − wᵀBλ; the batch is not used."""
        w, h = self.model(), self.hyper()
        loss: Tensor = 0.5 * w @ self.matrix @ w - w @ self.coupling @ h
        return loss

    def val_loss(self, batch: Batch) -> Tensor:
        """Return ½‖w − t‖² + ½‖λ‖²; the batch is not used."""
        loss: Tensor = 0.5 * (self.model() - self.goal).square().sum()
        direct: Tensor = 0.5 * self.hyper().square().sum()
        return loss + direct

    def solution(self) -> Tensor:
        """Return w*(λ), shape (P,)."""
        found: Tensor = torch.linalg.solve(self.matrix, self.coupling @ self.hyper().detach())
        return found

    def exact_hypergradient(self) -> Tensor:
        """Return dL_V(w*(λ), λ)/dλ, shape (H,)."""
        slope = torch.linalg.solve(self.matrix, self.solution() - self.goal)
        total: Tensor = self.hyper().detach() + self.coupling.T @ slope
        return total


class _Vector(nn.Module):
    """One parameter vector, returned by calling the module."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


_PIXELS, _CLASSES, _EXAMPLES = 64, 10, 200


def sized_problem(
    width: int, per: Literal["model", "weight"], device: torch.device, seed: int = 0
) -> ClassificationProblem:
    """Return an MLP 64-width-width-10 on random data, with one decay or one for every weight.

    All batches are whole, so that inner and outer steps look at equally many examples.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(_EXAMPLES, _PIXELS, generator=generator).to(device)
    targets = torch.randint(_CLASSES, (_EXAMPLES,), generator=generator).to(device)
    with RandomStream(seed, device).aside():
        model = nn.Sequential(
            nn.Linear(_PIXELS, width),
            nn.ELU(),
            nn.Linear(width, width),
            nn.ELU(),
            nn.Linear(width, _CLASSES),
        ).to(device)
    whole = Batches(inputs, targets)
    splits = Splits(whole, whole, whole, whole)
    return ClassificationProblem(model, WeightDecay(model, per), splits)
