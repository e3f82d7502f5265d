"""Data cleaning: half the training labels are redrawn, and a weight per example finds out which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ift_tune.base.views import Histogram, View
from ift_tune.hyper import Compose, ExampleWeights, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import CLASSES, corrupt, cut, flat, make_splits
from ift_tune.tasks.datasets import Images

CORRUPTED = 0.5


class CleaningProblem(ClassificationProblem):
    """Softmax regression on partly wrong labels.

    Attributes:
        clean: Which training labels are still the true ones, shape (N,), bool. For reports only:
            no loss reads it.
    """

    clean: torch.Tensor

    def _weights(self) -> dict[str, torch.Tensor]:
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


@dataclass(frozen=True)
class Cleaning:
    """Builds the problem with so many examples in each split."""

    train: int
    val: int
    search: int
    test: int

    def __call__(self, images: Images, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem, half of its training labels redrawn."""
        cuts = cut(images, self.train, self.val, self.search, self.test, seed)
        # Dark pixels at 0 make a far better conditioned Hessian.
        train, val, search, test = (((x + 1.0) / 2.0, targets) for x, targets in flat(cuts))
        inputs, targets = train
        spoiled = corrupt(targets, CORRUPTED, seed)
        model = nn.Linear(inputs.shape[1], CLASSES).to(device)
        hyper = Compose(
            {
                "examples": ExampleWeights(len(inputs), like=model.weight),
                "decay": WeightDecay(model, "model", init=1e-3, transform="exp"),
            }
        )
        splits = make_splits(
            (inputs, spoiled), val, search, test, batch_size=None, device=device, seed=seed
        )
        problem = CleaningProblem(model, hyper, splits)
        problem.clean = (spoiled == targets).to(device)
        return problem


DIGITS = Task(
    name="digits-cleaning",
    summary="softmax regression on 8×8 digits, half the labels redrawn, a weight per example",
    data="digits",
    build=Cleaning(600, 200, 300, 697),
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
    build=Cleaning(5000, 5000, 5000, 10_000),
    sizes=Sizes(weights=7850, hypers=5001, train=5000, val=5000, search=5000, test=10_000),
    target=Target(
        "retrained_test_error", 0.115, "the best single decay gives 0.142, the clean labels 0.104"
    ),
    default_config=MetaConfig(
        inverse=Neumann(terms=10), meta_lr=0.2, inner_steps=10, inner_lr=1e-2
    ),
    budget=Budget(outer_steps=200, eval_every=5),
)
