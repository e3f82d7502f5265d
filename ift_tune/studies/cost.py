"""The cost study: time and peak memory of joint tuning against plain training.

Lorraine, Vicol, Duvenaud 2020 say of implicit differentiation that it is "only a few times more
costly in memory and compute than standard training"; here over the inner steps T, the terms K of
the inverse, and the numbers P of weights and H of hyperparameters.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
import torch

from ift_tune.base.errors import require_integer
from ift_tune.implicit.double_backward import safe_kernels
from ift_tune.implicit.hypergradient import unrolled_hypergradient
from ift_tune.implicit.vectors import count
from ift_tune.joint.config import NEVER_ANEW, MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import to_device
from ift_tune.problem.loaders import once_through
from ift_tune.problem.losses import Functional
from ift_tune.problem.modes import preserved_buffers
from ift_tune.problem.problem import BilevelProblem
from ift_tune.studies.findings import SIZE, judge_costs
from ift_tune.studies.methods import least_steps
from ift_tune.studies.writing import Study
from ift_tune.testing.price import measured_peak, timed
from ift_tune.testing.problems import sized_problem

INNER_STEPS = (1, 2, 5, 10, 20, 50, 100, 200)
TERMS = (0, 1, 2, 5, 10, 20, 50)
WIDTHS = (8, 32, 128, 512)
MOST_UNROLLED = 20  # steps beyond which unrolling is not tried: each keeps its whole graph


@dataclass(frozen=True)
class CostRow:
    """One point: T inner steps alone, and the same with an outer step.

    Bytes are the peak of what tensors take at one time, the data left out: the weights, the
    optimisers' states, gradients, graphs; for joint tuning also λ.

    Attributes:
        sweep: What is varied: ``"inner_steps"``, ``"terms"`` or ``"size"``.
        value: Of what is varied; for sizes the width.
        per: For sizes, what has a decay of its own: ``"model"`` or ``"weight"``.
        weights: P.
        hypers: H.
        inner_steps: T.
        terms: K, or what stands for it; None where the inverse has nothing of the kind.
        inner_batch: Examples an inner step looks at.
        outer_batch: Training examples an outer step looks at.
        plain_seconds: T inner steps, median.
        joint_seconds: T inner steps and an outer step, median.
        time_ratio: Median of the ratios of neighbouring timings.
        plain_bytes: Peak of plain training.
        joint_bytes: Peak of joint tuning.
        memory_ratio: Their ratio.
        unrolled_bytes: Peak of differentiating through T steps; NaN where it was not tried.
    """

    sweep: str
    value: int
    per: str
    weights: int
    hypers: int
    inner_steps: int
    terms: int | None
    inner_batch: float
    outer_batch: float
    plain_seconds: float
    joint_seconds: float
    time_ratio: float
    plain_bytes: int
    joint_bytes: int
    memory_ratio: float
    unrolled_bytes: float


def study_costs(
    problem: BilevelProblem,
    config: MetaConfig,
    *,
    task: str = "",
    inner_steps: Sequence[int] = INNER_STEPS,
    terms: Sequence[int] = TERMS,
    widths: Sequence[int] = WIDTHS,
    most_unrolled: int = MOST_UNROLLED,
    repeats: int = 5,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Measure a problem over T and K, and nets of several sizes over P and H.

    Args:
        problem: Its weights and λ are put back after each point.
        config: Where T and K are not varied they are this one's, which is measured as well.
        task: Its name, for the title.
        inner_steps: Values of T.
        terms: Values of K (of steps or columns for the other inverses).
        widths: Of the nets of the size sweep; none leaves it out.
        most_unrolled: The largest T at which the memory of unrolling is measured too.
        repeats: Timings of each, plain and joint by turns, at least 1.
        on_progress: Called with a line as the study goes on.

    Returns:
        A table ``cost`` (a row a point, see `CostRow`), with findings.

    Raises:
        UsageError: If a number is out of range.

    Example:
        >>> from ift_tune import MetaConfig, testing
        >>> from ift_tune.studies.cost import study_costs
        >>> few = {"inner_steps": [1, 2], "terms": [1], "widths": [], "repeats": 1}
        >>> study = study_costs(testing.Quadratic(seed=0), MetaConfig(inner_steps=2), **few)
        >>> study.tables["cost"][["sweep", "inner_steps"]].values.tolist()[:2]
        [['inner_steps', 1], ['inner_steps', 2]]
    """
    require_integer("repeats", repeats, 1)
    require_integer("most_unrolled", most_unrolled, 0)
    for name, values, least in (("inner_steps", inner_steps, 1), ("terms", terms, 0)):
        for value in values:
            require_integer(name, value, least)
    for width in widths:
        require_integer("widths", width, 1)
    measure = _Measure(problem, config, repeats, on_progress)
    rows = [
        measure.point("inner_steps", t, {"inner_steps": t}, unrolled=t <= most_unrolled)
        for t in sorted({*inner_steps, config.inner_steps})
    ]
    key = config.inverse.steps_field
    if key is not None:
        own = int(getattr(config.inverse, key))
        least = least_steps(type(config.inverse))
        wanted = sorted({*terms, own})
        rows += [measure.point("terms", k, {key: k}) for k in wanted if k >= least]
    device = measure.device
    pers: tuple[Literal["model", "weight"], ...] = ("model", "weight")
    for width in widths:
        for per in pers:
            sized = _Measure(sized_problem(width, per, device), config, repeats, on_progress)
            rows.append(sized.point(SIZE, width, {}, per=per))
    table = pd.DataFrame([asdict(row) for row in rows])
    table["terms"] = table["terms"].astype("Int64")
    findings = judge_costs(table, config.inner_steps)
    return Study(f"{task or 'problem'}: cost of joint tuning", _ABOUT, {"cost": table}, findings)


