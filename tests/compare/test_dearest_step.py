"""What a step may cost at most is known before it is taken, for every inverse."""

from __future__ import annotations

import pytest
import torch
from tiny_comparisons import make_clouds

from ift_tune import Identity, MetaConfig, Neumann, Nystrom
from ift_tune.implicit.inverse import INVERSES, Inverse
from ift_tune.joint.joint import JointOptimizer

BATCHES = ["mini", "drop", "full", "curvature"]
CASES = [
    (example, warm_start)
    for kind in INVERSES.values()
    for example in kind.examples()
    for warm_start in ((False, True) if kind.refines else (False,))
]


def changing(metrics: dict[str, float]) -> dict[str, float]:
    """Return what depends on the numbers alone."""
    return {k: v for k, v in metrics.items() if "seconds" not in k}


def steps_that_cost_the_most(
    inverse: Inverse, *, batches: str, warm_start: bool = False, plain: bool = False
) -> int:
    """Take some steps, none of which may cost more than was said; count those that cost as much."""
    config = MetaConfig(
        inverse=inverse, warm_start=warm_start, inner_steps=2, inner_lr=0.1, meta_lr=0.1
    )
    joint = JointOptimizer(make_clouds(config, torch.device("cpu"), 0, batches=batches), config)
    tight = 0
    for _ in range(1 if plain else 5):
        most, before = joint.max_step_cost(plain=plain), joint.cost.gradient_equivalents
        if plain:
            joint.baseline_step()
        else:
            joint.step()
        paid = joint.cost.gradient_equivalents - before
        assert paid <= most * (1.0 + 1e-12)
        tight += paid >= most * (1.0 - 1e-12)
    return tight


@pytest.mark.parametrize(("inverse", "warm_start"), CASES, ids=str)
def test_no_step_costs_more_than_was_said(inverse: Inverse, warm_start: bool) -> None:
    steps_that_cost_the_most(inverse, batches="mini", warm_start=warm_start)


@pytest.mark.parametrize("batches", BATCHES)
@pytest.mark.parametrize("plain", [False, True])
def test_the_bound_holds_for_all_batches_and_is_no_idle_one(batches: str, plain: bool) -> None:
    """Steps that are not cut short cost just that, unless the batch is smaller than the first."""
    for inverse in (Identity(), Nystrom(rank=3), Neumann(terms=2)):
        tight = steps_that_cost_the_most(inverse, batches=batches, plain=plain)
        assert tight or batches == "mini"


@pytest.mark.parametrize("batches", BATCHES)
def test_asking_changes_nothing(batches: str) -> None:
    config = MetaConfig(inverse=Neumann(terms=2), inner_steps=2)
    asked, left = (
        JointOptimizer(make_clouds(config, torch.device("cpu"), 0, batches=batches), config)
        for _ in range(2)
    )
    for _ in range(3):
        asked.max_step_cost()
        asked.max_step_cost(plain=True)
        assert changing(asked.step()) == changing(left.step())
