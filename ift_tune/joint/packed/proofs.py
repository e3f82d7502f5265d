"""What a pack has computed for a run, held against what the run computes itself.

Nobody can know from outside whether two trials have one problem: a factory may build another one
for another configuration, and a problem may read what a pack does not give it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ift_tune.base.randomness import RandomStream
from ift_tune.implicit.hypergradient import Hypergradient
from ift_tune.implicit.linearisation import Linearisation
from ift_tune.implicit.vectors import Tensors, fill_missing, flatten, norm, precision, sub
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


@dataclass(frozen=True, eq=False)
class Claim:
    """What a pack has computed of a run's hypergradient, and what shows that it is the run's own.

    Attributes:
        result: The hypergradient.
        vector: v = ∂L_V/∂w, of the shapes of the weights.
        solution: q, likewise.
        image: H·q, likewise.
    """

    result: Hypergradient
    vector: list[Tensor]
    solution: list[Tensor]
    image: list[Tensor]


def require_equal(
    own: Linearisation, weights: Tensors, contract: Callable[[Tensors], Tensors], claim: Claim
) -> None:
    """Refuse a run of whose own losses a hypergradient is not that of the pack.

    The solve is the same arithmetic in all runs; what a problem may have of its own is v, H and
    the mixed derivatives. So these are held against each other, at the pack's solution.

    Args:
        own: The run's losses, linearised.
        weights: All of its weights, of which `own` may see a part.
        contract: Returns its hypergradient for a solution.
        claim: What the pack has.

    Raises:
        PackMismatch: If it is another.
    """
    seen = {id(w) for w in own.weights}

    def of_seen(tensors: Tensors) -> list[Tensor]:
        return [t for w, t in zip(weights, tensors, strict=True) if id(w) in seen]

    packed, solution = claim.result, of_seen(claim.solution)
    pairs = {
        "hypergradient": (contract(solution), packed.grads, None),
        "gradient of the validation loss": (own.vector, of_seen(claim.vector), None),
        # What cancels in H·q is of the size of v, which it approximates, and so is its rounding.
        "product H·v": (own.operator.matvec(solution), of_seen(claim.image), own.vector),
    }
    numbers = [own.train_loss, own.val_loss]
    for one, two, scale in pairs.values():
        numbers += [norm(sub(two, one)), norm(one if scale is None else [*one, *scale])]
    train, val, *found = torch.stack([n.detach().double() for n in numbers]).cpu().tolist()
    errors, sizes = found[::2], found[1::2]
    rounding = precision(packed.grads)
    losses = {
        # The pack's have been read already, and lie on the CPU.
        "training loss": _relative(float(packed.train_loss) - train, train),
        "validation loss": _relative(float(packed.val_loss) - val, val),
    }
    _refuse(losses, 1e3 * rounding)
    derived = zip(pairs, errors, sizes, strict=True)
    _refuse({name: _relative(*pair) for name, *pair in derived}, 1e4 * rounding)


def _relative(error: float, size: float) -> float:
    return abs(error) / (abs(size) or 1.0)


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
        own: What it measures; where that is not finite, there is nothing to compare.
        packed: What its pack does.
        examples: In the split: of few, a rounding may decide otherwise.
        rounding: Of the weights' type.

    Raises:
        PackMismatch: If it does.
    """
    if own.keys() != packed.keys():
        raise PackMismatch(f"{_ONE_PROBLEM}; got other metrics than {', '.join(packed)}")
    finite = {name: value for name, value in own.items() if math.isfinite(value)}
    errors = {
        name: abs(packed[name] - value) if math.isfinite(packed[name]) else math.inf
        for name, value in finite.items()
    }
    wrong = {
        name: error / (abs(finite[name]) + 1e-3)
        for name, error in errors.items()
        if name.endswith("_loss") or error > 2.0 / examples
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
