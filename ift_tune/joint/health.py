"""What an outer step has measured: read from the device at once, and its health columns."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import Begun, Hypergradient
from ift_tune.implicit.reading import Later, read
from ift_tune.implicit.signal import Signal, kinds_of
from ift_tune.implicit.vectors import named, norm
from ift_tune.joint.inner_loop import InnerLoop
from ift_tune.joint.outer_loop import OuterLoop


@dataclass
class OuterNumbers:
    """All numbers of an outer step.

    Attributes:
        result: The hypergradient.
        losses: On both batches; the training loss is without the closed-form penalty.
        metrics: The others of both batches.
        norms: Of the last inner step.
        length: The norm of the hypergradient.
        agreement: Its cosine with the optimiser's mean of the earlier ones, where there is one.
        first_loss: Of fresh weights before their first step; None where they are older.
        signal: The hypergradient's over its noise, where it was measured.
        signal_parts: The solves that this took.
        signal_products: Their products.
    """

    result: Hypergradient
    losses: dict[str, float]
    metrics: dict[str, float]
    norms: dict[str, float]
    length: float
    agreement: float | None
    first_loss: float | None
    signal: Signal | None
    signal_parts: int = 0
    signal_products: int = 0

    def measure(self, outer: OuterLoop) -> None:
        """Measure the hypergradient again, after somebody has changed it."""
        gradients = self.result.grads
        self.length, self.agreement = read(*_measured(gradients, norm(gradients), outer))

    def columns(self) -> dict[str, float]:
        """Return the health columns of the hypergradient; what is not known is left out."""
        status, stats = self.result.status, self.result.stats
        found = {
            "negative_curvature": float(status is SolveStatus.NEGATIVE_CURVATURE),
            "hypergradient_norm": self.length,
            "skipped": float(not self.result.usable),
        }
        if stats.relative_residual is not None:
            found["relative_residual"] = stats.relative_residual
        if stats.alpha is not None and stats.largest_eigenvalue is not None:
            found["alpha_lambda_max"] = stats.alpha * stats.largest_eigenvalue
        return {key: value for key, value in found.items() if math.isfinite(value)}


def read_numbers(
    begun: Begun, metrics: Later[dict[str, float]], inner: InnerLoop, outer: OuterLoop
) -> OuterNumbers:
    """Wait for the device, here and nowhere else in an outer step.

    Args:
        begun: The hypergradient.
        metrics: Of its batches.
        inner: After the inner steps.
        outer: Before the step of λ.
    """
    numbers = OuterNumbers(
        *read(
            begun.result,
            _by_name({"train_loss": begun.train_loss, "val_loss": begun.val_loss}),
            metrics,
            _by_name(inner.norms),
            *_measured(begun.grads, begun.length, outer),
            Later.known(None) if inner.first_loss is None else _number(inner.first_loss),
            Later.known(None) if begun.signal is None else begun.signal.signal,
        )
    )
    if begun.signal is not None:
        numbers.signal_parts = begun.signal.parts
        numbers.signal_products = begun.signal.products
    return numbers


def signal_columns(signal: Signal, hyper: nn.Module) -> dict[str, float]:
    """Return the columns of a signal: of all of λ, and of each kind where it has several.

    Args:
        signal: Of a hypergradient.
        hyper: λ.
    """
    name = "hypergradient_signal"
    groups: dict[str, Collection[int]] = {name: range(len(signal.lengths))}
    kinds = getattr(hyper, "kinds", None)
    if isinstance(kinds, nn.ModuleDict):
        names = list(named(hyper, "the hyperparameter module"))
        places = kinds_of(names, [f"kinds.{kind}" for kind in kinds])
        groups |= {f"{name}.{k.removeprefix('kinds.')}": p for k, p in places.items()}
    return signal.ratios(groups)


def _measured(
    gradients: list[Tensor], length: Tensor, outer: OuterLoop
) -> tuple[Later[float], Later[float | None]]:
    """Return the norm of a hypergradient, and its agreement with the earlier ones."""
    return _number(length), outer.agreement(gradients, length)


def _number(tensor: Tensor) -> Later[float]:
    return Later([tensor], lambda numbers: numbers[0])


def _by_name(tensors: Mapping[str, Tensor]) -> Later[dict[str, float]]:
    names = list(tensors)
    return Later(list(tensors.values()), lambda numbers: dict(zip(names, numbers, strict=True)))
