"""Hooks into the joint optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ift_tune.implicit.hypergradient import Hypergradient

if TYPE_CHECKING:
    from ift_tune.joint.joint import JointOptimizer


class Callback:
    """Hooks into a `JointOptimizer`; override what is needed. None runs inside the inner loop."""

    def on_outer_step_begin(self, joint: JointOptimizer) -> None:
        """Run before the inner steps of an outer step."""

    def on_hypergradient(self, joint: JointOptimizer, result: Hypergradient) -> None:
        """Run with a fresh hypergradient, before λ is updated."""

    def on_outer_step_end(self, joint: JointOptimizer, metrics: dict[str, float]) -> None:
        """Run with what `step` is about to return; additions to `metrics` are kept."""
