"""Data distillation: one or a few images per class, every pixel a hyperparameter.

Lorraine, Vicol, Duvenaud 2020, section 5.2. Softmax regression is trained on the distilled images
alone; a large validation split says how good they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ift_tune.base.errors import UsageError
from ift_tune.joint.budget import Budget
from ift_tune.tasks.base import CLASSES, CONJUGATE_GRADIENT, Sizes, Target, Task

if TYPE_CHECKING:
    import torch

    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.tasks.datasets import Images

_CIFAR10_NAMES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_POOL_PER_IMAGE = 10  # real images of all classes, for each one needed of a class


@dataclass(frozen=True)
class Distillation:
    """Builds the problem.

    Attributes:
        per_class: Distilled images of each class.
        val: Real images by which λ is learned.
        search: Real images.
        test: Real images.
        largest: Real images in the batch of an outer step.
        decay: The decay to start from: a strong one makes the images prototypes of the classes.
        noise: Standard deviation of the noise from which the images start.
        real: Share of a real image that they start from too.
        judging: See `DistillationProblem`.
        names: Of the classes, for captions, with commas between.

    Raises:
        UsageError: If there is not one name for each class.
    """

    per_class: int
    val: int
    search: int
    test: int
    largest: int = 5000
    decay: float = 1.0
    noise: float = 0.02
    real: float = 0.0
    judging: int = 200
    names: str = "0,1,2,3,4,5,6,7,8,9"

    def __post_init__(self) -> None:
        if self.names.count(",") != CLASSES - 1:
            raise UsageError(f"names must be {CLASSES}, with commas between, got {self.names!r}")

    def __call__(self, images: Images, device: torch.device, seed: int) -> BilevelProblem:
        """Return softmax regression on images that start as noise, and a decay."""
        import torch
        from torch import nn

        from ift_tune.hyper import Compose, DistilledData, WeightDecay
        from ift_tune.tasks.building import cut, first_of_each, flat, make_splits
        from ift_tune.tasks.problems import DistillationProblem

        pool = CLASSES * _POOL_PER_IMAGE * self.per_class
        found, *rest = flat(cut(images, pool, self.val, self.search, self.test, seed))
        train = first_of_each(found, self.per_class)
        count, pixels = train[0].shape
        names = self.names.split(",")
        model = nn.Linear(pixels, CLASSES).to(device)
        noise = self.noise * torch.randn(train[0].shape)
        start = (self.real * train[0] + noise).view(count, *images.shape)
        hyper = Compose(
            {
                "images": DistilledData(
                    count,
                    images.shape,
                    init=start,
                    transform="tanh",
                    labels=[names[label] for label in train[1].tolist()],
                    like=model.weight,
                ),
                "decay": WeightDecay(model, "model", init=self.decay, transform="exp"),
            }
        )
        splits = make_splits(
            train, *rest, batch_size=None, device=device, seed=seed, largest=self.largest
        )
        return DistillationProblem(model, hyper, splits, shape=images.shape, judging=self.judging)


_SETTINGS = {
    **CONJUGATE_GRADIENT,
    "max_steps": 30,
    "meta_lr": 0.03,
    "inner_steps": 50,
    "inner_optimizer": "momentum",
    "inner_lr": 0.3,
}

DIGITS = Task(
    name="digits-distill",
    summary="softmax regression on ten 8×8 images, one a class, every pixel a hyperparameter",
    data="digits",
    build=Distillation(1, val=700, search=300, test=597),
    sizes=Sizes(weights=650, hypers=641, train=10, val=700, search=300, test=597),
    target=Target(
        "retrained_test_error", 0.06, "ten real images give 0.36, all 700 of validation 0.05"
    ),
    settings=_SETTINGS,
    budget=Budget(outer_steps=200, eval_every=10),
)

MNIST = Task(
    name="mnist-distill",
    summary="softmax regression on ten images, one a class, every pixel a hyperparameter",
    data="mnist",
    build=Distillation(1, val=40_000, search=5000, test=10_000),
    sizes=Sizes(weights=7850, hypers=7841, train=10, val=40_000, search=5000, test=10_000),
    target=Target(
        "retrained_test_error", 0.1, "ten real images give 0.56, all 40,000 of validation 0.08"
    ),
    settings=_SETTINGS,
    budget=Budget(outer_steps=400, eval_every=20),
    small={"val": 300, "search": 100, "test": 100, "judging": 20},
)

MNIST_TEN = Task(
    name="mnist-distill-10",
    summary="softmax regression on a hundred images, ten a class, every pixel a hyperparameter",
    data="mnist",
    build=Distillation(10, val=40_000, search=5000, test=10_000, real=0.2),
    sizes=Sizes(weights=7850, hypers=78_401, train=100, val=40_000, search=5000, test=10_000),
    target=Target(
        "retrained_test_error",
        0.1,
        "a hundred real images give 0.26, all 40,000 of validation 0.08",
    ),
    settings=_SETTINGS,
    budget=Budget(outer_steps=300, eval_every=20),
    small={"per_class": 2, "val": 300, "search": 100, "test": 100, "judging": 20},
)

CIFAR10 = Task(
    name="cifar10-distill",
    summary="softmax regression on ten colour images, one a class, every pixel a hyperparameter",
    data="cifar10",
    build=Distillation(1, val=20_000, search=5000, test=10_000, names=_CIFAR10_NAMES),
    sizes=Sizes(weights=30_730, hypers=30_721, train=10, val=20_000, search=5000, test=10_000),
    target=Target(
        "retrained_test_error", 0.63, "ten real images give 0.84, all 20,000 of validation 0.61"
    ),
    settings={**_SETTINGS, "meta_lr": 0.01, "inner_lr": 0.1},
    budget=Budget(outer_steps=150, eval_every=10),
    small={"val": 300, "search": 100, "test": 100, "judging": 20},
)

TASKS = (DIGITS, MNIST, MNIST_TEN, CIFAR10)
