"""A sampler object as what makes each trial's sampler: copied or kept, and seeded for the trial."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from optuna.samplers import BaseSampler

from ift_tune.base.generators import GENERATORS, Generator, seed_generator
from ift_tune.base.randomness import derive_seed

_OPTUNA = "optuna"


@dataclass(frozen=True)
class CopiedSampler:
    """Makes a copy of one of Optuna's own samplers for each trial.

    What they know of earlier trials they read from the study. What else they keep is random
    numbers, or saves time: so a copy for each trial suggests the same in every process.

    Attributes:
        sampler: As it was given, and never used itself.
    """

    sampler: BaseSampler
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", copy.deepcopy(self.sampler))
        object.__setattr__(self, "identity", _random_state(self.sampler))

    def __call__(self, seed: int, trial_number: int) -> BaseSampler:
        """Return the copy, seeded for the trial."""
        made = copy.deepcopy(self.sampler)
        _seed_generators(made, seed, self.identity, trial_number)
        return made


@dataclass(frozen=True)
class KeptSampler:
    """Hands out one sampler for all trials of a process, whose class may remember earlier ones.

    Attributes:
        sampler: As it was given.
    """

    sampler: BaseSampler
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", _random_state(self.sampler))

    def __call__(self, seed: int, trial_number: int) -> BaseSampler:
        """Return the sampler, seeded for the trial."""
        _seed_generators(self.sampler, seed, self.identity, trial_number)
        return self.sampler


def from_object(sampler: BaseSampler) -> CopiedSampler | KeptSampler:
    """Return what makes samplers of an object: copies, where all of it is Optuna's own."""
    samplers = [part for part in _parts(sampler) if isinstance(part, BaseSampler)]
    return CopiedSampler(sampler) if all(map(_is_optunas, samplers)) else KeptSampler(sampler)


def _is_optunas(part: object) -> bool:
    return type(part).__module__.partition(".")[0] == _OPTUNA


def _parts(whole: object) -> Iterator[object]:
    """Yield an object and what it holds, in attributes and in containers, each once, in order."""
    waiting, seen = [whole], set()
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting.extend(reversed(_held(part)))


def _held(part: object) -> list[Any]:
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, list | tuple):
        return list(part)
    # Functions and classes belong to their module, and a generator is looked at as a whole.
    if isinstance(part, (type, np.ndarray, torch.Tensor, *GENERATORS)) or callable(part):
        return []
    return list(getattr(part, "__dict__", {}).values())


def _random_state(sampler: BaseSampler) -> str:
    """Return what tells one sampler's seed from another's; nothing of one that has not drawn."""
    states = [_state_of(part) for part in _parts(sampler) if isinstance(part, GENERATORS)]
    return hashlib.sha256(b"".join(states)).hexdigest()[:16] if states else ""


def _state_of(generator: Generator) -> bytes:
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    twin = copy.deepcopy(generator)
    if isinstance(twin, random.Random):
        return twin.randbytes(16)
    return twin.bytes(16)


def _seed_generators(sampler: BaseSampler, *parts: object) -> None:
    for part in list(_parts(sampler)):
        if _is_optunas(part) and hasattr(type(part), "rng"):
            _ = part.rng  # type: ignore[attr-defined]  # Optuna makes it at its first use
    found = [part for part in _parts(sampler) if isinstance(part, GENERATORS)]
    for index, generator in enumerate(found):
        seed_generator(generator, derive_seed("sampler object", *parts, index))
