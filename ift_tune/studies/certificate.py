"""Does the hypergradient of a finished run predict what retraining does?

Around the λ that a run has found the weights are trained afresh, in the same way and with the same
random numbers, at displaced λ: along the hypergradient and against it, along random directions, and
with groups of training examples left out where they have weights. What the loss of the search (and
the validation) split changes by is held against what the hypergradient says, and against what a
second training with other random numbers and another length says, which is retraining's own noise.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from ift_tune.base.errors import UsageError, require_integer
from ift_tune.base.randomness import RandomStream, derive_seed
from ift_tune.base.status import SolveStatus
from ift_tune.implicit.hypergradient import solve
from ift_tune.implicit.inverse import ConjugateGradient, Inverse, Neumann
from ift_tune.implicit.vectors import (
    add,
    flatten,
    mul,
)
from ift_tune.joint.joint import JointOptimizer
from ift_tune.problem.batches import to_device
from ift_tune.problem.factory import require_factory
from ift_tune.problem.loaders import once_through
from ift_tune.problem.losses import aligned_penalty
from ift_tune.problem.modes import evaluating
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.sizes import as_size
from ift_tune.studies.certificate_findings import Certificate, judge, metasmoothness
from ift_tune.studies.displacements import (
    SIZES,
    Change,
    Displacement,
    along_hypergradient,
    along_random_directions,
    left_out,
    nothing,
)
from ift_tune.testing.symptoms import batches_of, curvature_split, gradient_and_loss
from ift_tune.trial.best import find_best
from ift_tune.trial.refit import frozen_trial
from ift_tune.trial.trial import ProblemFactory

SPLITS = ("search", "val")
CONVERGED = 1e-3
"""Of the training loss: what the last fifth of a training that is long enough changes."""

_PAIRS = 8  # of batches, over which a hypergradient is averaged
_LONGER = 1.25  # a training that is repeated, for its noise
_NOT_POSITIVE = (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.SINGULAR)


class _Trained(NamedTuple):
    losses: dict[str, float]
    weights: Tensor


def certify(
    run_dir: str | os.PathLike[str],
    make_problem: ProblemFactory,
    *,
    directions: int = 8,
    groups: int = 12,
    longest: int = 4,
    products: int = 300,
    device: str | torch.device = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> Certificate:
    """Hold the hypergradient at the λ that a run has found against retraining.

    Args:
        run_dir: The run directory; nothing is written.
        make_problem: The factory that the run was made with.
        directions: Random directions, at least 3; each is gone both ways.
        groups: Groups of examples to leave out, where the problem has example weights.
        longest: How many times as many inner steps as the best trial took may be taken, to come
            near a minimum.
        products: Of a longer solve, by conjugate gradients, which tells what is the fault of the
            run's inverse; where the Hessian is not positive definite, by a Neumann series.
        device: Where.
        say: Is told what goes on.

    Returns:
        The measurements and the verdict.

    Raises:
        UsageError: If the run has kept no model, or an argument is out of range.

    Example:
        >>> from ift_tune import Budget, Float, MetaSpace, run_study, testing
        >>> from ift_tune.studies.certificate import certify
        >>> def problem(config, device, seed):
        ...     return testing.Quadratic(seed=seed)
        >>> space = MetaSpace({"inner_lr": Float(0.02, 0.05)})
        >>> budget = Budget(outer_steps=10)
        >>> result = run_study(problem, space, budget, n_trials=1, out="runs/mine", device="cpu")
        >>> found = certify("runs/mine", problem, directions=3, device="cpu")
        >>> found.relations["all"].rank.mean > 0.5
        True
    """
    require_factory(make_problem)
    for name, value, least in (
        ("directions", directions, 3),
        ("groups", groups, 0),
        ("longest", longest, 1),
        ("products", products, 1),
    ):
        require_integer(name, value, least)
    retraining = _Retraining(find_best(run_dir), make_problem, device)
    solver = ConjugateGradient(max_steps=products)
    with retraining.trained(retraining.steps) as joint:
        steps, gain = _long_enough(joint, retraining, longest)
        say(
            f"trained for {steps:,} inner steps; the last fifth changed the training loss by "
            f"{100 * gain:.2g} %"
        )
        problem, own = joint.problem, joint.config.inverse
        inverses = {"predicted": (own, own), "predicted_longer": (solver, Neumann(terms=products))}
        slopes = {
            name: {split: _hypergradient(joint, *pair, split) for split in SPLITS}
            for name, pair in inverses.items()
        }
        trials = [
            *along_hypergradient(slopes),
            *along_random_directions(slopes, directions),
            *left_out(problem, slopes, groups),
        ]
    retraining.steps = steps
    begun = time.perf_counter()
    base, again = retraining(nothing), retraining(nothing, again=True)
    each = (time.perf_counter() - begun) / 2.0
    number = sum((1 + (t.opposite is not None)) * (1 + t.repeated) for t in trials)
    say(
        f"{number} trainings at displaced λ, of {each:.1f} seconds each: {number * each:.0f} in all"
    )
    rows: list[dict[str, Any]] = []
    weights: dict[float, Tensor] = {0.0: base.weights}
    for number, trial in enumerate(trials):
        trained, changes = retraining.changes(trial, base)
        repeats = retraining.changes(trial, again, again=True)[1] if trial.repeated else {}
        if trial.kind == "gradient":
            weights[trial.size] = trained.weights
        rows += [
            {
                "number": number,
                "kind": trial.kind,
                "size": trial.size,
                "split": split,
                **{name: found[split] for name, found in trial.predicted.items()},
                "retrained": changes[split],
                "again": repeats.get(split, math.nan),
            }
            for split in SPLITS
        ]
    smooth = metasmoothness(weights[0.0], weights[SIZES[-2]], weights[SIZES[-1]])
    return judge(
        pd.DataFrame(rows),
        {
            "inner_steps": steps,
            "gain": gain,
            "metasmoothness": smooth,
            **{f"{split}_loss": base.losses[split] for split in SPLITS},
        },
    )


class _Retraining:
    """Trains afresh at any λ, each time in the same way.

    Attributes:
        steps: Inner steps of a training.
    """

    def __init__(
        self, kept: Mapping[str, Any], make_problem: ProblemFactory, device: str | torch.device
    ) -> None:
        self._kept, self._make_problem, self._device = kept, make_problem, device
        if "inner_steps" not in kept:
            raise UsageError(
                "a certificate is of a run directory whose best trial is known: name the --out of "
                "a run or a search, got a single checkpoint"
            )
        self.steps = int(kept["inner_steps"])

    @contextmanager
    def trained(
        self, steps: int, change: Change = nothing, *, again: bool = False
    ) -> Iterator[JointOptimizer]:
        """Train for `steps` inner steps with λ frozen at what `change` makes of it."""
        trial = frozen_trial(
            self._kept,
            self._make_problem,
            hyper=self._kept["hyper"],
            train_on_val=False,
            device=self._device,
        )
        trial.setup()
        joint = trial.joint
        with torch.no_grad():
            change(joint.problem)
        if again:  # other masks; a walk over the same batches ends elsewhere, being longer
            joint.close()
            seed = derive_seed(self._kept["seed"], "again")
            joint = JointOptimizer(joint.problem, joint.config, seed=seed)
            steps = math.ceil(_LONGER * steps)
        joint.total_steps = steps
        with closing(joint):
            joint.train_weights(steps)
            yield joint

    def __call__(self, change: Change, *, again: bool = False) -> _Trained:
        """Return what a training at a displaced λ comes to."""
        with self.trained(self.steps, change, again=again) as joint:
            problem = joint.problem
            losses = {split: _loss(problem, split) for split in SPLITS}
            return _Trained(losses, flatten([w.detach() for w in problem.weights()]).cpu())

    def changes(
        self, trial: Displacement, base: _Trained, *, again: bool = False
    ) -> tuple[_Trained, dict[str, float]]:
        """Return a training at a displaced λ, and what it has changed of each loss."""
        trained = self(trial.change, again=again)
        if trial.opposite is None:
            return trained, {s: trained.losses[s] - base.losses[s] for s in SPLITS}
        other = self(trial.opposite, again=again)
        return trained, {s: (trained.losses[s] - other.losses[s]) / 2.0 for s in SPLITS}


def _long_enough(joint: JointOptimizer, retraining: _Retraining, longest: int) -> tuple[int, float]:
    """Train on until little changes, and return the steps taken and what the last fifth changed.

    In doublings, and up to `longest` times the steps of the best trial. A schedule that ends is
    left at its end: whether that was long enough shows in a training that is repeated, longer.
    """
    gain, times = 0.0, 1
    while joint.config.inner_schedule == "constant":
        before = _objective(joint.problem)
        joint.train_weights(math.ceil((_LONGER - 1.0) * joint.inner_steps))
        gain = abs(before - _objective(joint.problem)) / max(abs(before), 1e-12)
        if gain <= CONVERGED or 2 * times > longest:
            break
        times *= 2
        joint.train_weights(times * retraining.steps - joint.inner_steps)
    return joint.inner_steps, gain


def _objective(problem: BilevelProblem) -> float:
    """Return what training minimises, over some batches."""
    _, loss = gradient_and_loss(problem)
    penalty = aligned_penalty(problem)
    return loss if penalty is None else loss + float(penalty.value(problem.weights()).detach())


def _loss(problem: BilevelProblem, split: str) -> float:
    """Return the mean validation loss over a split, as λ is judged by it."""
    device = problem.weights()[0].device
    total = examples = 0.0
    with RandomStream(0, device).aside(), evaluating(problem.model), torch.no_grad():
        for batch in once_through(getattr(problem.splits, split)):
            here = to_device(batch, device)
            size = as_size(problem.loss_size(here))
            total += size * float(problem.val_loss(here))
            examples += size
    return total / examples


def _hypergradient(
    joint: JointOptimizer, inverse: Inverse, instead: Inverse, split: str
) -> list[Tensor]:
    """Return the hypergradient of a split's loss, averaged over pairs of batches."""
    problem = joint.problem
    train = batches_of(problem, curvature_split(problem), _PAIRS)
    judged = batches_of(problem, split, _PAIRS)
    pairs = max(len(train), len(judged))
    parts: list[list[Tensor]] = []
    weights: list[float] = []
    with RandomStream(derive_seed("certificate"), joint.device).aside():
        for _, one, two in zip(range(pairs), cycle(train), cycle(judged), strict=False):
            linearisation = joint.linearise(one, two)
            absent = set(linearisation.hypers)  # a batch need not have every example
            result = solve(linearisation, inverse, absent=absent)
            if (
                result.status in _NOT_POSITIVE
            ):  # where the Hessian is not positive a series goes less far
                result = solve(linearisation, instead, absent=absent)
            parts.append(result.grads)
            weights.append(as_size(problem.loss_size(two)))
    total = mul(parts[0], weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = add(total, mul(part, weight))
    return mul(total, 1.0 / sum(weights))
