"""What ``ift-tune check`` says of a problem: derivatives, price, symptoms, exact comparisons.

What takes seconds on any net comes first, and each finding is said as soon as it is there. The
exact comparisons need the dense Hessian of an inner problem that is solved to its last digit, many
times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ift_tune.base.arguments import require_seed
from ift_tune.base.errors import CheckFailedError, UsageError
from ift_tune.base.once import saying_once
from ift_tune.implicit.vectors import count
from ift_tune.joint.budget import Budget
from ift_tune.joint.config import NEVER_ANEW, MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.joint.start_check import StartCheck
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.check import MAX_WEIGHTS, CheckReport, check_hypergradient
from ift_tune.testing.examination import Examination
from ift_tune.testing.operations import listed
from ift_tune.testing.plan import Plan, duration, make_plan
from ift_tune.testing.price import Price
from ift_tune.testing.symptoms import Finding, Level

PATIENCE = 10.0  # seconds of one measurement, or of exact comparisons, that nobody has asked for
_DENSE = 50  # dense Hessians of the exact comparisons, about: Newton steps of seven solutions
_DOUBLE = 2.0  # how much dearer float64 is


@dataclass(frozen=True)
class Study:
    """A study to be planned.

    Attributes:
        budget: Of each trial.
        trials: How many.
        workers: Processes side by side.
    """

    budget: Budget
    trials: int = 1
    workers: int = 1


@dataclass(frozen=True)
class Checkup:
    """What was found; nothing that is wrong, or it would have raised.

    Attributes:
        findings: All that was looked at, in order; `Finding.level` says what each asks for.
        modes: What of the model has modes or is frozen, in words.
        start: What the check at the start of a run says; None where it is set off.
        price: Of inner and outer steps.
        peak_bytes: The most that the tensors of an outer step take at one time.
        exact: The exact comparisons; None where they were left out.
        left_out: Why they were; empty where they were made.
        plan: Of a study, where one was asked for.
    """

    findings: list[Finding]
    modes: list[str]
    start: StartCheck | None
    price: Price
    peak_bytes: int
    exact: CheckReport | None
    left_out: str
    plan: Plan | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        found = {
            **{name: getattr(self, name) for name in ("modes", "peak_bytes", "left_out")},
            "passed": True,
            "findings": [finding.as_dict() for finding in self.findings],
            "start": None if self.start is None else asdict(self.start),
            "price": asdict(self.price),
            "exact": None if self.exact is None else asdict(self.exact),
            "plan": None if self.plan is None else self.plan.as_dict(),
        }
        if self.exact is not None:
            found["exact"]["status"] = self.exact.status.value
            found["exact"]["passed"] = self.exact.passed
        return found


@saying_once()
def examine(
    make_problem: Callable[[], BilevelProblem],
    config: MetaConfig,
    *,
    exact: bool | None = None,
    thorough: bool = False,
    plan: Study | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
    found: Callable[[Finding], None] = lambda finding: None,
) -> Checkup:
    """Check a problem, the quick things first.

    Args:
        make_problem: Builds it anew; it is trained for a few steps.
        config: Of its outer step.
        exact: Whether to make the exact comparisons. Default: where they take seconds and mean
            something, which is without kinks.
        thorough: Whether to measure what would take long too.
        plan: A study to be planned.
        seed: Of random numbers and directions.
        say: Is given each finding, in words, as soon as it is there; not what is raised.
        found: Is given each finding itself, what is wrong and raised included.

    Returns:
        All findings.

    Raises:
        CheckFailedError: If a derivative is wrong or lacking, a loss differs on repetition, or a
            hyperparameter does not reach it; the findings so far have been told.
        UsageError: If the problem is incomplete, or too large for exact comparisons asked for.

    Example:
        >>> import ift_tune
        >>> from ift_tune.testing.checkup import examine
        >>> config, lines = ift_tune.MetaConfig(), []
        >>> checkup = examine(ift_tune.testing.Quadratic, config, say=lines.append)
        >>> checkup.start.status, checkup.exact.passed, checkup.left_out
        ('passed', True, '')
        >>> [f.topic for f in checkup.findings if f.level == "advice"]
        ['convergence']
    """
    seed, findings = require_seed(seed), list[Finding]()

    def tell(finding: Finding) -> None:
        findings.append(finding)
        found(finding)
        if finding.level is not Level.WRONG:  # that is raised, and said there
            say(f"  {finding}")

    try:
        problem = make_problem()
        problem.validate()
        sizes = count(problem.weights()), count(problem.hypers())
    except UsageError as error:
        tell(Finding("problem", Level.WRONG, str(error)))
        raise
    weights, hypers = sizes
    say(f"{weights:,} weights, {hypers:,} hyperparameters")
    if exact and weights > MAX_WEIGHTS:
        raise UsageError(
            "exact comparisons need the dense inverse of the Hessian: check the same problem with "
            f"a smaller model (at most {MAX_WEIGHTS:,} weights) or without --exact, got {weights:,}"
        )
    joint = JointOptimizer(problem, config.updated({"inner_steps": 1} | NEVER_ANEW), seed=seed)
    modes = describe_modes(problem.model)  # those that it trains in
    for line in modes:
        tell(Finding("modes", Level.NOTE, line))
    examination = Examination(joint, config, tell, patience=math.inf if thorough else PATIENCE)
    start = examination.start()
    price, peak = examination.price()
    tell(
        Finding(
            "price",
            Level.NOTE,
            f"{price}, {peak / 2**20:,.1f} MiB for the tensors of the outer step",
            {"inner_step": price.inner_step, "outer_step": price.outer_step, "bytes": peak},
        )
    )
    examination.symptoms(price)
    planned = None
    if plan is not None:
        planned = make_plan(
            joint, config, plan.budget, price, peak, trials=plan.trials, workers=plan.workers
        )
        tell(Finding("plan", Level.NOTE, str(planned)))
    left_out = "" if exact else _reason(start, price, weights)
    if not exact and config.products == "difference":
        left_out = "they need second derivatives, and products are differences; --exact makes them"
    if exact is False:
        left_out = "as asked for"
    report = None
    if not left_out:
        say("  exact comparisons, in float64 and evaluation mode:")
        try:
            report = check_hypergradient(make_problem(), seed=seed)
            say(f"  {str(report).replace(chr(10), chr(10) + '  ')}")
        except CheckFailedError as error:
            found(Finding("exact", Level.WRONG, str(error)))
            raise
        except UsageError as error:
            if exact:
                raise
            left_out = str(error)
    if left_out:
        say(f"  exact comparisons left out: {left_out}")
    return Checkup(findings, modes, start, price, peak, report, left_out, planned)


def describe_modes(model: nn.Module) -> list[str]:
    """Return in words what training and evaluation mode mean to a model, and what is frozen."""
    modules = dict(model.named_modules())
    dropout = [n for n, m in modules.items() if isinstance(m, _DropoutNd) and m.p > 0.0]
    norms = [n for n, m in modules.items() if isinstance(m, _BatchNorm)]
    still = [n for n, m in modules.items() if not m.training]
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    lines = []
    if dropout:
        lines.append(f"dropout in {listed(dropout)}: in the training loss, one mask an outer step")
    if norms:
        lines.append(f"BatchNorm in {listed(norms)}: an outer step leaves its statistics alone")
    if still:
        lines.append(f"in evaluation mode also in training: {listed(still)}")
    if frozen:
        lines.append(f"frozen, so no weights: {listed(frozen)}")
    return lines


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
        return f"they would take about {duration(seconds)}; --exact makes them"
    return ""
