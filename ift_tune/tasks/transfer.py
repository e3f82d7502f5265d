"""What a few training examples are worth to models that they were not made for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune.implicit.vectors import Tensors
from ift_tune.problem.batches import Loader, once_through, to_device
from ift_tune.tasks.building import CLASSES, Examples, mlp

_DECAY = 1e-3
_HIDDEN = 100


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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
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