class _Measure:
    """Measures points of one problem."""

    def __init__(
        self,
        problem: BilevelProblem,
        config: MetaConfig,
        repeats: int,
        on_progress: Callable[[str], None],
    ) -> None:
        # What is timed is a step, and not the making of other weights.
        self.problem, self.config = problem, config.updated(NEVER_ANEW)
        self.repeats, self.on_progress = repeats, on_progress
        self.device = problem.weights()[0].device
        self._start = copy.deepcopy([problem.model.state_dict(), problem.hyper.state_dict()])

    def point(
        self,
        sweep: str,
        value: int,
        changes: dict[str, int],
        *,
        per: str = "",
        unrolled: bool = False,
    ) -> CostRow:
        """Measure one point."""
        config = self.config.updated(changes)
        # The weights and λ are there before the meter begins, which counts what is made inside.
        held = sum(w.nbytes for w in self.problem.weights())
        steps = config.inner_steps
        # Twice, for in the second the optimisers' states and the warm start are there already.
        plain = held + self._peak(config, lambda joint: joint.train_weights(2 * steps))
        held += sum(h.nbytes for h in self.problem.hypers())
        tuned = held + self._peak(config, lambda joint: (joint.step(), joint.step()))
        through = held + self._unrolled_peak(steps, config.inner_lr) if unrolled else math.nan
        plain_times, joint_times = self._times(config)
        key = config.inverse.steps_field
        row = CostRow(
            sweep=sweep,
            value=value,
            per=per,
            weights=count(self.problem.weights()),
            hypers=count(self.problem.hypers()),
            inner_steps=steps,
            terms=None if key is None else int(getattr(config.inverse, key)),
            inner_batch=_examples(self.problem, "train"),
            outer_batch=_examples(self.problem, "curvature"),
            plain_seconds=statistics.median(plain_times),
            joint_seconds=statistics.median(joint_times),
            time_ratio=statistics.median(
                j / p for j, p in zip(joint_times, plain_times, strict=True)
            ),
            plain_bytes=plain,
            joint_bytes=tuned,
            memory_ratio=tuned / plain,
            unrolled_bytes=through,
        )
        self.on_progress(
            f"{sweep} {value}{per and ' ' + per}: time {row.time_ratio:.2f} times plain, "
            f"memory {row.memory_ratio:.2f} times"
        )
        return row

    def _peak(self, config: MetaConfig, action: Callable[[JointOptimizer], object]) -> int:
        """Return the peak of two outer steps' worth, the making of the optimisers' states in it."""
        self._back()
        with measured_peak(self.device) as peak:
            action(JointOptimizer(self.problem, config))
        self._forget()
        return peak.bytes

    def _times(self, config: MetaConfig) -> tuple[list[float], list[float]]:
        """Time both by turns, so that whatever slows the machine slows both."""
        self._back()
        joint = JointOptimizer(self.problem, config)
        plain_times, joint_times = [], []
        for repeat in range(self.repeats + 1):
            _, plain = timed(lambda: joint.train_weights(config.inner_steps), self.device)
            _, tuned = timed(joint.step, self.device)
            if repeat:  # the first warms up: allocations, and the optimisers' states
                plain_times.append(plain)
                joint_times.append(tuned)
        self._forget()
        return plain_times, joint_times

    def _unrolled_peak(self, steps: int, lr: float) -> float:
        """Return the peak of differentiating through gradient descent; NaN if memory is short."""
        self._back()
        functional = Functional(self.problem)
        splits = self.problem.splits
        train = to_device(next(iter(splits.curvature or splits.train)), self.device)
        val = to_device(next(iter(splits.val)), self.device)
        try:
            with (
                measured_peak(self.device) as peak,
                preserved_buffers(self.problem.model),
                safe_kernels(self.problem.model),
            ):
                unrolled_hypergradient(
                    lambda w: functional.train_loss(w, train),
                    lambda w: functional.val_loss(w, val, train),
                    self.problem.weights(),
                    self.problem.hyper,
                    steps=steps,
                    lr=lr,
                )
        except torch.OutOfMemoryError:
            return math.nan
        return peak.bytes

    def _back(self) -> None:
        self.problem.model.load_state_dict(self._start[0])
        self.problem.hyper.load_state_dict(self._start[1])

    def _forget(self) -> None:
        for weight in self.problem.weights():
            weight.grad = None


def _examples(problem: BilevelProblem, split: str) -> float:
    loader = getattr(problem.splits, split) or problem.splits.train
    return problem.batch_size(next(once_through(loader)))


_ABOUT = """\
Plain training (T inner steps, λ frozen) against joint tuning (the same and one outer step).

Time: medians, plain and joint by turns. Memory: the peak of the bytes that tensors take at one
time, data left out, over two outer steps' worth; on a GPU by PyTorch's allocator, on the CPU by
following each tensor from its making to its end (the process's peak would hold the interpreter, and
what freed memory the system left it). Unrolling is gradient descent of T steps with its graph kept,
on the batch of the outer step."""
