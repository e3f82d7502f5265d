"""Problems that show more than their hyperparameters: samples, labels, features, worth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.base.randomness import RandomStream
from ift_tune.base.views import Histogram, ImageGrid, View
from ift_tune.hyper import HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.vectors import Tensors
from ift_tune.problem.batches import Loader, to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.problem import Splits
from ift_tune.tasks.base import CLASSES
from ift_tune.tasks.building import Examples, mlp

_DRAWS = 32
_IMAGES = 8
_SHOWN = 7  # augmentations of each

_DECAY = 1e-3
_HIDDEN = 100
_NAMED = 5  # features


class AugmentationProblem(ClassificationProblem):
    """A classifier whose training images are augmented, which shows what they become."""

    def summary(self) -> dict[str, float]:
        """Add the mean change of a pixel, and its standard deviation over draws."""
        images, draws = self._drawn()
        return super().summary() | {
            "mean_change": float((draws - images).abs().mean()),
            "spread": float(draws.std(dim=0).mean()),
        }

    def views(self) -> list[View]:
        """Add training images, augmentations of each, and where these differ."""
        images, draws = self._drawn()
        if images.ndim != 4:
            return super().views()
        rows = torch.stack([images, *draws[:_SHOWN]], dim=1).flatten(0, 1)
        spread = draws.std(dim=0)
        return [
            *super().views(),
            ImageGrid("Training images, each with augmentations", rows.cpu(), columns=1 + _SHOWN),
            ImageGrid(
                f"Standard deviation of each pixel over {_DRAWS} augmentations",
                spread.cpu(),
                columns=len(images),
                low=0.0,
                high=max(float(spread.max()), 1e-6),
            ),
        ]

    @torch.no_grad()
    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Return the first training images and draws of each, always the same, nobody disturbed."""
        inputs, _, *rest = next(once_through(self.splits.train))
        device = next(self.hyper.parameters()).device
        images = inputs[:_IMAGES].to(device)
        index = rest[0][:_IMAGES].to(device) if rest else None
        with RandomStream(0, device).aside():
            draws = [self.hyper.inputs(images, index) for _ in range(_DRAWS)]
        return images, torch.stack(draws)


class CleaningProblem(ClassificationProblem):
    """Softmax regression on partly wrong labels.

    Attributes:
        clean: Which training labels are still the true ones, shape (N,), bool. For reports only:
            no loss reads it.
        image_shape: Of the images whose pixels are the inputs: channels, height and width.
    """

    clean: Tensor
    image_shape: tuple[int, ...]

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights of examples with true and with wrong labels."""
        with torch.no_grad():
            index = torch.arange(len(self.clean), device=self.clean.device)
            weights = self.hyper.weigh(torch.ones_like(index, dtype=torch.float32), index)
        return {"clean": weights[self.clean], "corrupted": weights[~self.clean]}

    def summary(self) -> dict[str, float]:
        """Add the mean weight of examples with true and with wrong labels."""
        means = {f"weight_of_{name}": float(w.mean()) for name, w in self._weights().items()}
        return super().summary() | means

    def views(self) -> list[View]:
        """Return how the weights of both kinds of examples are distributed, and the other views."""
        groups = {name: weights.cpu() for name, weights in self._weights().items()}
        weights = Histogram("weights of clean and of corrupted examples", groups, "weight")
        # In place of the histogram that does not know which labels are true.
        others = [v for v in super().views() if not v.title.startswith("examples: ")]
        return [weights, *others]


class FeatureProblem(ClassificationProblem):
    """A classifier with a weight decay for each feature, which says which of them matter.

    Attributes:
        features: The name of each column of the inputs.
    """

    hyper: WeightDecay

    def __init__(
        self, model: nn.Module, hyper: WeightDecay, splits: Splits, *, features: tuple[str, ...]
    ) -> None:
        """Take the parts of a `ClassificationProblem`, and the features' names."""
        super().__init__(model, hyper, splits)
        self.features = features

    def ranked(self) -> list[tuple[str, float]]:
        """Return each feature with its decay, the smallest first: what is hardly held back."""
        decays = self.hyper.decays()[0].detach().flatten().tolist()
        return sorted(zip(self.features, decays, strict=True), key=lambda pair: pair[1])

    def words(self) -> str:
        """Return the features that matter most, and least."""
        ranked = [f"{name} ({decay:.2g})" for name, decay in self.ranked()]
        most, least = ", ".join(ranked[:_NAMED]), ", ".join(ranked[: -_NAMED - 1 : -1])
        return f"features that matter most, by their decay: {most}; least: {least}"


