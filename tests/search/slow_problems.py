"""The tiny problem at a pace at which there is time to do harm to those who work on it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from small_problems import make_tiny

from ift_tune import MetaConfig
from ift_tune.hyper.supervised import ClassificationProblem
from ift_tune.problem.batches import Batch, Loader

SECONDS = 0.25


def make_slow(config: MetaConfig, device: torch.device, seed: int) -> ClassificationProblem:
    """Return the tiny problem, with a pause in every outer step."""
    problem = make_tiny(config, device, seed)
    problem.splits = replace(problem.splits, search=Unhurried(problem.splits.search))
    return problem


class Unhurried:
    """A loader that takes its time."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Batch]:
        time.sleep(SECONDS)
        return iter(self._loader)
