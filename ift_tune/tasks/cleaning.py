"""Data cleaning: half the training labels are redrawn, and a weight per example finds out which."""

from __future__ import annotations

import torch
from torch import nn

from ift_tune.classification import ClassificationProblem
from ift_tune.config import Budget, MetaConfig
from ift_tune.hyper import Compose, ExampleWeights, WeightDecay
from ift_tune.inverse import Neumann
from ift_tune.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import CLASSES, corrupt, make_splits, permutation
from ift_tune.tasks.data import Images

CORRUPTED = 0.5


class CleaningProblem(ClassificationProblem):
    """Softmax regression on partly wrong labels.

    Attributes:
        clean: Which training labels are still the true ones, shape (N,), bool. For reports only:
            no loss reads it.
    """

    clean: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Add the mean weight of examples with true and with wrong labels."""
        with torch.no_grad():
            index = torch.arange(len(self.clean), device=self.clean.device)
            weights = self.hyper.weigh(torch.ones_like(index, dtype=torch.float32), index)
        return super().summary() | {
            "weight_of_clean": float(weights[self.clean].mean()),
            "weight_of_corrupted": float(weights[~self.clean].mean()),
        }


def _build(
    images: Images, parts: tuple[torch.Tensor, ...], device: torch.device, seed: int
) -> CleaningProblem:
    """Return the problem for given train, val and search rows (and test rows, or a test part)."""
    inputs = (images.inputs + 1.0) / 2.0  # dark pixels at 0 make a far better conditioned Hessian
    targets = images.targets
    train, val, search, *test = parts
    spoiled = corrupt(targets[train], CORRUPTED, seed)
    test_rows = (
        (inputs[test[0]], targets[test[0]])
        if test
        else ((images.test_inputs + 1.0) / 2.0, images.test_targets)
    )
    model = nn.Linear(inputs.shape[1], CLASSES).to(device)
    hyper = Compose(
        {
            "examples": ExampleWeights(len(train), like=model.weight),
            "decay": WeightDecay(model, "model", init=1e-3, transform="exp"),
        }
    )
    splits = make_splits(
        (inputs[train], spoiled),
        (inputs[val], targets[val]),
        (inputs[search], targets[search]),
        test_rows,
        batch_size=None,
        device=device,
        seed=seed,
    )
    problem = CleaningProblem(model, hyper, splits)
    problem.clean = (spoiled == targets[train]).to(device)
    return problem


def build_digits(images: Images, device: torch.device, seed: int) -> BilevelProblem:
    """Return 600 training digits, half of them relabelled, 200 for validation."""
    order = permutation(len(images.inputs), seed)
    return _build(images, torch.tensor_split(order, (600, 800, 1100)), device, seed)


def build_mnist(images: Images, device: torch.device, seed: int) -> BilevelProblem:
    """Return 5,000 training images, half of them relabelled, 5,000 for validation."""
    order = permutation(len(images.inputs), seed)[:15_000]
    return _build(images, torch.split(order, 5000), device, seed)


DIGITS = Task(
    name="digits-cleaning",
    summary="softmax regression on 8×8 digits, half the labels redrawn, a weight per example",
    data="digits",
    build=build_digits,
    sizes=Sizes(weights=650, hypers=601, train=600, val=200, search=300, test=697),
    target=Target("retrained_test_error", 0.10, "the best single decay by search gives 0.116"),
    default_config=MetaConfig(
        inverse=Neumann(terms=10), meta_lr=0.1, inner_steps=10, inner_lr=1e-2
    ),
    budget=Budget(outer_steps=100),
)

MNIST = Task(
    name="mnist-cleaning",
    summary="softmax regression on MNIST, half of 5,000 labels redrawn, a weight per example",
    data="mnist",
    build=build_mnist,
    sizes=Sizes(weights=7850, hypers=5001, train=5000, val=5000, search=5000, test=10_000),
    target=Target(
        "retrained_test_error", 0.115, "the best single decay gives 0.142, the clean labels 0.104"
    ),
    default_config=MetaConfig(
        inverse=Neumann(terms=10), meta_lr=0.2, inner_steps=10, inner_lr=1e-2
    ),
    budget=Budget(outer_steps=200, eval_every=5),
)
