"""Which parts of λ the losses have come by: one in a module that nobody calls is idle."""

from __future__ import annotations

from ift_tune.base.errors import UnreachableHyperparameterError
from ift_tune.implicit.process_group import anywhere
from ift_tune.problem.problem import BilevelProblem

_MEND = (
    "No call has come by the module, where alone this acts, or an adapter there is not active: "
    "where another module uses the weights itself, as nn.MultiheadAttention does those of its "
    "out_proj, name that one; leave out what no batch comes by"
)


def idle_parts(problem: BilevelProblem) -> list[str]:
    """Return which parts of λ no call of the model has used so far, in any process.

    Autograd tells of a tensor of λ whether a loss depends on it, and not of its entries: a part of
    it that goes nowhere has a derivative of 0 there, as one that happens to have no effect.
    """
    parts: list[tuple[str, bool]] = []  # two kinds, of two models, may have parts of one name
    modules = getattr(getattr(problem, "hyper", None), "modules", None)
    for kind in modules() if callable(modules) else ():
        used = getattr(kind, "in_use", None)
        if callable(used):
            parts += used().items()
    # Nobody waits for the other processes where no kind has such parts, as most have not.
    used_somewhere = anywhere([used for _, used in parts]) if parts else []
    return [name for (name, _), used in zip(parts, used_somewhere, strict=True) if not used]


def refuse_idle(names: list[str]) -> None:
    """Refuse parts of λ that are idle.

    Raises:
        UnreachableHyperparameterError: If there are any.
    """
    if names:
        raise UnreachableHyperparameterError(names, _MEND)
