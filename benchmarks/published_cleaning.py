"""Shen and Chen's hyper-cleaning (2023), with the rows that their table leaves out.

Used by `published.py`. 5,000 training images of MNIST of which half have labels redrawn among all
classes, 5,000 clean validation images, 10,000 test images, all from MNIST's training part, no
weight decay; 5,000 further images (search) stop each training. The weight of an example begins at
1/2, and what ends at 1/2 or more is called clean. As in their code a redrawn label counts as wrong
even where it came out right, so that no F1 score above about 94.7 can be reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ift_tune
from ift_tune import Batches, ClassificationProblem, ExampleWeights, JointOptimizer, MetaConfig
from ift_tune.tasks.datasets import Images

SIZES = (5000, 5000, 5000, 10_000)  # train, val, search, test
EVERY = 25  # steps between evaluations of a plain training


@dataclass(frozen=True)
class Net:
    """A network of theirs and how it is trained here.

    Attributes:
        hidden: Sigmoid units in the hidden layer; 0 for a linear model.
        batch_size: Of an inner step; None takes all.
        curvature: Training and validation examples that an outer step sees; None for all.
        outer_steps: Of the joint run.
        steps: Of each plain training.
        config: Of both.
        truncated: T-RHG's outer steps, its inner learning rate is `truncated_lr`; 0 for none.
        truncated_lr: See `truncated`.
    """

    hidden: int
    batch_size: int | None
    curvature: int | None
    outer_steps: int
    steps: int
    config: MetaConfig
    truncated: int = 0
    truncated_lr: float = 0.1

    def make(self, seed: int) -> nn.Module:
        """Return the network at the weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if not self.hidden:
                return nn.Linear(784, 10)
            first, second = nn.Linear(784, self.hidden), nn.Linear(self.hidden, 10)
            return nn.Sequential(first, nn.Sigmoid(), second)


NETS = {
    "linear": Net(
        0,
        None,
        None,
        outer_steps=80,
        steps=300,
        config=MetaConfig(
            inverse=ift_tune.Neumann(terms=10), meta_lr=0.3, inner_steps=10, inner_lr=1e-2
        ),
        truncated=1,
    ),
    "MLP": Net(
        300,
        250,
        1000,
        outer_steps=50,
        steps=400,
        config=MetaConfig(
            inverse=ift_tune.Neumann(terms=5), meta_lr=0.3, inner_steps=10, inner_lr=3e-3
        ),
    ),
}


