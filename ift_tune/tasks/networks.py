"""Small networks for images: smooth, so that the implicit function theorem applies."""

from __future__ import annotations

from torch import nn


def small_cnn(shape: tuple[int, int, int], classes: int = 10, width: int = 8) -> nn.Sequential:
    """Return two 5×5 convolutions of stride 2 and a linear layer: a batch takes milliseconds.

    Args:
        shape: Channels, height and width of the images.
        classes: Number of classes.
        width: Channels after the first convolution; the second doubles them.

    Returns:
        A network from images (B, C, H, W) to logits (B, `classes`), without batch normalisation.
    """
    channels, height, across = shape
    places = -(-height // 4) * -(-across // 4)  # each stride halves and rounds up
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, kernel_size=5, stride=2, padding=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * width * places, classes),
    )
