"""A decay for every weight of a small MLP on digits."""

from __future__ import annotations

import torch

from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import cut, flat, make_splits, mlp
from ift_tune.tasks.datasets import Images


def build_digits(images: Images, device: torch.device, seed: int) -> BilevelProblem:
    """Return an MLP 64-32-10 with 2,410 decays, 200 training and 200 validation digits."""
    parts = flat(cut(images, 200, 200, 400, 997, seed))
    model = mlp(parts[0][0].shape[1], 32).to(device)
    splits = make_splits(*parts, batch_size=50, device=device, seed=seed)
    return ClassificationProblem(model, WeightDecay(model, "weight", init=1e-3), splits)


DIGITS = Task(
    name="digits-weight-decay",
    summary="MLP 64-32-10 on 8×8 digits, a weight decay for every single weight",
    data="digits",
    build=build_digits,
    sizes=Sizes(weights=2410, hypers=2410, train=200, val=200, search=400, test=997),
    target=Target("retrained_test_error", 0.075, "the best single decay by search gives 0.075"),
    default_config=MetaConfig(
        inverse=Neumann(terms=5), meta_lr=0.03, inner_steps=20, inner_lr=3e-3
    ),
    budget=Budget(outer_steps=40),
)
