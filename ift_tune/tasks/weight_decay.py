"""A weight decay for every single weight: of a regression, of an MLP, of ResNet-18.

``mnist-overfit`` is the experiment the project starts from: 623,290 decays overfit 50 images.
``diabetes-weight-decay`` is a linear regression as in the paper's study of inverses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ift_tune.joint.budget import Budget
from ift_tune.tasks.base import CLASSES, NEUMANN, Sizes, Target, Task, require_fraction

if TYPE_CHECKING:
    import torch

    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.tasks.datasets import Images, Tabular

_DIABETES_SPLITS = (50, 50, 150, 192)  # few to fit on, so that there is something to regularise
_RESNET18 = 11_173_962  # weights


@dataclass(frozen=True)
class MLPDecay:
    """Builds one hidden layer of 32 units, with a weight decay for every single weight.

    Attributes:
        train: Examples that fit the weights.
        val: Examples that fit the decays.
        search: Examples that score a trial.
        test: Examples that are only reported.
        batch_size: Of the inner steps.
        corrupted: The fraction of the training labels that is redrawn over all classes.

    Raises:
        UsageError: If `corrupted` is no fraction.
    """

    train: int
    val: int
    search: int
    test: int
    batch_size: int = 50
    corrupted: float = 0.0

    def __post_init__(self) -> None:
        require_fraction("corrupted", self.corrupted)

    def __call__(self, images: Images, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem."""
        from ift_tune.hyper import WeightDecay
        from ift_tune.hyper.supervised import ClassificationProblem
        from ift_tune.tasks.building import corrupt, cut, flat, make_splits, mlp

        parts = flat(cut(images, self.train, self.val, self.search, self.test, seed))
        (inputs, targets), *others = parts
        train = inputs, corrupt(targets, self.corrupted, seed)
        model = mlp(inputs.shape[1], 32).to(device)
        size = self.batch_size
        splits = make_splits(train, *others, batch_size=size, device=device, seed=seed)
        return ClassificationProblem(model, WeightDecay(model, "weight", init=1e-3), splits)


def build_diabetes(table: Tabular, device: torch.device, seed: int) -> BilevelProblem:
    """Return linear regression with 11 decays, 50 training and 50 validation patients."""
    import torch
    from torch import nn

    from ift_tune.hyper import WeightDecay
    from ift_tune.hyper.supervised import RegressionProblem
    from ift_tune.tasks.building import make_splits, permutation

    order = permutation(len(table.targets), seed)
    train, val, search, test = (table.part(p) for p in torch.split(order, list(_DIABETES_SPLITS)))
    model = nn.Sequential(nn.Linear(table.inputs.shape[1], 1), nn.Flatten(0)).to(device)
    splits = make_splits(train, val, search, test, batch_size=None, device=device, seed=seed)
    hyper = WeightDecay(model, "weight", init=1e-2, transform="exp")
    return RegressionProblem(model, hyper, splits)


def build_mnist(images: Images, device: torch.device, seed: int) -> BilevelProblem:
    """Return an MLP 784-784-10; the last 50 training images train, the first 50 validate."""
    from functools import partial

    from torch import nn

    from ift_tune.hyper import WeightDecay
    from ift_tune.hyper.supervised import ClassificationProblem
    from ift_tune.tasks.building import flat, make_splits, mlp

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
        from ift_tune.hyper import WeightDecay
        from ift_tune.hyper.supervised import ClassificationProblem
        from ift_tune.tasks.building import cut, make_splits, resnet18

        parts = cut(images, self.train, self.val, self.search, self.test, seed)
        model = resnet18(CLASSES, self.width).to(device)
        splits = make_splits(
            *parts, batch_size=self.batch_size, largest=self.largest, device=device, seed=seed
        )
        return ClassificationProblem(model, WeightDecay(model, "weight", init=self.init), splits)


DIGITS = Task(
    name="digits-weight-decay",
    summary="MLP 64-32-10 on 8×8 digits, a weight decay for every single weight",
    data="digits",
    build=MLPDecay(200, 200, 400, 997),
    sizes=Sizes(weights=2410, hypers=2410, train=200, val=200, search=400, test=997),
    target=Target("retrained_test_error", 0.075, "the best single decay by search gives 0.075"),
    settings={**NEUMANN, "terms": 5, "meta_lr": 0.03, "inner_steps": 20, "inner_lr": 3e-3},
    budget=Budget(outer_steps=40),
)

