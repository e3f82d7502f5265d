"""A decay for each coefficient of a linear regression, as in the paper's study of inverses."""

from __future__ import annotations

import torch
from torch import nn

from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import RegressionProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import Budget, MetaConfig
from ift_tune.problem.problem import BilevelProblem
from ift_tune.tasks.base import Sizes, Target, Task
from ift_tune.tasks.building import make_splits, permutation
from ift_tune.tasks.datasets import Tabular

SPLITS = (50, 50, 150, 192)  # few to fit on, so that there is something to regularise


def build_diabetes(table: Tabular, device: torch.device, seed: int) -> BilevelProblem:
    """Return linear regression with 11 decays, 50 training and 50 validation patients."""
    order = permutation(len(table.targets), seed)
    train, val, search, test = (table.part(part) for part in torch.split(order, list(SPLITS)))
    model = nn.Sequential(nn.Linear(table.inputs.shape[1], 1), nn.Flatten(0)).to(device)
    splits = make_splits(train, val, search, test, batch_size=None, device=device, seed=seed)
    hyper = WeightDecay(model, "weight", init=1e-2, transform="exp")
    return RegressionProblem(model, hyper, splits)


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
    default_config=MetaConfig(
        inverse=Neumann(terms=20), meta_lr=0.1, inner_steps=20, inner_lr=3e-2
    ),
    budget=Budget(outer_steps=100),
)
