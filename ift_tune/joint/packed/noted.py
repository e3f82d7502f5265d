"""What a problem keeps beside its weights and λ, and whether a loss has changed it or drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ift_tune.problem.problem import BilevelProblem


def noted_of(problem: BilevelProblem) -> dict[str, Any]:
    """Return what a problem and its modules keep beside weights and λ, to see it change."""
    found: dict[str, Any] = {}
    moved = {id(t) for t in (*problem.weights(), *problem.hypers())}
    owners: list[tuple[str, Any]] = [("the problem", problem)]
    for root, name in ((problem.model, "model"), (problem.hyper, "hyper")):
        owners += [(f"{name}.{n}".rstrip("."), module) for n, module in root.named_modules()]
    for owner, each in owners:
        for name, value in vars(each).items():
            if isinstance(value, bool | int | float | str | None):
                found[f"{owner}'s attribute {name}"] = value
            elif isinstance(value, Tensor) and id(value) not in moved:
                found[f"{owner}'s attribute {name}"] = (id(value), value._version)
        if isinstance(each, nn.Module):
            for name, buffer in each.named_buffers(recurse=False):
                found[f"{owner}'s buffer {name}"] = (id(buffer), buffer._version)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """Return the name of what has changed; None if nothing has."""
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return min((n for n in names if not n.endswith("attribute training")), default=None)


def same_draws(one: Any, other: Any) -> bool:
    """Return whether two states of the random generators are the same."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return all(same_draws(one[key], other[key]) for key in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return all(same_draws(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
