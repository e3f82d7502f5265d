"""Pieces the tasks share: cutting splits, spoiling labels, small networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.batches import Batches
from ift_tune.problem import Splits
from ift_tune.randomness import derive_seed
from ift_tune.tasks.images import Images

CLASSES = 10

Examples: TypeAlias = tuple[Tensor, Tensor]
"""Inputs (n, ...) and their targets (n,)."""

FourSplits: TypeAlias = tuple[Examples, Examples, Examples, Examples]
"""Train, val, search and test."""


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


def shares(sizes: Sequence[int], available: int) -> list[int]:
    """Return the sizes, all smaller by one factor where they are more than there is."""
    wanted = sum(sizes)
    return list(sizes) if wanted <= available else [n * available // wanted for n in sizes]


def cut(images: Images, train: int, val: int, search: int, test: int, seed: int) -> FourSplits:
    """Return four disjoint random splits: images (n, C, H, W) in [−1, 1] with their classes.

    Test examples are the first of the data set's own test part where it has one. Where there are
    too few images, as in embedded data, every split shrinks by the same factor.
    """
    order = permutation(len(images.pixels), seed)
    own_test = len(images.test_pixels) > 0
    wanted = (train, val, search) if own_test else (train, val, search, test)
    sizes = shares(wanted, len(order))
    first, second, third, *rest = (
        images.train(part) for part in torch.split(order[: sum(sizes)], sizes)
    )
    return first, second, third, images.test(slice(test)) if own_test else rest[0]


def flat(splits: FourSplits) -> FourSplits:
    """Return the splits with the images as rows of pixels, (n, C·H·W)."""
    train, val, search, test = ((inputs.flatten(1), targets) for inputs, targets in splits)
    return train, val, search, test


def make_splits(
    train: Examples,
    val: Examples,
    search: Examples,
    test: Examples,
    *,
    batch_size: int | None,
    device: torch.device,
    seed: int,
    largest: int | None = None,
    curvature: int | None = None,
) -> Splits:
    """Return in-memory loaders on `device`, `train` with an index.

    Args:
        train: Comes in mini-batches of `batch_size` at most, and whole for the outer step.
        val: Comes whole.
        search: Likewise.
        test: Likewise.
        batch_size: Of the inner steps; None takes all.
        device: Where the data lies.
        seed: Of the order of batches.
        largest: For nets that cannot take a split whole: no batch is larger than this, and each
            outer step then sees one random batch of `train` and one of `val`.
        curvature: Examples of `train` that an outer step sees, where `largest` would be too many.
    """

    def batches(name: str, *tensors: Tensor, at_most: int | None) -> Batches:
        on_device = [tensor.to(device) for tensor in tensors]
        size = None if at_most is None else min(at_most, len(tensors[0]))
        return Batches(*on_device, batch_size=size, seed=derive_seed(seed, name))

    rows = (*train, torch.arange(len(train[0])))
    return Splits(
        train=batches("batches", *rows, at_most=batch_size),
        val=batches("val", *val, at_most=largest),
        search=batches("search", *search, at_most=largest),
        test=batches("test", *test, at_most=largest),
        curvature=batches("curvature", *rows, at_most=curvature or largest),
    )


def mlp(pixels: int, hidden: int) -> nn.Module:
    """Return one hidden ELU layer: twice differentiable, as the implicit function theorem asks."""
    return nn.Sequential(nn.Linear(pixels, hidden), nn.ELU(), nn.Linear(hidden, CLASSES))
