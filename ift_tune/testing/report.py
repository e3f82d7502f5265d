"""What a check of a hypergradient found, to be read by people and programs."""

from __future__ import annotations

from dataclasses import dataclass, field

from ift_tune.base.status import SolveStatus


@dataclass(frozen=True)
class Comparison:
    """One comparison of the hypergradient with another way to get it.

    Attributes:
        name: What was compared.
        error: Relative error, ‖a − b‖/‖b‖.
        tolerance: The largest error that passes.
        note: What the comparison rests on.
    """

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class CheckReport:
    """What `check_hypergradient` found.

    Attributes:
        comparisons: All of them, in order.
        weights: Number of weights P.
        hypers: Number of hyperparameters H.
        stationarity: ‖∂L_T/∂w‖ at the weights the check solved for.
        status: Of the Hessian there: anything but CONVERGED breaks the theorem's assumptions.
    """

    comparisons: list[Comparison] = field(default_factory=list)
    weights: int = 0
    hypers: int = 0
    stationarity: float = 0.0
    status: SolveStatus = SolveStatus.CONVERGED

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(c.passed for c in self.comparisons)

    def __str__(self) -> str:
        """Return a line for each comparison."""
        head = (
            f"{self.weights:,} weights, {self.hypers:,} hyperparameters, float64; inner problem "
            f"re-solved to a gradient norm of {self.stationarity:.1e}"
        )
        lines = [
            f"  {'ok  ' if c.passed else 'FAIL'} {c.name}: relative error {c.error:.1e} "
            f"(at most {c.tolerance:.0e}){'; ' + c.note if c.note else ''}"
            for c in self.comparisons
        ]
        if self.status is not SolveStatus.CONVERGED:
            lines.append(f"  note: {self.status.advice}")
        return "\n".join([head, *lines])
