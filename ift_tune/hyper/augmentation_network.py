"""Learned data augmentation: a small U-Net whose every weight is a hyperparameter."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError, require_number
from ift_tune.hyper.arguments import require_images, require_like, whole_number
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.pictures import Shape, on_images, quantiles
from ift_tune.hyper.seen import in_precision_of
from ift_tune.implicit.vectors import flatten


class AugmentationNetwork(HyperKind):
    """Training images become x + b·tanh(U(x, noise)/b): the paper's learned augmentation.

    Lorraine, Vicol, Duvenaud 2020, section 5.3. The bound b is ours.

    U is a U-Net (Ronneberger et al. 2015) that gets one channel of standard normal noise beside
    the image, so that it can learn a distribution of images rather than one image. With depth 2,
    width 8 and 3 channels it has the paper's 6,659 weights.

    Its activations are smooth and its pooling takes means, as implicit differentiation asks.

    The last layer starts at `start` times PyTorch's usual size: images are hardly changed at first.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.AugmentationNetwork(channels=3)
        >>> kind.count
        6659
        >>> kind.inputs(torch.zeros(5, 3, 8, 8), index=None).shape
        torch.Size([5, 3, 8, 8])
    """

    name: ClassVar[str] = "augmentation_network"

    def __init__(
        self,
        channels: int,
        *,
        depth: int = 2,
        width: int = 8,
        start: float = 0.1,
        bound: float = 0.5,
        shape: Shape | None = None,
        like: Tensor | None = None,
    ) -> None:
        """Draw the network's weights from the global generator.

        Args:
            channels: Of the images.
            depth: Resolutions; each is half of the one before, rounded up.
            width: Channels at the first resolution; they double with each.
            start: Size of the last layer's first weights, above 0, relative to the usual.
            bound: The most that a pixel changes, above 0; images are from −1 to 1.
            shape: Channels, height and width, where the inputs are images as rows, (B, C·H·W).
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is out of range, or `shape` has other channels.
        """
        super().__init__()
        channels, depth = whole_number("channels", channels), whole_number("depth", depth)
        width = whole_number("width", width)
        require_number("start", start, above=0.0)
        require_number("bound", bound, above=0.0)
        require_like(like)
        require_images(shape)
        if shape is not None and shape[0] != channels:
            raise UsageError(f"shape {shape} has {shape[0]} channels, and the network {channels}")
        self.channels, self.bound, self.shape = channels, bound, shape
        widths = [width * 2**level for level in range(depth)]
        self.down = nn.ModuleList(
            _block(before, after)
            for before, after in zip([channels + 1, *widths], widths, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, kernel_size=2, stride=2)
            for after in reversed(widths[:-1])
        )
        self.merge = nn.ModuleList(_block(2 * after, after) for after in reversed(widths[:-1]))
        self.last = nn.Conv2d(width, channels, kernel_size=1)
        # Not at zero, which would be the identity itself: then the layers before it, 6,632 of 6,659
        # weights, had no gradient in the first outer step.
        with torch.no_grad():
            for parameter in self.last.parameters():
                parameter.mul_(start)
        if like is not None:
            self.to(like)

    def change(self, images: Tensor, noise: Tensor) -> Tensor:
        """Return what is added to images (B, C, H, W), of that shape, for noise (B, 1, H, W)."""
        found = torch.cat([images, noise], dim=1)
        skipped: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                skipped.append(found)
                # Odd sizes are rounded up; means at the border are of the pixels that are there.
                found = F.avg_pool2d(found, 2, ceil_mode=True, count_include_pad=False)
            found = block(found)
        for up, merge in zip(self.up, self.merge, strict=True):
            skip = skipped.pop()
            height, width = skip.shape[-2:]  # odd ones come back larger by one
            found = merge(torch.cat([skip, up(found)[..., :height, :width]], dim=1))
        changed: Tensor = self.last(found)
        # Without a bound a few outer steps in a bad direction were seen to change pixels by many
        # times their range, and there was no way back.
        return self.bound * torch.tanh(changed / self.bound)

    def forward(self, images: Tensor) -> Tensor:
        """Return augmented images, (B, C, H, W), with new noise from the global generator.

        In the images' precision, whatever the network's.

        Raises:
            UsageError: If the images have another number of channels.
        """
        if images.shape[1] != self.channels:
            raise UsageError(
                f"the augmentation network was made for {self.channels} channels, the images have "
                f"{images.shape[1]}: make it with channels={images.shape[1]}"
            )
        seen: Tensor = in_precision_of(self, images)
        noise = torch.randn_like(seen[:, :1])
        return images + self.change(seen, noise).to(images.dtype)

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Augment images (B, C, H, W), or rows of pixels where a shape was given.

        Raises:
            UsageError: If the inputs are of neither form.
        """
        return on_images(self.forward, inputs, self.shape, self.name)

    def summary(self) -> dict[str, float]:
        """Return quantiles of the network's weights, and the size of its last layer."""
        last = flatten(list(self.last.parameters())).detach()
        return quantiles(flatten(list(self.parameters()))) | {
            "last_layer_norm": float(torch.linalg.vector_norm(last))
        }

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return a network of two resolutions with two channels."""
        return cls(inputs.shape[1], width=2, start=1.0, like=next(model.parameters()))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel_size=3, padding=1),
        nn.SiLU(),
        nn.Conv2d(after, after, kernel_size=3, padding=1),
        nn.SiLU(),
    )
