"""Training inputs whose every pixel is a hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ift_tune.base.arguments import plain, require_list
from ift_tune.base.errors import UsageError
from ift_tune.base.views import ImageGrid, View
from ift_tune.hyper.answers import as_positions
from ift_tune.hyper.arguments import new_raw, whole_number, whole_numbers
from ift_tune.hyper.base import HyperKind
from ift_tune.hyper.pictures import evenly, quantiles, require_one_input, sample
from ift_tune.hyper.transforms import Init, get_transform, initialise

FAINT: Init = partial(nn.init.normal_, std=0.1)
"""Noise so weak that nothing can be seen in it."""
_MOST_SHOWN = 100


class DistilledData(HyperKind):
    """Training example i is the image c(λᵢ), whatever the loader gives; c is the identity or tanh.

    Data distillation (Maclaurin et al. 2015; Wang et al. 2018), by implicit differentiation in
    Lorraine, Vicol, Duvenaud 2020, section 5.2: the few images on which a model is best trained
    for it to do well on the validation split. The labels stay those of the loader.

    Example:
        >>> import torch, ift_tune
        >>> kind = ift_tune.DistilledData(10, (1, 4, 4), init=0.5, labels=range(10))
        >>> kind.count
        160
        >>> rows = torch.zeros(2, 16)  # what the loader gives is replaced, in its shape
        >>> kind.inputs(rows, index=torch.tensor([3, 7])).mean(dim=1)
        tensor([0.5000, 0.5000], grad_fn=<MeanBackward1>)
    """

    name: ClassVar[str] = "distilled_data"
    replaces_inputs: ClassVar[bool] = True

    def __init__(
        self,
        examples: int,
        shape: Sequence[int],
        *,
        init: Init | Tensor = FAINT,
        transform: Literal["none", "tanh"] = "none",
        labels: Sequence[object] = (),
        like: Tensor | None = None,
    ) -> None:
        """Make one raw parameter per pixel, shape (examples, *shape).

        Args:
            examples: Size N of the training split.
            shape: Of one image, (C, H, W) for `views` to draw it.
            init: Images (N, *shape) to start from, the value of every pixel, or a function that
                fills the raw λ in place. Default: faint noise around 0.
            transform: c: ``"none"`` leaves pixels unbounded, ``"tanh"`` keeps them in (−1, 1).
            labels: What the images are of, one name or class number each, for their captions.
            like: A tensor whose dtype and device λ takes.

        Raises:
            UsageError: If an argument is not one of these.
        """
        super().__init__()
        examples = whole_number("examples", examples)
        shape = whole_numbers("shape", shape, "that of one image, such as (1, 28, 28)")
        captions = [str(plain(label)) for label in require_list("labels", labels, "names")]
        if captions and len(captions) != examples:
            raise UsageError(f"labels must name each of the {examples} images, got {len(captions)}")
        self.transform = get_transform(transform, ("none", "tanh"))
        self.captions = tuple(captions)
        raw = new_raw((examples, *shape), like)
        initialise(raw, self._filling(init, raw), self.transform.inverse, "a pixel in (-1, 1)")
        self.raw = nn.Parameter(raw)

    def _filling(self, init: Init | Tensor, raw: Tensor) -> Init:
        """Return `init`, given images as a function that fills the raw λ."""
        if not isinstance(init, Tensor):
            return init
        if init.shape != raw.shape:
            raise UsageError(
                f"the images to start from must have shape {tuple(raw.shape)}, "
                f"got {tuple(init.shape)}"
            )
        start = self.transform.inverse(init.detach().to(raw))
        if not bool(torch.isfinite(start).all()):
            raise UsageError(
                "the images to start from must have pixels inside (-1, 1), where tanh can reach: "
                "scale them, as by 0.9"
            )
        return lambda tensor: tensor.copy_(start)

    @property
    def examples_known(self) -> int | None:
        """How many training examples have an image in their place."""
        return len(self.raw)

    def forward(self, index: Tensor | None = None) -> Tensor:
        """Return the images at `index`, shape (B, *shape); all of them without it."""
        return self.transform.forward(self.raw if index is None else self.raw[index])

    def inputs(self, inputs: Tensor, index: Tensor | None) -> Tensor:
        """Return the distilled images in place of the loader's, in the loader's shape.

        So a model that takes rows of pixels, (B, C·H·W), and one that takes images get theirs.

        Raises:
            UsageError: If the loader gives no index, one that is not of positions in the training
                split, or examples of another size.
        """
        require_one_input(inputs, self.name)
        if index is None:
            raise UsageError(
                "distilled data need to know which examples are in a batch: let the training "
                "loader yield (inputs, targets, index), as Splits.from_arrays(..., index=True) does"
            )
        images: Tensor = self(as_positions(index, len(inputs), len(self.raw), self))
        if images.numel() != inputs.numel():
            raise UsageError(
                f"the loader gives examples of shape {tuple(inputs.shape[1:])}, in place of which "
                f"images of shape {tuple(self.raw.shape[1:])} cannot stand: make the DistilledData "
                "of as many pixels"
            )
        return images.reshape(inputs.shape)

    def summary(self) -> dict[str, float]:
        """Return quantiles of the pixels, and how far they go apart from image to image.

        ``spread`` is the range of a pixel over the images, averaged over the pixels.
        """
        images = self().detach()
        return quantiles(images) | {"spread": float((images.amax(0) - images.amin(0)).mean())}

    def views(self) -> list[View]:
        """Return the images, if they are images of one channel or three: of many, some evenly."""
        if self.raw.ndim != 4 or self.raw.shape[1] not in (1, 3):
            return []
        places = evenly(range(len(self.raw)), _MOST_SHOWN)
        images = self().detach()[places].cpu()
        title = "distilled images"
        if len(places) < len(self.raw):
            title += f", {len(places)} of {len(self.raw):,}"
        # Symmetric about 0; one pixel in a hundred may lie beyond, lest a few make the rest grey.
        high = float(sample(images.abs().float()).quantile(0.99)) or 1.0
        captions = tuple(self.captions[place] for place in places) if self.captions else ()
        return [ImageGrid(title, images, captions=captions, low=-high, high=high)]

    @classmethod
    def example(cls, model: nn.Module, inputs: Tensor) -> HyperKind:
        """Return images in high contrast, from which there is something to learn."""
        return cls(len(inputs), inputs.shape[1:], init=3.0 * inputs, like=next(model.parameters()))
