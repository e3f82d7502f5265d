"""What a pack has computed for a run, held against what the run computes itself.

Nobody can know from outside whether two trials have one problem: a factory may build another one
for another configuration, and a problem may read what a pack does not give it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.vectors import fill_missing, flatten, norm, precision, relative_error
from ift_tune.problem.batches import Batch
from ift_tune.problem.losses import aligned_penalty
from ift_tune.problem.modes import preserved_buffers
from ift_tune.problem.problem import BilevelProblem


class PackMismatch(BaseException):
    """A run's own numbers are not its pack's. No error of the run, which is left as it is.

    Attributes:
        member: The run, where it has been found out before anything was handed to it.
    """

    member: Any = None


def require_equal(own: Hypergradient, packed: Hypergradient) -> None:
    """Refuse a run whose own hypergradient is another than the pack's.

    Raises:
        PackMismatch: If it is.
    """
    if not own.usable or not packed.usable:
        return
    wrong = {
        # The pack's losses have been read already, and lie on the CPU.
        "train_loss": relative_error(
            [own.train_loss.reshape(1).cpu()], [packed.train_loss.reshape(1)]
        ),
        "val_loss": relative_error([own.val_loss.reshape(1).cpu()], [packed.val_loss.reshape(1)]),
        "hypergradient": relative_error(packed.grads, own.grads),
    }
    _refuse(wrong, 1e4 * precision(own.grads))


def require_same_gradient(
    problem: BilevelProblem,
    batches: Sequence[Mapping[str, Batch]],
    packed: tuple[Tensor, Tensor],
    *,
    val_share: float,
    penalty_scale: float,
) -> bool:
    """Refuse a plain training whose own gradient is another than the pack's.

    Args:
        problem: Its problem, at the present weights.
        batches: Of each split that it sees, as many as make up the gradient.
        packed: The pack's loss of the first of them, and its gradient with the penalty's.
        val_share: See `JointOptimizer.shares`.
        penalty_scale: Likewise.

    Returns:
        Whether there was something to compare: numbers that are finite.

    Raises:
        PackMismatch: If it is.
    """
    weights = problem.weights()

    def trained_by(each: Mapping[str, Batch]) -> Tensor:
        losses = {name: getattr(problem, f"{name}_loss")(batch) for name, batch in each.items()}
        shares = {"train": 1.0 - val_share, "val": val_share}
        return torch.stack([shares[name] * loss for name, loss in losses.items()]).sum()

    with RandomStream(0, weights[0].device).aside(), preserved_buffers(problem.model):
        losses = [trained_by(each) for each in batches]
        found = torch.autograd.grad(torch.stack(losses).mean(), weights, allow_unused=True)
    own = [g.detach().clone() for g in fill_missing(found, weights)]
    if (penalty := aligned_penalty(problem)) is not None:
        further = [torch.zeros_like(g) for g in own]
        with torch.no_grad():
            penalty.add_gradient_(further, [w.detach() for w in weights])
        torch._foreach_add_(own, further, alpha=penalty_scale)
    loss, gradient = packed
    numbers = [losses[0].detach(), loss, norm(own), norm([flatten(own) - gradient]), norm(weights)]
    truth, value, length, error, size = torch.stack([x.double() for x in numbers]).cpu().tolist()
    if not (math.isfinite(truth) and math.isfinite(length)):
        return False  # which is the run's own to find out
    allowed = 1e4 * precision(own)
    # Near a minimum a gradient is what is left of larger terms, and the rounding is of their size.
    scale = max(length, 1e-2 * abs(truth) / max(size, allowed))
    wrong = {
        "training loss": abs(value - truth) / max(abs(truth), allowed),
        "gradient": error / max(scale, allowed),
    }
    _refuse(wrong, allowed)
    return True


def require_same_metrics(
    own: Mapping[str, float], packed: Mapping[str, float], examples: float, rounding: float
) -> None:
    """Refuse a run that measures something else than its pack.

    Args:
        own: What it measures.
        packed: What its pack does.
        examples: In the split: of few, a rounding may decide otherwise.
        rounding: Of the weights' type.

    Raises:
        PackMismatch: If it does.
    """
    if own.keys() != packed.keys():
        raise PackMismatch(f"{_ONE_PROBLEM}; got other metrics than {', '.join(packed)}")
    wrong = {
        name: abs(packed[name] - value) / (abs(value) + 1e-3)
        for name, value in own.items()
        if name.endswith("_loss") or abs(packed[name] - value) > 2.0 / examples
    }
    _refuse(wrong, 1e4 * rounding)


_ONE_PROBLEM = (
    "a pack's trials must have one problem that depends on its weights and λ alone: leave --pack "
    "off where the factory reads the searched settings, or a loss keeps state of its own"
)


def _refuse(wrong: Mapping[str, float], allowed: float) -> None:
    """Refuse a run one of whose numbers is another than its pack's.

    Args:
        wrong: The relative errors, by name.
        allowed: The largest that may come of rounding.

    Raises:
        PackMismatch: If one is larger.
    """
    name = max(wrong, key=lambda each: wrong[each], default="")
    if name and not wrong[name] <= allowed:
        raise PackMismatch(
            f"{_ONE_PROBLEM}; got a {name} that differs by {wrong[name]:.1g} from the trial's own"
        )
