"""Learned data augmentation with a handful of hyperparameters: how far to turn, shift, recolour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.errors import UsageError, nearest, require_number
from ift_tune.hyper.arguments import require_images, require_like, require_mapping
from ift_tune.hyper.base import CoarseParameter, HyperKind
from ift_tune.hyper.pictures import Shape, on_images

STARTS = {
    "rotation_degrees": 2.0,
    "translation": 0.01,
    "scale": 0.02,
    "shear": 0.02,
    "brightness": 0.02,
    "contrast": 0.02,
    "noise": 0.02,
}
"""The strengths by name, in their units, and where they start; see `AffineColorAugmentation`."""

_WEAKEST, _STRONGEST = 0.1, 50.0  # of a coarse parameter, relative to the start


class AffineColorAugmentation(HyperKind):
    """Every training image is turned, shifted, stretched, sheared and recoloured at random.

    Each strength exp(λ) is the standard deviation of a normal number drawn for each image:

    ====================  ====================================================================
    ``rotation_degrees``  angle
    ``translation``       shift along each axis, as a fraction of width or height
    ``scale``             logarithm of the magnification
    ``shear``             tangent of the angle by which rows are pushed aside
    ``brightness``        what is added to all pixels, as a fraction of their range of 2
    ``contrast``          logarithm of the factor about the image's mean
    ``noise``             what is added to each pixel on its own, as a fraction of their range
    ====================  ====================================================================

    The strengths reach the draws as factors, so that derivatives by λ pass through the resampling.
    That has no second derivative by the grid in PyTorch, and needs none: the implicit and the
    unrolled hypergradient differentiate by λ once. Beyond the border its pixels go on.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.AffineColorAugmentation(starts={"rotation_degrees": 10.0})
        >>> kind.count, round(kind.summary()["rotation_degrees"], 3)
        (7, 10.0)
        >>> kind.inputs(torch.zeros(5, 3, 8, 8), index=None).shape
        torch.Size([5, 3, 8, 8])
    """

    name: ClassVar[str] = "affine_color"

    def __init__(
        self,
        *,
        starts: Mapping[str, float] | None = None,
        shape: Shape | None = None,
        like: Tensor | None = None,
    ) -> None:
        """Make one λ per strength.

        Args:
            starts: Where strengths start, above 0; those not named start at `STARTS`.
            shape: Channels, height and width, where the inputs are images as rows, (B, C·H·W).
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If there is no such strength, or it is not above 0.
        """
        super().__init__()
        require_mapping("starts", starts or {}, "strengths to numbers above 0")
        require_like(like)
        require_images(shape)
        values = STARTS | dict(starts or {})
        for name, value in values.items():
            if name not in STARTS:
                raise UsageError(f"there is no strength {name!r}{nearest(name, STARTS)}")
            require_number(f"the strength {name}", value, above=0.0)
        self.shape = shape
        raw = torch.tensor([math.log(values[name]) for name in STARTS], dtype=torch.float64)
        raw = raw.to(torch.get_default_dtype()) if like is None else raw.to(like)
        self.raw = nn.Parameter(raw)

    def strengths(self) -> dict[str, Tensor]:
        """Return exp(λ) by name, scalars."""
        return dict(zip(STARTS, self.raw.exp().unbind(), strict=True))

    def forward(self, images: Tensor) -> Tensor:
        """Return augmented images, (B, C, H, W), drawn anew from the global generator."""
        strengths = self.strengths()

        def draw(name: str, *shape: int) -> Tensor:
            return strengths[name] * images.new_empty(len(images), *shape).normal_()

        height, width = images.shape[-2:]
        matrices = affine_matrices(
            draw("rotation_degrees").deg2rad(),
            draw("translation", 2),
            draw("scale"),
            draw("shear"),
            aspect=width / height,
        )
        grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
        # Bicubic has a continuous derivative by the grid; bilinear has kinks at every pixel.
        moved = F.grid_sample(
            images, grid, mode="bicubic", padding_mode="border", align_corners=False
        )
        # About the mean, so that contrast does not change brightness, which has its own strength.
        mean = moved.mean(dim=(1, 2, 3), keepdim=True)
        recoloured = mean + draw("contrast", 1, 1, 1).exp() * (moved - mean)
        added = draw("brightness", 1, 1, 1) + draw("noise", *images.shape[1:])
        return recoloured + 2.0 * added  # pixels go from -1 to 1

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Augment images (B, C, H, W), or rows of pixels where a shape was given.

        Raises:
            UsageError: If the inputs are of neither form.
        """
        return on_images(self.forward, inputs, self.shape, self.name)

    def coarse_space(self) -> dict[str, CoarseParameter]:
        """Return the strengths."""
        return {
            name: CoarseParameter.near(
                _WEAKEST * STARTS[name], _STRONGEST * STARTS[name], float(value.detach())
            )
            for name, value in self.strengths().items()
        }

    @torch.no_grad()
    def set_coarse(self, values: Mapping[str, float]) -> None:
        """Set the strengths."""
        self.raw.copy_(torch.tensor([math.log(values[name]) for name in STARTS]))

    @torch.no_grad()
    def learned(self) -> dict[str, Tensor]:
        """Return the strengths."""
        return self.strengths()

    def summary(self) -> dict[str, float]:
        """Return the strengths."""
        return {name: float(value.detach()) for name, value in self.strengths().items()}

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return an augmentation that is not weak."""
        starts = {name: 5.0 * start for name, start in STARTS.items()}
        return cls(starts=starts, like=next(model.parameters()))


def affine_matrices(
    angle: Tensor, shift: Tensor, scale: Tensor, shear: Tensor, *, aspect: float
) -> Tensor:
    """Return where each place of a changed image is taken from, for `F.affine_grid`.

    Args:
        angle: By which images are turned, in radians, shape (B,).
        shift: By which they are shifted, as fractions of width and height, (B, 2).
        scale: Logarithm of the magnification, (B,).
        shear: Tangent of the angle by which rows are pushed aside, (B,).
        aspect: Width over height: a rotation is one in pixels, not in coordinates from −1 to 1.

    Returns:
        Shape (B, 2, 3).
    """
    cosine, sine = angle.cos(), angle.sin()
    shrink = (-scale).exp()
    rows = torch.stack(
        [
            torch.stack([cosine, sine + shear * cosine], dim=-1),
            torch.stack([-sine, cosine - shear * sine], dim=-1),
        ],
        dim=-2,
    )
    stretch = rows.new_tensor([[1.0, 1.0 / aspect], [aspect, 1.0]])
    linear = shrink[:, None, None] * rows * stretch
    # The whole width is 2 in these coordinates, and content moves against where it is taken from.
    return torch.cat([linear, (-2.0 * shift)[..., None]], dim=-1)
