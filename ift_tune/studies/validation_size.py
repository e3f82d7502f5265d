"""How large a validation set: one decay against a decay for every weight.

Lorraine, Vicol, Duvenaud 2020 fix the number of points and vary how many of them validate. With one
hyperparameter few are best; with many, which learn from them, more; retrained afterwards on all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.randomness import RandomStream
from ift_tune.hyper import WeightDecay
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.implicit.inverse import Neumann
from ift_tune.joint.config import MetaConfig
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import Batches
from ift_tune.problem.problem import Splits
from ift_tune.studies.findings import EACH, NONE, ONE, judge_fractions
from ift_tune.studies.writing import Study
from ift_tune.tasks.building import permutation
from ift_tune.tasks.datasets import load

TOTALS = (100, 200, 800)
FRACTIONS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
CONFIG = MetaConfig(inverse=Neumann(terms=10), meta_lr=0.1, inner_steps=5, inner_lr=3e-2)
_INITIAL_DECAY = 1e-3


@dataclass(frozen=True)
class ValidationRow:
    """One training with its tuning.

    Attributes:
        seed: Of the points and the initial weights.
        total: Points for training and validation together.
        fraction: Of them, for validation.
        val: Their number.
        tuned: ``"none"``, ``"one"`` decay or ``"each"`` weight's own.
        tuned_test_error: At the end of the tuning, not retrained.
        retrained_train_test_error: Retrained from scratch on the training points, λ frozen.
        retrained_all_test_error: Retrained on all points, λ frozen.
        mean_decay: What was learned.
    """

    seed: int
    total: int
    fraction: float
    val: int
    tuned: str
    tuned_test_error: float
    retrained_train_test_error: float
    retrained_all_test_error: float
    mean_decay: float


@dataclass(frozen=True)
class Pool:
    """The points of one seed; inputs have shape (N, pixels).

    Attributes:
        points: For training and validation.
        test: The rest of the digits, whatever the number of points.
    """

    points: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def study_validation_sizes(
    *,
    totals: Sequence[int] = TOTALS,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 6,
    first_seed: int = 0,
    config: MetaConfig = CONFIG,
    outer_steps: int = 100,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Study:
    """Tune softmax regression on the embedded 8×8 digits at every size of the validation set.

    Args:
        totals: Numbers of points for training and validation together.
        fractions: Of them, for validation; between 0 and 1.
        seeds: How many, at least 1.
        first_seed: The first of them.
        config: Of the tuning; a retraining takes as many inner steps as the tuning had.
        outer_steps: Of the tuning.
        on_progress: Called with a line as the study goes on.

    Returns:
        Tables ``validation`` (a row a training) and ``means`` (over seeds), with findings.

    Raises:
        UsageError: If a size does not leave points to train, to validate and to test on.

    Example:
        >>> from ift_tune.studies.validation_size import study_validation_sizes
        >>> few = {"totals": [40], "fractions": [0.25], "seeds": 1, "outer_steps": 2}
        >>> study = study_validation_sizes(**few)
        >>> study.tables["validation"][["val", "tuned"]].values.tolist()
        [[10, 'none'], [10, 'one'], [10, 'each']]
    """
    _check(totals, fractions, seeds)
    require_integer("outer_steps", outer_steps, 1)
    rows: list[ValidationRow] = []
    for seed in range(first_seed, first_seed + seeds):
        pool = digits_pool(max(totals), seed)
        for total in totals:
            for fraction in fractions:
                for tuned in (NONE, ONE, EACH):
                    trial = _Trial(pool, total, fraction, tuned, seed, config, outer_steps)
                    rows.append(trial.run())
        on_progress(f"seed {seed} done")
    table = pd.DataFrame([asdict(row) for row in rows])
    errors = [field.name for field in fields(ValidationRow) if field.name.endswith("error")]
    means = (
        table.groupby(["total", "tuned", "fraction", "val"], sort=False)[errors]
        .agg(["mean", "std"])
        .reset_index()
    )
    means.columns = ["_".join(filter(None, name)) for name in means.columns]
    tables = {"validation": table, "means": means}
    return Study("How large a validation set", _ABOUT, tables, judge_fractions(table))


def digits_pool(most: int, seed: int) -> Pool:
    """Return the digits in a random order, the first `most` for training and validation."""
    inputs, targets = load("digits").train(slice(None))
    inputs = (inputs.flatten(1) + 1.0) / 2.0  # dark pixels at 0: far better conditioned
    order = permutation(len(targets), seed)
    points, test = order[:most], order[most:]
    if len(test) == 0:
        raise UsageError(f"{most} points leave none of the {len(targets)} digits for the test")
    return Pool((inputs[points], targets[points]), (inputs[test], targets[test]))


def validation_points(total: int, fraction: float) -> int:
    """Return how many of `total` points validate: the nearest number, at least 1 on each side."""
    return min(max(round(fraction * total), 1), total - 1)


class _Trial:
    """One tuning with its retrainings."""

    def __init__(
        self,
        pool: Pool,
        total: int,
        fraction: float,
        tuned: str,
        seed: int,
        config: MetaConfig,
        outer_steps: int,
    ) -> None:
        self.pool, self.total, self.fraction, self.tuned = pool, total, fraction, tuned
        self.seed, self.config, self.outer_steps = seed, config, outer_steps
        self.val = validation_points(total, fraction)

    def run(self) -> ValidationRow:
        """Tune, then retrain with λ frozen."""
        tuning = self._joint(self.total - self.val)
        for _ in range(self.outer_steps):
            if self.tuned == NONE:
                tuning.baseline_step()
            else:
                tuning.step()
        error = _test_error(tuning)
        # Without tuning, plain training on the training points is its own retraining.
        on_train = error if self.tuned == NONE else self._retrained(tuning, self.total - self.val)
        return ValidationRow(
            seed=self.seed,
            total=self.total,
            fraction=self.fraction,
            val=self.val,
            tuned=self.tuned,
            tuned_test_error=error,
            retrained_train_test_error=on_train,
            retrained_all_test_error=self._retrained(tuning, self.total),
            mean_decay=tuning.problem.summary()["mean"],
        )

    def _retrained(self, tuning: JointOptimizer, train: int) -> float:
        joint = self._joint(train)
        joint.problem.hyper.load_state_dict(tuning.problem.hyper.state_dict())
        joint.train_weights(self.outer_steps * self.config.inner_steps)
        return _test_error(joint)

    def _joint(self, train: int) -> JointOptimizer:
        """Return a beginning: the first `train` points train, the last of the total validate."""
        inputs, targets = self.pool.points
        with RandomStream(self.seed, torch.device("cpu")).aside():
            model = nn.Linear(inputs.shape[1], 10)
        per: Literal["model", "weight"] = "weight" if self.tuned == EACH else "model"
        hyper = WeightDecay(model, per, init=_INITIAL_DECAY, transform="exp")
        val = slice(self.total - self.val, self.total)
        validation, test = Batches(inputs[val], targets[val]), Batches(*self.pool.test)
        splits = Splits(Batches(inputs[:train], targets[:train]), validation, validation, test)
        problem = ClassificationProblem(model, hyper, splits)
        return JointOptimizer(problem, self.config, seed=self.seed)


def _test_error(joint: JointOptimizer) -> float:
    return joint.evaluate("test")["test_error"]


def _check(totals: Sequence[int], fractions: Sequence[float], seeds: int) -> None:
    if not totals or min(totals) < 2:
        raise UsageError(f"each total must be at least 2, got {list(totals)}")
    if not fractions or not all(0.0 < f < 1.0 for f in fractions):
        raise UsageError(f"fractions must be between 0 and 1, got {list(fractions)}")
    if seeds < 1:
        raise UsageError(f"seeds must be at least 1, got {seeds}")


_ABOUT = """\
Softmax regression on the embedded 8×8 digits (650 weights). A fixed number of points is divided
into training and validation; λ is tuned by implicit differentiation on the validation part (one
decay, or one for each weight), then frozen, and the weights are trained from scratch on all points.
`none` keeps the initial decay. The test set is the rest of the digits, the same for all sizes of a
seed.

Verdicts are paired t-tests over seeds at 5 % (two-sided; for the best fraction with Bonferroni's
correction, since both rivals are chosen by the data). The best of several fractions is always
flattered by its choice. Whether tuning pays depends on the initial decay, here 0.001."""
