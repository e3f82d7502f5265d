"""A problem linearised without a graph in memory: products run its training loss again."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import GlobalState
from ift_tune.implicit.ambient import ordinary_autograd
from ift_tune.implicit.differences import Differences, Repeated, Source
from ift_tune.implicit.hidden_curvature import refuse_power_iteration
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.micro_batches import MicroBatches, accumulate_
from ift_tune.implicit.penalty import Penalty, RemadePenalty
from ift_tune.implicit.vectors import fill_missing, named
from ift_tune.problem.passes import Part, TrainingPasses, judge
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_penalty


def linearise_again(
    problem: BilevelProblem,
    train_parts: Sequence[Part],
    val_parts: Sequence[Part],
    *,
    gauss_newton: bool,
    exact: bool,
) -> Linearisation:
    """Return a problem linearised so that each product runs the training loss again.

    Args:
        problem: At the weights and λ that it keeps until the last product.
        train_parts: Of the training batch.
        val_parts: Of the validation batch.
        gauss_newton: Whether the Gauss-Newton matrix takes the Hessian's place.
        exact: Whether products are second derivatives, part by part; else they are central
            differences of first ones.

    Raises:
        UsageError: If a loss has no graph, or the training loss sees none of the weights.
    """
    started = time.perf_counter()
    w, h = named(problem.model, "the model"), named(problem.hyper, "the hyperparameter module")
    weights, hypers = list(w.values()), list(h.values())
    device = weights[0].device
    if exact:
        refuse_power_iteration(problem.model)
    with ordinary_autograd("hypergradient()", device):
        judged = judge(problem, val_parts, weights, hypers)
        passes = TrainingPasses(problem, train_parts, GlobalState(device), twice=exact)
        centre = passes.centre(judged.by_statistics)
        by_val = [*judged.by_weights, *judged.by_hypers]
        accumulate_(by_val, tuple(centre.by_statistics))
        every, n = weights, len(weights)
        penalty = _remade(problem)
        penalised = set() if penalty is None else penalty.aligned(every).reached(n)
        seen = [i for i, t in enumerate(every) if id(t) in centre.reached or i in penalised]
        if not seen:
            raise UsageError(
                f"train_loss depends on none of the weights ({', '.join(list(w)[:3])}, ...)"
            )
        seen_weights = [every[i] for i in seen]
        if penalty is not None:
            penalty = penalty.aligned(seen_weights)
        source: Source
        if exact:
            source = MicroBatches(passes, seen_weights, gauss_newton=gauss_newton)
        else:
            source = Differences(
                passes,
                seen_weights,
                centre.rounding,
                gauss_newton=gauss_newton,
                kinks=not centre.compiled,
            )
        with centre.kernels.active():  # those that the products are taken with
            operator = Repeated(source, seen_weights, penalty)
    return Linearisation(
        operator=operator,
        vector=fill_missing(tuple(by_val[i] for i in seen), seen_weights),
        direct=[_zero_like(t) if g is None else g for t, g in zip(hypers, by_val[n:], strict=True)],
        judging=frozenset(n for n, g in zip(h, by_val[n:], strict=True) if g is not None),
        train_loss=centre.loss,
        val_loss=judged.loss,
        gradient=[],
        weights=seen_weights,
        hypers=h,
        penalty=penalty,
        kernels=centre.kernels,
        seconds=time.perf_counter() - started,
        source=source,
        acting=frozenset(name for name, t in h.items() if id(t) in centre.reached),
    )


def _remade(problem: BilevelProblem) -> Penalty | None:
    """Return the problem's penalty, made anew for each product: that takes little beside a pass."""
    if as_penalty(problem.penalty()) is None:
        return None

    def make() -> Penalty:
        penalty = as_penalty(problem.penalty())
        if penalty is None:
            raise UsageError("penalty() must return one at each call or at none, got None now")
        return penalty

    return RemadePenalty(make)


def _zero_like(tensor: Tensor) -> Tensor:
    """Return zeros that take no memory: a million hyperparameters that L_V does not see."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
