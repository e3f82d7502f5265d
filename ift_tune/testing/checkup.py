"""What ``ift-tune check`` says of a problem: modes, second derivatives, price, exact comparisons.

What takes seconds on any net comes first, and each finding is said as soon as it is there. The
exact comparisons need the dense Hessian of an inner problem that is solved to its last digit, many
times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ift_tune.base.errors import CheckFailedError, StartCheckError, UsageError
from ift_tune.implicit.vectors import count
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.start_check import StartCheck
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.check import MAX_WEIGHTS, CheckReport, check_hypergradient
from ift_tune.testing.price import Price, measure_price, measured_peak

PATIENCE = 10.0  # seconds of exact comparisons that nobody has asked for
_DENSE = 50  # dense Hessians of the exact comparisons, about: Newton steps of seven solutions
_DOUBLE = 2.0  # how much dearer float64 is


@dataclass(frozen=True)
class Checkup:
    """What was found; nothing that is wrong, or it would have raised.

    Attributes:
        modes: What of the model has modes or is frozen, in words.
        start: What the check at the start of a run says; None where it is set off.
        price: Of inner and outer steps.
        peak_bytes: The most that the tensors of an outer step take at one time.
        exact: The exact comparisons; None where they were left out.
        left_out: Why they were; empty where they were made.
    """

    modes: list[str]
    start: StartCheck | None
    price: Price
    peak_bytes: int
    exact: CheckReport | None
    left_out: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        found = asdict(self)
        if self.exact is not None:
            found["exact"]["status"] = self.exact.status.value
            found["exact"]["passed"] = self.exact.passed
        return found


def examine(
    make_problem: Callable[[], BilevelProblem],
    config: MetaConfig,
    *,
    exact: bool | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Checkup:
    """Check a problem, the quick things first.

    Args:
        make_problem: Builds it anew; it is trained for a few steps.
        config: Of its outer step.
        exact: Whether to make the exact comparisons. Default: where they take seconds and mean
            something, which is without kinks.
        seed: Of random numbers and directions.
        say: Is given each finding, in words, as soon as it is there.

    Returns:
        All findings.

    Raises:
        CheckFailedError: If a derivative is wrong, or a loss differs on repetition.
        DoubleBackwardError: If an operation has no second derivative; it is named.
        UsageError: If the problem is incomplete, or too large for exact comparisons asked for.

    Example:
        >>> import ift_tune
        >>> from ift_tune.testing.checkup import examine
        >>> config, lines = ift_tune.MetaConfig(), []
        >>> found = examine(ift_tune.testing.Quadratic, config, say=lines.append)
        >>> found.start.status, found.exact.passed, found.left_out
        ('passed', True, '')
    """
    problem = make_problem()
    problem.validate()
    weights = count(problem.weights())
    say(f"{weights:,} weights, {count(problem.hypers()):,} hyperparameters")
    if exact and weights > MAX_WEIGHTS:
        raise UsageError(
            "exact comparisons need the dense inverse of the Hessian: check the same problem with "
            f"a smaller model (at most {MAX_WEIGHTS:,} weights) or without --exact, got {weights:,}"
        )
    joint = JointOptimizer(problem, config.updated({"inner_steps": 1}), seed=seed)
    modes = describe_modes(problem.model)  # those that it trains in
    for line in modes:
        say(f"  {line}")
    try:
        joint.step()
    except StartCheckError as error:
        raise CheckFailedError(str(error)) from error
    start = joint.start_check
    say(f"  {_words(start)}")
    with measured_peak(joint.device) as peak:
        joint.step()
    price = measure_price(joint, config)
    say(f"  {price}, {peak.bytes / 2**20:,.1f} MiB for the tensors of the outer step")
    left_out = "" if exact else _reason(start, price, weights)
    if exact is False:
        left_out = "as asked for"
    report = None
    if not left_out:
        say("  exact comparisons, in float64 and evaluation mode:")
        try:
            report = check_hypergradient(make_problem(), seed=seed)
            say(f"  {str(report).replace(chr(10), chr(10) + '  ')}")
        except UsageError as error:
            if exact:
                raise
            left_out = str(error)
    if left_out:
        say(f"  exact comparisons left out: {left_out}")
    return Checkup(modes, start, price, peak.bytes, report, left_out)


def describe_modes(model: nn.Module) -> list[str]:
    """Return in words what training and evaluation mode mean to a model, and what is frozen."""
    modules = dict(model.named_modules())
    dropout = [n for n, m in modules.items() if isinstance(m, _DropoutNd) and m.p > 0.0]
    norms = [n for n, m in modules.items() if isinstance(m, _BatchNorm)]
    still = [n for n, m in modules.items() if not m.training]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    lines = []
    if dropout:
        lines.append(f"dropout in {_some(dropout)}: in the training loss, one mask an outer step")
    if norms:
        lines.append(f"BatchNorm in {_some(norms)}: an outer step leaves its statistics alone")
    if still:
        lines.append(f"in evaluation mode also in training: {_some(still)}")
    if frozen:
        lines.append(f"frozen, so no weights: {_some(frozen)}")
    return lines


def _some(names: list[str]) -> str:
    shown = ", ".join(name or "the model" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _words(start: StartCheck | None) -> str:
    """Return what the check at the start says."""
    if start is None:
        return "start_check is off: second derivatives were not looked at"
    rough = "; roughly, for low precision inside the loss" if start.status == "coarse" else ""
    return (
        "ok   losses repeat, and second derivatives are those of the gradient: largest difference "
        f"{100 * start.error:.1f} %{rough} (at the price of {start.gradients:.1f} gradients)"
    )


def _reason(start: StartCheck | None, price: Price, weights: int) -> str:
    """Return why exact comparisons should be left out if nobody asks for them; or nothing."""
    if weights > MAX_WEIGHTS:
        return f"they need the dense Hessian, of at most {MAX_WEIGHTS:,} weights"
    if start is not None and start.kinks:
        return (
            "the net has kinks (as of ReLU or maxima), where its re-solved inner problem has no "
            "derivative to compare with; --exact makes them anyway"
        )
    seconds = _DENSE * _DOUBLE * weights * price.product
    if seconds > PATIENCE:
        return f"they would take about {_duration(seconds)}; --exact makes them"
    return ""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"
