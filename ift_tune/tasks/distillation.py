"""Data distillation: one or a few images per class, every pixel a hyperparameter.

Lorraine, Vicol, Duvenaud 2020, section 5.2. Softmax regression is trained on the distilled images
alone; a large validation split says how good they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ift_tune.base.errors import UsageError
from ift_tune.hyper import Compose, DistilledData, HyperKind, WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import ConjugateGradient
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem, Splits
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import CLASSES, Examples, cut, flat, make_splits
from ift_tune.tasks.datasets import Images
from ift_tune.tasks.transfer import fresh_test_error, other_architectures

_CIFAR10_NAMES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_POOL_PER_IMAGE = 10  # real images of all classes, for each one needed of a class


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


def first_of_each(examples: Examples, count: int) -> Examples:
    """Return the first `count` examples of every class: the first of each, then the second ...

    So a row of ten images shows every class once.

    Raises:
        UsageError: If a class has fewer.
    """
    inputs, targets = examples
    places = [(targets == label).nonzero().flatten()[:count] for label in range(CLASSES)]
    fewest = min(len(place) for place in places)
    if fewest < count:
        raise UsageError(
            f"{count} images of each class are needed, and of one there are {fewest} among "
            f"{len(targets)}: lower per_class"
        )
    chosen = torch.stack(places, dim=1).flatten()
    return inputs[chosen], targets[chosen]


_CONFIG = MetaConfig(
    inverse=ConjugateGradient(max_steps=30),
    meta_lr=0.03,
    inner_steps=50,
    inner_optimizer="momentum",
    inner_lr=0.3,
)

DIGITS = Task(
    name="digits-distill",
    summary="softmax regression on ten 8×8 images, one a class, every pixel a hyperparameter",
    data="digits",
    build=Distillation(1, val=700, search=300, test=597),
    sizes=Sizes(weights=650, hypers=641, train=10, val=700, search=300, test=597),
    target=Target(
        "retrained_test_error", 0.06, "ten real images give 0.36, all 700 of validation 0.05"
    ),
    default_config=_CONFIG,
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
    default_config=_CONFIG,
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
    default_config=_CONFIG,
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
    default_config=replace(_CONFIG, meta_lr=0.01, inner_lr=0.1),
    budget=Budget(outer_steps=150, eval_every=10),
    small={"val": 300, "search": 100, "test": 100, "judging": 20},
)