class Data(NamedTuple):
    """The four splits, each images and labels, and which training labels were left alone."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    search: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    clean: Tensor


def draw(images: Images, seed: int) -> Data:
    """Return the splits of a seed, a random half of the training labels redrawn."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.pixels), generator=generator)
    sizes = [n * min(len(order), sum(SIZES)) // sum(SIZES) for n in SIZES]
    parts = torch.split(order[: sum(sizes)], sizes)
    train, val, search, test = (
        (images.pixels[part].flatten(1).float() / images.white, images.targets[part])
        for part in parts
    )
    chosen = torch.randperm(sizes[0], generator=generator)[: sizes[0] // 2]
    labels, clean = train[1].clone(), torch.ones(sizes[0], dtype=torch.bool)
    labels[chosen] = torch.randint(10, (len(chosen),), generator=generator)
    clean[chosen] = False
    return Data((train[0], labels), val, search, test, clean)


def f1(kept: Tensor, clean: Tensor) -> float:
    """Return the F1 score in per cent of calling `kept` clean."""
    return 200.0 * float((kept & clean).sum()) / float(kept.sum() + clean.sum())


def joint_run(net: Net, data: Data, seed: int) -> Tensor:
    """Return the weights of the examples that are learned together with the network."""
    problem = _problem(net, data, data.train, ExampleWeights(len(data.clean)), seed)
    joint = JointOptimizer(problem, net.config, seed=seed)
    for _ in range(net.outer_steps):
        joint.step()
    weights: Tensor = problem.hyper().detach()
    return weights


def truncated(net: Net, data: Data, seed: int) -> tuple[Tensor, float]:
    """Return T-RHG's raw weights and the network's accuracy, the largest over the outer steps.

    500 steps of gradient descent from new weights, differentiated through the last 100, and a step
    of SGD with the learning rate 0.001, which moves no weight by more than 10⁻⁷: the F1 score is
    the sign of the hypergradient at weights of 1/2. (Not of the weights less 1/2: those round.)
    """
    raw = torch.zeros(len(data.clean), requires_grad=True)
    outer = torch.optim.SGD([raw], lr=0.001)
    inputs, labels = data.train
    accuracy = 0.0

    def train_loss(weights: list[Tensor]) -> Tensor:
        losses = F.cross_entropy(F.linear(inputs, *weights), labels, reduction="none")
        return (raw.sigmoid() * losses).mean()

    def val_loss(weights: list[Tensor]) -> Tensor:
        return F.cross_entropy(F.linear(data.val[0], *weights), data.val[1])

    for step in range(net.truncated):
        weights = [w.detach() for w in net.make(1000 * seed + step).parameters()]
        share = raw.detach().sigmoid()[:, None] / len(raw)
        for _ in range(400):
            wrong = share * (F.linear(inputs, *weights).softmax(1) - F.one_hot(labels, 10))
            slopes = (wrong.T @ inputs, wrong.sum(0))
            weights = [w - net.truncated_lr * g for w, g in zip(weights, slopes, strict=True)]
        found = ift_tune.unrolled_hypergradient(
            train_loss,
            val_loss,
            [w.requires_grad_() for w in weights],
            [raw],
            steps=100,
            lr=net.truncated_lr,
        )
        (raw.grad,) = found.grads
        outer.step()
        right = F.linear(data.test[0], *found.weights).argmax(1) == data.test[1]
        accuracy = max(accuracy, 100.0 * float(right.float().mean()))
    return raw.detach(), accuracy


def plain(
    net: Net, data: Data, parts: list[tuple[tuple[Tensor, Tensor], Tensor]], seed: int
) -> float:
    """Train from scratch on weighed examples; return the test accuracy at the least search loss."""
    inputs, labels = (torch.cat([rows[i] for rows, _ in parts]) for i in (0, 1))
    weights = torch.cat([weight for _, weight in parts]).clamp(1e-4, 1.0 - 1e-4)
    hyper = ExampleWeights(len(weights), init=lambda raw: raw.copy_(weights.logit()))
    problem = _problem(net, data, (inputs, labels), hyper, seed)
    steps = net.config.updated({"inner_steps": EVERY})
    joint = JointOptimizer(problem, steps, seed=seed)
    best, accuracy = float("inf"), 0.0
    for _ in range(net.steps // EVERY):
        joint.baseline_step()
        loss = joint.evaluate("search")["search_loss"]
        if loss < best:
            best, accuracy = loss, 100.0 * (1.0 - joint.evaluate("test")["test_error"])
    return accuracy


def rows(images: Images, name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each method: accuracy and F1 score in per cent, and processor seconds."""
    net, data = NETS[name], draw(images, seed)
    ones, val_ones = torch.ones(len(data.clean)), torch.ones(len(data.val[1]))

    def row(method: str, accuracy: float, score: float | None, started: float) -> dict[str, Any]:
        seconds = round(time.process_time() - started, 1)
        found = {"net": name, "method": method, "seed": seed, "accuracy": round(accuracy, 2)}
        return found | {"f1": None if score is None else round(score, 2), "cpu_seconds": seconds}

    started = time.process_time()
    if net.truncated:
        raw, accuracy = truncated(net, data, seed)
        yield row("T-RHG", accuracy, f1(raw >= 0.0, data.clean), started)
        started = time.process_time()
    learned = joint_run(net, data, seed)
    score = f1(learned >= 0.5, data.clean)
    trained = [(data.train, learned)], [(data.train, learned), (data.val, val_ones)]
    yield row("ift", plain(net, data, trained[0], seed), score, started)
    started = time.process_time()
    yield row("ift+val", plain(net, data, trained[1], seed), score, started)
    others = {
        "train": [(data.train, ones)],
        "val": [(data.val, val_ones)],
        "train+val": [(data.train, ones), (data.val, val_ones)],
    }
    for method, parts in others.items():
        started = time.process_time()
        yield row(method, plain(net, data, parts, seed), None, started)


def _problem(
    net: Net, data: Data, train: tuple[Tensor, Tensor], hyper: ExampleWeights, seed: int
) -> ClassificationProblem:
    """Return the problem with any weighed examples as its training split."""

    def batches(part: tuple[Tensor, ...], size: int | None) -> Batches:
        return Batches(*part, batch_size=size and min(size, len(part[0])), seed=seed)

    indexed = (*train, torch.arange(len(train[0])))
    splits = ift_tune.Splits(
        train=batches(indexed, net.batch_size),
        val=batches(data.val, net.curvature),
        search=batches(data.search, None),
        test=batches(data.test, None),
        curvature=batches(indexed, net.curvature),
    )
    return ClassificationProblem(net.make(seed), hyper, splits)
