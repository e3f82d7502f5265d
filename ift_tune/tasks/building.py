"""Pieces the tasks share: cutting splits, spoiling labels, small networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ift_tune.batches import Batches
from ift_tune.problem import Splits
from ift_tune.randomness import derive_seed

CLASSES = 10


def corrupt(targets: Tensor, fraction: float, seed: int) -> Tensor:
    """Return labels of which a random `fraction` is redrawn uniformly over all classes."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "labels"))
    chosen = torch.randperm(len(targets), generator=generator)[: round(fraction * len(targets))]
    spoiled = targets.clone()
    spoiled[chosen] = torch.randint(CLASSES, (len(chosen),), generator=generator)
    return spoiled


def permutation(size: int, seed: int) -> Tensor:
    """Return a random order of `size` examples."""
    return torch.randperm(
        size, generator=torch.Generator().manual_seed(derive_seed(seed, "splits"))
    )


def make_splits(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    search: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    batch_size: int | None,
    device: torch.device,
    seed: int,
) -> Splits:
    """Return in-memory loaders on `device`; only `train` comes in mini-batches, with an index."""

    def whole(inputs: Tensor, targets: Tensor) -> Batches:
        return Batches(inputs.to(device), targets.to(device))

    rows = (train[0].to(device), train[1].to(device), torch.arange(len(train[0]), device=device))
    return Splits(
        train=Batches(*rows, batch_size=batch_size, seed=derive_seed(seed, "batches")),
        val=whole(*val),
        search=whole(*search),
        test=whole(*test),
        curvature=Batches(*rows),
    )


def mlp(pixels: int, hidden: int) -> nn.Module:
    """Return one hidden ELU layer: twice differentiable, as the implicit function theorem asks."""
    return nn.Sequential(nn.Linear(pixels, hidden), nn.ELU(), nn.Linear(hidden, CLASSES))
