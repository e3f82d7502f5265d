"""Calling a user's factory: the same random numbers for the same seed, and a problem in return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ift_tune.base.arguments import require_seed, shown
from ift_tune.base.errors import UsageError
from ift_tune.base.randomness import RandomStream
from ift_tune.problem.problem import BilevelProblem


def require_factory(factory: object, name: str = "problem_factory") -> None:
    """Raise a `UsageError` unless `factory` can be called with ``(config, device, seed)``."""
    wanted = f"{name} must be a function (config, device, seed) that returns a problem"
    if not callable(factory) or isinstance(factory, nn.Module):  # which takes any arguments
        raise UsageError(f"{wanted}, got {shown(factory)}")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some that are not written in Python have none
        return
    try:
        signature.bind(None, None, 0)
    except TypeError as error:
        called = getattr(factory, "__name__", type(factory).__name__)
        raise UsageError(f"{wanted}, got {called}{signature}") from error


def build_problem(
    factory: Callable[..., Any], config: object, device: torch.device | str, seed: int
) -> BilevelProblem:
    """Return the problem that a user's factory builds.

    A problem is built anew for every trial, for its retraining and when it is resumed, perhaps by
    another process. Initial weights and splits, which most factories draw from the global
    generators (``nn.Linear``, ``random_split``), must be the same each time, or test examples of
    one call are training examples of another. So PyTorch's, NumPy's and Python's generators are
    seeded with `seed` meanwhile, and are as before afterwards.

    Raises:
        UsageError: If it returns something else, or the problem is not complete.
    """
    require_factory(factory)
    device, seed = torch.device(device), require_seed(seed)
    with RandomStream(seed, device).aside():
        problem = factory(config, device, seed)
    if isinstance(problem, BilevelProblem):
        problem.validate()
        return problem
    if problem is None:
        mend = "is a `return` missing? got None"
    elif isinstance(problem, type):
        mend = f"call the class to make one, got the class {problem.__name__}"
    elif isinstance(problem, nn.Module):
        kind = type(problem).__name__
        mend = f"put the model into one, such as ClassificationProblem, got a {kind}"
    else:
        mend = f"got {shown(problem)}"
    called = getattr(factory, "__name__", type(factory).__name__)
    raise UsageError(f"the factory {called} must return a BilevelProblem: {mend}")
