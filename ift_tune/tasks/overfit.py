"""The experiment the project starts from: 623,290 decays overfit 50 validation images."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import flat, make_splits, mlp
from ift_tune.tasks.datasets import Images


def build_mnist(images: Images, device: torch.device, seed: int) -> BilevelProblem:
    """Return an MLP 784-784-10; the last 50 training images train, the first 50 validate."""
    end = len(images.pixels) - 50
    own_test = len(images.test_pixels) > 0
    middle = min(5050, end) if own_test else end // 2
    parts = flat(
        (
            images.train(slice(end, None)),
            images.train(slice(0, 50)),
            images.train(slice(50, middle)),
            images.test() if own_test else images.train(slice(middle, end)),
        )
    )
    model = mlp(parts[0][0].shape[1], 784).to(device)
    hyper = WeightDecay(model, "weight", init=partial(nn.init.uniform_, a=0.0, b=1.0))
    splits = make_splits(*parts, batch_size=32, device=device, seed=seed)
    return ClassificationProblem(model, hyper, splits)


MNIST = Task(
    name="mnist-overfit",
    summary="MLP 784-784-10 on 50 + 50 MNIST images, a weight decay for every single weight",
    data="mnist",
    build=build_mnist,
    sizes=Sizes(weights=623_290, hypers=623_290, train=50, val=50, search=5000, test=10_000),
    target=Target("val_error", 0.0, "Lorraine, Vicol, Duvenaud 2020: 100 % validation accuracy"),
    default_config=MetaConfig(
        inverse=Neumann(terms=3),
        meta_lr=0.1,
        meta_optimizer="rmsprop",
        inner_steps=50,
        inner_lr=1e-4,
    ),
    budget=Budget(outer_steps=200, eval_every=10, retrain=True),
)
