"""What a step may cost at most is known before it is taken, for every inverse.

That no solve takes more products than its inverse says is a law of `check_inverse`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_comparisons import make_clouds

from ift_tune import MetaConfig, Neumann
from ift_tune.implicit.inverse import INVERSES, Inverse
from ift_tune.joint.joint import JointOptimizer

BATCHES = ("mini", "drop", "full", "curvature")
ROUNDING = 1.0 + 1e-12


def optimizer(config: MetaConfig, batches: str) -> JointOptimizer:
    return JointOptimizer(make_clouds(config, torch.device("cpu"), 0, batches=batches), config)


def _cases() -> Iterator[Any]:
    for name, kind in INVERSES.items():
        for number, inverse in enumerate(kind.examples()):
            for warm in (False, True) if inverse.refines else (False,):
                # How batches are drawn and what is solved have nothing to do with each other.
                for batches in BATCHES if number == 0 else ("curvature",):
                    case = f"{name}-{number}{'-warm' * warm}-{batches}"
                    yield pytest.param(inverse, warm, batches, id=case)


@pytest.mark.parametrize(("inverse", "warm_start", "batches"), list(_cases()))
def test_no_outer_step_costs_more_than_was_said(
    inverse: Inverse, warm_start: bool, batches: str
) -> None:
    config = MetaConfig(
        inverse=inverse, warm_start=warm_start, inner_steps=2, inner_lr=0.1, meta_lr=0.1
    )
    joint = optimizer(config, batches)
    tight = 0
    for _ in range(3):  # with nothing known before it, with an eigenpair, with a guess
        most, before = joint.max_step_cost(), joint.cost.gradient_equivalents
        joint.step()
        paid = joint.cost.gradient_equivalents - before
        assert paid <= most * ROUNDING
        tight += paid >= most / ROUNDING
    # It is no idle bound: the steps that are not cut short cost just that. A guess that is not yet
    # there is one product less, CG may converge, a series may stop when it diverges.
    assert tight or batches == "mini" or inverse.name not in ("identity", "nystrom")


@pytest.mark.parametrize("train_on_val", [False, True])
@pytest.mark.parametrize("batches", BATCHES)
def test_a_baseline_step_costs_what_was_said(batches: str, train_on_val: bool) -> None:
    joint = optimizer(MetaConfig(inner_steps=2, inner_lr=0.1), batches)
    most = joint.max_step_cost(plain=True, train_on_val=train_on_val)
    joint.baseline_step(train_on_val=train_on_val)
    assert joint.cost.gradient_equivalents <= most * ROUNDING
    if batches != "mini":  # whose last batch is smaller
        assert joint.cost.gradient_equivalents == pytest.approx(most)


@pytest.mark.parametrize("batches", BATCHES)
def test_asking_changes_nothing(batches: str) -> None:
    config = MetaConfig(inverse=Neumann(terms=2), inner_steps=2)
    asked, left = (optimizer(config, batches) for _ in range(2))
    for _ in range(3):
        asked.max_step_cost()
        asked.max_step_cost(plain=True)
        one, other = (
            {k: v for k, v in joint.step().items() if "seconds" not in k} for joint in (asked, left)
        )
        assert one == other
