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
REAL = 20_000
HIDDEN = 200
OUTER_STEPS = 600
CONFIG = MetaConfig(
    inverse=ift_tune.Neumann(terms=5),
    inner_steps=1,
    inner_lr=0.1,
    inner_optimizer="sgd",
    meta_lr=0.05,
)


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
            val=Batches(*real, batch_size=min(1000, len(real[0])), seed=seed),
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
    """Yield the accuracies of warm and of retrained weights; the latter take as many steps.

    Cold weights are ``MetaConfig(reinit_every=1)``.
    """
    real, test = (
        (pixels.flatten(1).float() / images.white, targets)
        for pixels, targets in (
            (images.pixels[:REAL], images.targets[:REAL]),
            (images.test_pixels, images.test_targets)
            if len(images.test_pixels)
            else (images.pixels[-REAL:], images.targets[-REAL:]),
        )
    )
    started = time.process_time()

    def row(method: str, joint: JointOptimizer) -> dict[str, Any]:
        found = {"images": count, "method": method, "seed": seed}
        accuracy = round(joint.evaluate("test")["test_accuracy"], 2)
        seconds = round(time.process_time() - started, 1)
        return found | {"accuracy": accuracy, "cpu_seconds": seconds}

    warm = JointOptimizer(Distilled(count, real, test, seed), CONFIG, seed=seed)
    for _ in range(OUTER_STEPS):
        warm.step()
    yield row("warm", warm)
    fresh = Distilled(count, real, test, seed + 1000)
    fresh.hyper.load_state_dict(warm.problem.hyper.state_dict())
    retrained = JointOptimizer(fresh, CONFIG, seed=seed)
    for _ in range(OUTER_STEPS):
        retrained.baseline_step()
    yield row("retrained", retrained)
