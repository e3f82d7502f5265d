"""Class imbalance: the training classes have a long tail, and a weight for each makes up for it.

As Ren et al. 2018, the validation split is small and balanced. The other two are balanced too, so
that the errors are means over the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ift_tune.base.errors import UsageError
from ift_tune.joint.budget import Budget
from ift_tune.tasks.base import CLASSES, NEUMANN, Sizes, Target, Task, require_fraction

if TYPE_CHECKING:
    import torch

    from ift_tune.problem.problem import BilevelProblem
    from ift_tune.tasks.datasets import Images


@dataclass(frozen=True)
class Imbalance:
    """Builds the problem.

    Attributes:
        train: Examples of class 0; the others have fewer, by equal factors from one to the next.
        ratio: How many times fewer there are of class 9.
        val: Examples of each class; likewise `search` and `test`.
        corrupted: The fraction of the training labels that is redrawn over all classes.

    Raises:
        UsageError: If `corrupted` is no fraction.
    """

    train: int
    ratio: float
    val: int
    search: int
    test: int
    corrupted: float = 0.0

    def __post_init__(self) -> None:
        require_fraction("corrupted", self.corrupted)

    def counts(self) -> list[int]:
        """Return the number of training examples of each class.

        Raises:
            UsageError: If `ratio` is below 1.
        """
        if not self.ratio >= 1.0:
            raise UsageError(f"ratio must be at least 1, got {self.ratio}")
        last = CLASSES - 1
        return [max(1, round(self.train * self.ratio ** (-k / last))) for k in range(CLASSES)]

    def __call__(self, images: Images, device: torch.device, seed: int) -> BilevelProblem:
        """Return the problem: softmax regression, a weight per class beside a weight decay."""
        from torch import nn

        from ift_tune.hyper import ClassWeights, Compose, WeightDecay
        from ift_tune.hyper.supervised import ClassificationProblem
        from ift_tune.tasks.building import corrupt, cut_classes, flat, make_splits

        cuts = cut_classes(images, self.counts(), self.val, self.search, self.test, seed)
        # From 0 to 1, as in cleaning.
        train, val, search, test = (((x + 1.0) / 2.0, targets) for x, targets in flat(cuts))
        inputs, targets = train
        train = inputs, corrupt(targets, self.corrupted, seed)
        model = nn.Linear(inputs.shape[1], CLASSES).to(device)
        hyper = Compose(
            {
                "classes": ClassWeights(CLASSES, like=model.weight),
                "decay": WeightDecay(model, "model", init=1e-3, transform="exp"),
            }
        )
        splits = make_splits(train, val, search, test, batch_size=None, device=device, seed=seed)
        return ClassificationProblem(model, hyper, splits)


DIGITS = Task(
    name="digits-imbalanced",
    summary="softmax regression on 8×8 digits, 70 of class 0 to 4 of class 9, a weight per class",
    data="digits",
    build=Imbalance(70, 20.0, 10, 30, 60),
    sizes=Sizes(weights=650, hypers=11, train=239, val=100, search=300, test=600),
    target=Target(
        "retrained_test_error", 0.13, "0.105; equal weights give 0.147 (means of seeds 1 to 5)"
    ),
    settings={**NEUMANN, "terms": 10, "meta_lr": 0.1, "inner_steps": 10, "inner_lr": 1e-2},
    budget=Budget(outer_steps=100),
)

MNIST = Task(
    name="mnist-imbalanced",
    summary="softmax regression on MNIST, 500 of class 0 to 5 of class 9, a weight per class",
    data="mnist",
    build=Imbalance(500, 100.0, 20, 100, 890),
    sizes=Sizes(weights=7850, hypers=11, train=1242, val=200, search=1000, test=8900),
    target=Target(
        "retrained_test_error",
        0.25,
        "0.204; equal weights give 0.304 (means of seeds 1 to 5)",
    ),
    settings={**NEUMANN, "terms": 10, "meta_lr": 0.1, "inner_steps": 10, "inner_lr": 1e-2},
    budget=Budget(outer_steps=100, eval_every=5),
    small={"train": 70, "val": 10, "search": 30, "test": 60},
)

TASKS = (DIGITS, MNIST)
