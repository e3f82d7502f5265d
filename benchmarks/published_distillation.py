"""Vicol et al.'s dataset distillation (ICML 2022, table 3): what warm weights remember.

Used by `published.py`. A network is trained on one or ten synthetic images with learned soft
labels alone; λ, the pixels and the labels, learns from real images. *Warm* weights are kept from
one outer step to the next, as the joint run does; *retrained* ones are trained from scratch on the
images that came out; *cold* ones begin anew at every outer step. Accuracy on the real images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import Batches, BilevelProblem, JointOptimizer, MetaConfig, Splits
from ift_tune.tasks.datasets import Images

COUNTS = (1, 10)
REAL, BATCH, HIDDEN = 20_000, 500, 200
OUTER_STEPS = 600
_WARM = MetaConfig(
    inverse=ift_tune.Neumann(terms=5),
    inner_steps=1,
    inner_lr=0.1,
    inner_optimizer="sgd",
    meta_lr=0.05,
)
_ONE = {"terms": 0, "alpha": 1.0, "meta_optimizer": "sgd", "meta_lr": 10.0}
WARM = {1: _WARM.updated(_ONE), 10: _WARM}
COLD = {count: _WARM.updated({"inner_steps": 50, "reinit_every": 1}) for count in COUNTS}


class Distilled(BilevelProblem):
    """An MLP trained on images and soft labels that are all hyperparameters."""

    def __init__(
        self, count: int, real: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
    ) -> None:
        """Start from faint noise, and from labels of which each prefers another class."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Linear(784, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, 10))
            self.images = nn.Parameter(0.1 * torch.randn(count, 784))
            self.labels = nn.Parameter(torch.eye(count, 10))
        self.hyper = nn.ParameterList([self.images, self.labels])
        none = Batches(torch.zeros(count, 0))  # all that the weights see is λ
        self.splits = Splits(
            train=none,
            val=Batches(*real, batch_size=min(BATCH, len(real[0])), seed=seed),
            search=Batches(*test),
            test=Batches(*test),
        )

    def train_loss(self, batch: tuple[Tensor]) -> Tensor:
        """Return the cross-entropy of the synthetic images, with their soft labels."""
        return F.cross_entropy(self.model(self.images), self.labels.softmax(1))

    def val_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the cross-entropy of real images."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def metrics(self, batch: Any) -> dict[str, Tensor]:
        """Return the accuracy in per cent on real images."""
        if len(batch) == 1:
            return {}
        logits = self.model(batch[0])
        right = (logits.argmax(1) == batch[1]).float().mean()
        return {"loss": F.cross_entropy(logits, batch[1]), "accuracy": 100.0 * right}


def rows(images: Images, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for cold, warm and retrained weights; the last take as many steps as the warm."""
    real, test = _real_and_test(images)
    started = time.process_time()

    def make(config: MetaConfig, device: torch.device, seed: int) -> Distilled:
        return Distilled(count, real, test, seed)

    def begun(config: MetaConfig, at: int) -> JointOptimizer:
        problem = Distilled(count, real, test, at)
        return JointOptimizer(problem, config, seed=seed, problem_factory=make)

    def row(method: str, joint: JointOptimizer) -> dict[str, Any]:
        found = {"images": count, "method": method, "seed": seed}
        accuracy = round(joint.evaluate("test")["test_accuracy"], 2)
        seconds = round(time.process_time() - started, 1)
        return found | {"accuracy": accuracy, "cpu_seconds": seconds}

    warm = begun(WARM[count], seed)
    for _ in range(OUTER_STEPS):
        warm.step()
    yield row("warm", warm)
    retrained = begun(WARM[count], seed + 1000)
    retrained.problem.hyper.load_state_dict(warm.problem.hyper.state_dict())
    for _ in range(OUTER_STEPS):
        retrained.baseline_step()
    yield row("retrained", retrained)
    cold = begun(COLD[count], seed)
    for _ in range(OUTER_STEPS):
        cold.step()
    yield row("cold", cold)


def _real_and_test(images: Images) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return images and labels to learn from, and those of the test part, or else some others."""
    pixels, targets = images.test_pixels, images.test_targets
    known = min(REAL, len(images.pixels))
    if not len(pixels):
        known = min(known, 3 * len(images.pixels) // 4)
        pixels, targets = images.pixels[known:], images.targets[known:]

    def rows(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).float() / images.white

    return (rows(images.pixels[:known]), images.targets[:known]), (rows(pixels), targets)
