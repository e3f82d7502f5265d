"""What a trial has found, kept as states of its modules, and put into a problem for a look."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ift_tune.joint.config import MetaConfig
from ift_tune.problem.evaluation import as_numbers
from ift_tune.problem.factory import build_problem
from ift_tune.problem.problem import BilevelProblem
from ift_tune.problem.returned import as_words

ProblemFactory: TypeAlias = Callable[[MetaConfig, torch.device, int], BilevelProblem]
"""``factory(config, device, seed)``: a plain importable callable, so that it travels."""


@dataclass(frozen=True)
class FoundProblem:
    """The factory of a retraining: the problem built anew, with λ as found.

    Attributes:
        factory: The trial's.
        hyper: The state of λ.
    """

    factory: ProblemFactory
    hyper: Mapping[str, Any]

    def __call__(self, config: MetaConfig, device: torch.device, seed: int) -> BilevelProblem:
        """Build the problem."""
        problem = build_problem(self.factory, config, device, seed)
        problem.hyper.load_state_dict(self.hyper)
        return problem


@contextlib.contextmanager
def holding(
    problem: BilevelProblem, hyper: Mapping[str, Any], model: Mapping[str, Any] | None
) -> Iterator[BilevelProblem]:
    """Let a problem hold what was found, and what it held before afterwards.

    Args:
        problem: It.
        hyper: The state of λ.
        model: That of the model; None: the model stays as it is.
    """
    now = state_of(problem.hyper), state_of(problem.model)
    try:
        problem.hyper.load_state_dict(hyper)
        if model is not None:
            problem.model.load_state_dict(model)
        yield problem
    finally:
        for module, state in zip((problem.hyper, problem.model), now, strict=True):
            module.load_state_dict(state)


def learned_columns(problem: BilevelProblem) -> dict[str, Any]:
    """Return what λ has become: finite numbers and a sentence, as ``learned_<name>``."""
    numbers, words = as_numbers(problem.summary(), "summary"), as_words(problem.words())
    found: dict[str, Any] = {k: v for k, v in numbers.items() if math.isfinite(v)}
    if words:
        found["words"] = words
    return {f"learned_{k}": v for k, v in found.items()}


def state_of(module: nn.Module) -> dict[str, Any]:
    """Return a copy of a module's state on the CPU, where it takes no room from what is trained.

    What has several names, as embeddings that are the output layer too, is copied once.
    """
    copies: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return copy.deepcopy(value)
        place = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]

    return {name: copied(value) for name, value in module.state_dict().items()}


def sharing(
    state: Mapping[str, Any], other: Mapping[str, Any], module: nn.Module
) -> dict[str, Any]:
    """Return a state with the tensors of another in the place of its own where they are equal.

    A file then holds them once: of a frozen backbone, the states of all moments are equal. Trained
    weights are not looked at, which would be carried to the CPU for each checkpoint.

    Args:
        state: Of the module.
        other: The one kept of an earlier moment.
        module: Tells what is trained.
    """
    trained = {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    return {
        name: other[name] if name not in trained and _are_equal(value, other.get(name)) else value
        for name, value in state.items()
    }


def _are_equal(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
