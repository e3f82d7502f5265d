"""Images and their classes, as bytes until a task takes its share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MNIST_SHAPE = (1, 28, 28)
CIFAR10_SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Images:
    """A data set of images.

    Attributes:
        pixels: Shape (N, C, H, W), uint8.
        targets: Class numbers, shape (N,), int64.
        test_pixels: The data set's own test part, shape (M, C, H, W); M = 0 where it has none.
        test_targets: Shape (M,).
        white: The value of the brightest pixel.
    """

    pixels: Tensor
    targets: Tensor
    test_pixels: Tensor
    test_targets: Tensor
    white: int = 255

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def train(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return images of the main part, (n, C, H, W) in [−1, 1], and their classes."""
        return self._scaled(self.pixels[index]), self.targets[index]

    def test(self, index: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return images of the test part likewise."""
        return self._scaled(self.test_pixels[index]), self.test_targets[index]

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32) / (self.white / 2.0) - 1.0
