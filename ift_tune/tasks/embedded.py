"""Data that scikit-learn brings along, so that every task runs without a file or a network."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ift_tune.tasks.images import Images


def digits() -> Images:
    """Return scikit-learn's digits: 1,797 real images of 8×8 pixels, 16 shades."""
    from sklearn.datasets import load_digits  # takes a second to import: only when used

    found = load_digits()
    pixels = torch.from_numpy(found.images.astype("uint8"))[:, None]
    targets = torch.from_numpy(found.target.astype("int64"))
    return Images(pixels, targets, pixels[:0], targets[:0], white=16)


def digits_as(shape: tuple[int, int, int]) -> Images:
    """Return the digits enlarged to `shape` (channels, height, width), every channel the same."""
    channels, height, width = shape
    small = digits()
    large = F.interpolate(small.pixels.float(), size=(height, width), mode="bilinear")
    pixels = (large * (255 / small.white)).round().to(torch.uint8).repeat(1, channels, 1, 1)
    return Images(pixels, small.targets, pixels[:0], small.targets[:0])


def descriptions() -> str:
    """Return some tens of thousands of characters of English: what describes its data sets."""
    from sklearn import datasets

    loaders = (
        datasets.load_digits,
        datasets.load_diabetes,
        datasets.load_iris,
        datasets.load_wine,
        datasets.load_breast_cancer,
        datasets.load_linnerud,
    )
    return "\n".join(load().DESCR for load in loaders)
