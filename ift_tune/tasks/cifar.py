"""ResNet-18 on CIFAR-10 with a decay for every one of its weights: at scale, and on 50 images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import CLASSES, cut, make_splits, resnet18
from ift_tune.tasks.datasets import Images


@dataclass(frozen=True)
class ResNetDecay:
    """Builds ResNet-18 with a weight decay for every single weight.

    Images come as they are, without augmentation, so that decay is all that regularises.

    Attributes:
        train: Examples that fit the weights.
        val: Examples that fit the decays.
        search: Examples that score a trial.
        test: Examples that are only reported.
        batch_size: Of the inner steps.
        largest: Examples that an outer step sees of `train` and of `val`, and that an evaluation
            takes at a time. The graph that Hessian products go through holds all activations of
            this many examples a few times over.
        init: The decay to start from.
        width: Channels of the first stage; 64 in ResNet-18.
    """

    train: int
    val: int
    search: int
    test: int
    batch_size: int
    largest: int
    init: float
    width: int = 64

    def __call__(self, images: Images, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem."""
        parts = cut(images, self.train, self.val, self.search, self.test, seed)
        model = resnet18(CLASSES, self.width).to(device)
        splits = make_splits(
            *parts, batch_size=self.batch_size, largest=self.largest, device=device, seed=seed
        )
        return ClassificationProblem(model, WeightDecay(model, "weight", init=self.init), splits)


_WEIGHTS = 11_173_962
_TINY = {"train": 8, "val": 8, "search": 8, "test": 8, "batch_size": 4, "largest": 4, "width": 8}

WEIGHT_DECAY = Task(
    name="cifar10-weight-decay",
    summary="ResNet-18 on CIFAR-10, a weight decay for each of its 11 million weights",
    data="cifar10",
    build=ResNetDecay(40_000, 5000, 5000, 10_000, batch_size=128, largest=128, init=2.5e-4),
    sizes=Sizes(
        weights=_WEIGHTS, hypers=_WEIGHTS, train=40_000, val=5000, search=5000, test=10_000
    ),
    target=Target(
        "search_error",
        0.14,
        "about what plain ResNet-18 reaches without augmentation; a run of this size is due",
    ),
    default_config=MetaConfig(
        inverse=Neumann(terms=3),
        meta_lr=0.1,
        inner_steps=10,
        inner_lr=0.02,
        inner_optimizer="momentum",
    ),
    budget=Budget(outer_steps=1000, eval_every=50),
    small=_TINY,
)

OVERFIT = Task(
    name="cifar10-overfit",
    summary="ResNet-18 on 50 + 50 CIFAR-10 images, a weight decay for every single weight",
    data="cifar10",
    build=ResNetDecay(50, 50, 500, 1000, batch_size=50, largest=50, init=1e-2),
    sizes=Sizes(weights=_WEIGHTS, hypers=_WEIGHTS, train=50, val=50, search=500, test=1000),
    target=Target(
        "val_error",
        0.0,
        "Lorraine, Vicol, Duvenaud 2020: 100 % validation accuracy; 13 outer steps at width 16",
    ),
    default_config=MetaConfig(
        inverse=Neumann(terms=3),
        meta_lr=0.1,
        meta_optimizer="rmsprop",
        inner_steps=5,
        inner_lr=3e-4,
    ),
    budget=Budget(outer_steps=40, eval_every=5),
    small=_TINY,
)
