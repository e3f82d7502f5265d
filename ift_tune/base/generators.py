"""Random generators that somebody else owns, whether PyTorch's, NumPy's or Python's."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

Generator: TypeAlias = np.random.RandomState | np.random.Generator | random.Random | torch.Generator

GENERATORS = (np.random.RandomState, np.random.Generator, random.Random, torch.Generator)


def states_of(generators: Sequence[Generator]) -> list[Any]:
    """Return their states as tensors or plain values, which load without executing code."""
    return [_state_of(generator) for generator in generators]


def set_states(generators: Sequence[Generator], states: Sequence[Any]) -> None:
    """Let them go to states that `states_of` returned.

    Raises:
        ValueError: If there are not as many.
    """
    for generator, state in zip(generators, states, strict=True):
        _set_state(generator, state)


def seed_generator(generator: Generator, seed: int) -> None:
    """Let it draw from a seed on."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, np.random.Generator):
        kind = type(generator.bit_generator)
        generator.bit_generator.state = kind(seed).state
    else:
        generator.seed(seed)


def _state_of(generator: Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):  # the operating system's numbers have no state
        return None if isinstance(generator, random.SystemRandom) else generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def _set_state(generator: Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif state is not None:
        generator.setstate(state)


def _plain(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray | np.generic) else state