DIABETES = Task(
    name="diabetes-weight-decay",
    summary="linear regression on 10 measurements of 442 patients, a decay for each coefficient",
    data="diabetes",
    build=build_diabetes,
    sizes=Sizes(weights=11, hypers=11, train=50, val=50, search=150, test=192),
    target=Target(
        "retrained_test_loss",
        0.61,
        "the best single decay by search, solved exactly, gives 0.609 (mean of seeds 0 to 4)",
    ),
    settings={**NEUMANN, "terms": 20, "meta_lr": 0.1, "inner_steps": 20, "inner_lr": 3e-2},
    budget=Budget(outer_steps=100),
)

MNIST = Task(
    name="mnist-overfit",
    summary="MLP 784-784-10 on 50 + 50 MNIST images, a weight decay for every single weight",
    data="mnist",
    build=build_mnist,
    sizes=Sizes(weights=623_290, hypers=623_290, train=50, val=50, search=5000, test=10_000),
    target=Target("val_error", 0.0, "Lorraine, Vicol, Duvenaud 2020: 100 % validation accuracy"),
    settings={
        **NEUMANN,
        "terms": 3,
        "meta_lr": 0.1,
        "meta_optimizer": "rmsprop",
        "inner_steps": 50,
        "inner_lr": 1e-4,
    },
    budget=Budget(outer_steps=200, eval_every=10, retrain=True),
)

MNIST_SMALL = Task(
    name="mnist-weight-decay",
    summary="MLP 784-32-10 on 1,000 MNIST images, a weight decay for every single weight",
    data="mnist",
    build=MLPDecay(1000, 200, 1000, 10_000),
    sizes=Sizes(weights=25_450, hypers=25_450, train=1000, val=200, search=1000, test=10_000),
    target=Target("retrained_test_error", 0.128, "the best single decay by search gives 0.128"),
    settings={**NEUMANN, "terms": 5, "meta_lr": 0.03, "inner_steps": 20, "inner_lr": 3e-3},
    budget=Budget(outer_steps=40),
    small={"train": 200, "search": 400, "test": 997},
)

_TINY = {"train": 8, "val": 8, "search": 8, "test": 8, "batch_size": 4, "largest": 4, "width": 8}

CIFAR10_OVERFIT = Task(
    name="cifar10-overfit",
    summary="ResNet-18 on 50 + 50 CIFAR-10 images, a weight decay for every single weight",
    data="cifar10",
    build=ResNetDecay(50, 50, 500, 1000, batch_size=50, largest=50, init=1e-2),
    sizes=Sizes(weights=_RESNET18, hypers=_RESNET18, train=50, val=50, search=500, test=1000),
    target=Target(
        "val_error",
        0.0,
        "Lorraine, Vicol, Duvenaud 2020: 100 % validation accuracy; 13 outer steps at width 16",
    ),
    settings={
        **NEUMANN,
        "terms": 3,
        "meta_lr": 0.1,
        "meta_optimizer": "rmsprop",
        "inner_steps": 5,
        "inner_lr": 3e-4,
    },
    budget=Budget(outer_steps=40, eval_every=5),
    small=_TINY,
)

CIFAR10 = Task(
    name="cifar10-weight-decay",
    summary="ResNet-18 on CIFAR-10, a weight decay for each of its 11 million weights",
    data="cifar10",
    build=ResNetDecay(40_000, 5000, 5000, 10_000, batch_size=128, largest=128, init=2.5e-4),
    sizes=Sizes(
        weights=_RESNET18, hypers=_RESNET18, train=40_000, val=5000, search=5000, test=10_000
    ),
    target=Target(
        "search_error",
        0.14,
        "about what plain ResNet-18 reaches without augmentation; a run of this size is due",
    ),
    settings={
        **NEUMANN,
        "terms": 3,
        "meta_lr": 0.1,
        "inner_steps": 10,
        "inner_lr": 0.02,
        "inner_optimizer": "momentum",
    },
    budget=Budget(outer_steps=1000, eval_every=50),
    small=_TINY,
)

TASKS = (DIGITS, DIABETES, MNIST, MNIST_SMALL, CIFAR10_OVERFIT, CIFAR10)