class DistillationProblem(ClassificationProblem):
    """Softmax regression on distilled images.

    The training split holds real images, as many of each class: λ stands in for them, and what
    they would have been worth themselves is the figure to compare with.

    Attributes:
        shape: Channels, height and width.
        judging: Steps of training of each model by which `summary` judges the images.
    """

    def __init__(
        self,
        model: nn.Module,
        hyper: HyperKind,
        splits: Splits,
        *,
        shape: tuple[int, int, int],
        judging: int,
    ) -> None:
        """Take the parts of a `ClassificationProblem`, and how to judge."""
        super().__init__(model, hyper, splits)
        self.shape, self.judging = shape, judging

    def summary(self) -> dict[str, float]:
        """Add the test errors of fresh models, trained on distilled or on real images alone.

        ``mlp_test_error`` and ``cnn_test_error`` are those of architectures that the images were
        not made for, ``real_images_mlp_test_error`` and ``real_images_cnn_test_error`` the same
        on as many real images, and ``real_images_test_error`` is softmax regression on those, with
        the decay as learned.
        """
        real, targets, index = next(iter(self.splits.train))
        with torch.no_grad():
            distilled = self.hyper.inputs(real, index)
        judge = partial(fresh_test_error, test=self.splits.test, steps=self.judging)
        found = super().summary()
        penalty = self.penalty()
        if penalty is not None:
            found["real_images_test_error"] = judge(
                lambda: nn.Linear(real.shape[1], CLASSES),
                (real, targets),
                lr=1e-2,
                penalty=penalty.value,
            )
        for name, make in other_architectures(self.shape).items():
            for prefix, images in (("", distilled), ("real_images_", real)):
                found[f"{prefix}{name}_test_error"] = judge(make, (images, targets), lr=3e-3)
        return found


def small_decay(weights: Tensors) -> Tensor:
    """Return 10⁻³·Σ w²: without it, separable examples push the weights ever further out."""
    return _DECAY * torch.stack([w.square().sum() for w in weights]).sum()


def other_architectures(shape: tuple[int, int, int]) -> dict[str, Callable[[], nn.Module]]:
    """Return makers of two smooth nets that take rows of C·H·W pixels: an MLP and a small CNN."""
    channels, height, width = shape

    def cnn() -> nn.Module:
        """Two strided convolutions: a quarter of the height and width is left."""
        convolutions = nn.Sequential(
            nn.Unflatten(1, shape),
            nn.Conv2d(channels, 8, 3, stride=2, padding=1),
            nn.ELU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ELU(),
            nn.Flatten(),
        )
        features = 16 * -(-height // 4) * -(-width // 4)
        return nn.Sequential(convolutions, nn.Linear(features, CLASSES))

    return {"mlp": lambda: mlp(channels * height * width, _HIDDEN), "cnn": cnn}


def fresh_test_error(
    make: Callable[[], nn.Module],
    examples: Examples,
    test: Loader,
    *,
    steps: int,
    lr: float,
    penalty: Callable[[Tensors], Tensor] = small_decay,
) -> float:
    """Train a model from scratch on all the examples at once by Adam; return its test error.

    The initial weights are the same at every call, and nobody else's random numbers are touched.

    Args:
        make: Makes the model on the CPU; it takes rows of pixels.
        examples: Rows (n, C·H·W) and class numbers (n,), few enough for one batch.
        test: Batches of rows and class numbers.
        steps: Of training.
        lr: Learning rate.
        penalty: Added to the mean cross-entropy, a function of the weights.
    """
    inputs, targets = examples
    with RandomStream(0, torch.device("cpu")).aside():
        model = make().to(inputs.device)
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=lr, fused=True)
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), targets) + penalty(weights)
        # Not backward(): λ, in the penalty, must not be given gradients.
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = gradient
        optimizer.step()
    wrong = total = 0
    with torch.no_grad():
        for batch in once_through(test):
            rows, classes = to_device(batch, inputs.device)
            wrong += int((model(rows).argmax(dim=1) != classes).sum())
            total += len(classes)
    return wrong / total
