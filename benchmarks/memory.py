"""What an outer step takes of memory against plain training, and what differences lose.

    python benchmarks/memory.py [--out DIR]

ResNet-18 of torchvision at 32×32 with a weight decay for each of its 11.2 million weights, batches
of 64, Adam for the weights, RMSprop for λ, a Neumann series of three terms. The images
are scikit-learn's digits, enlarged. All tensors count: weights, λ, both optimisers' states, what is
kept for the next solve, and the graphs; not the data, and no scratch space of a kernel. So the
numbers are the same on every machine.

Accuracy is that of the hypergradient, and of a product with the Hessian, against exact ones at the
same weights: cosine and relative error.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ift_tune import (
    Batches,
    ClassificationProblem,
    JointOptimizer,
    MetaConfig,
    Neumann,
    Splits,
    WeightDecay,
)
from ift_tune.base.environment import environment
from ift_tune.implicit.hypergradient import solve
from ift_tune.implicit.vectors import Tensors, dot, norm, relative_error
from ift_tune.joint.live_bytes import LiveBytes
from ift_tune.tasks.vision import torchvision_part

BATCH, SIZE = 64, 32
CONFIG = MetaConfig(
    inverse=Neumann(terms=3, alpha=0.1),
    inner_steps=1,
    inner_lr=1e-3,
    inner_optimizer="adam",
    meta_optimizer="rmsprop",
    start_check=False,
)


def groups(channels: int) -> nn.Module:
    """Return a normalisation that looks at one example at a time."""
    return nn.GroupNorm(16, channels)


NORMS: dict[str, Callable[..., nn.Module]] = {"batch": nn.BatchNorm2d, "group": groups}


def make_model(norm_layer: str) -> nn.Module:
    """Return the net, the same each time."""
    torch.manual_seed(0)
    make = torchvision_part("models").resnet18
    model: nn.Module = make(num_classes=10, norm_layer=NORMS[norm_layer])
    return model


def make_data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return two batches of enlarged digits with three channels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[: 2 * BATCH, None] / 16.0
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    targets = torch.tensor(digits.target)[: 2 * BATCH]
    return [(images[i : i + BATCH].contiguous(), targets[i : i + BATCH]) for i in (0, BATCH)]


def make_joint(norm_layer: str, config: MetaConfig) -> JointOptimizer:
    """Return a joint optimiser over the net's decays."""
    train, val = (Batches(*rows, batch_size=BATCH) for rows in make_data())
    model = make_model(norm_layer)
    hyper = WeightDecay(model, per="weight")
    return JointOptimizer(ClassificationProblem(model, hyper, Splits(train, val, val, val)), config)


def plain_peak(norm_layer: str) -> int:
    """Return the peak of a step of plain training, all tensors counted."""
    inputs, targets = make_data()[0]
    with LiveBytes() as live:
        model = make_model(norm_layer)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for _ in range(2):
            held, before = held_bytes(), live.now
            live.peak = before
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return int(held + live.peak - before)


def outer_peak(norm_layer: str, config: MetaConfig) -> tuple[int, JointOptimizer]:
    """Return the peak of an inner and an outer step, all tensors counted."""
    with LiveBytes() as live:
        joint = make_joint(norm_layer, config)
        joint.step()
        held, live.peak = held_bytes(), live.now
        before = live.now
        joint.step()
    return held + int(live.peak) - before, joint


def held_bytes() -> int:
    """Return what all tensors that are there take."""
    gc.collect()
    with warnings.catch_warnings(action="ignore"):
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def accuracy(norm_layer: str, steps: int) -> dict[str, float]:
    """Compare products by differences with exact ones after some steps of training."""
    joint = make_joint(norm_layer, CONFIG)
    joint.train_weights(steps)
    train, val = make_data()
    made: list[tuple[Tensors, Tensors]] = []
    along: list[Tensor] = []
    for products in ("exact", "difference"):
        joint.config = replace(CONFIG, products=products)
        linearisation = joint.linearise(train, val)
        along = along or list(linearisation.vector)
        product = linearisation.operator.matvec(along)
        made.append((solve(linearisation, CONFIG.inverse).grads, product))
    (grads, truth), (other_grads, other) = made
    return {
        "steps": steps,
        "product_cosine": cosine(other, truth),
        "product_error": relative_error(other, truth),
        "hypergradient_cosine": cosine(other_grads, grads),
        "hypergradient_error": relative_error(other_grads, grads),
    }


def cosine(a: Tensors, b: Tensors) -> float:
    """Return the cosine of the angle between two vectors."""
    return float(dot(a, b)) / float(norm(a) * norm(b))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    parser.add_argument("--quick", action="store_true", help="no comparison of the accuracy")
    out = parser.parse_args()
    rows: list[dict[str, Any]] = []
    accuracies: list[dict[str, Any]] = []
    data = sum(tensor.nbytes for batch in make_data() for tensor in batch)
    for norm_layer in NORMS:
        plain = plain_peak(norm_layer)
        print(f"{norm_layer} norm: plain training {plain / 2**20:.0f} MiB")
        for products in ("exact", "difference"):
            for share in (None, BUDGETS[products]):
                budget = None if share is None else int(share * plain) - data
                config = replace(CONFIG, products=products, memory_budget=budget)
                peak, joint = outer_peak(norm_layer, config)
                parts = joint.micro_batch
                rows.append(
                    {
                        "norm": norm_layer,
                        "products": products,
                        "memory_budget": budget,
                        "train_at_once": BATCH if parts is None or not parts.train else parts.train,
                        "val_at_once": BATCH if parts is None or not parts.val else parts.val,
                        "plain_bytes": plain,
                        "peak_bytes": peak,
                        "ratio": peak / plain,
                    }
                )
                print(
                    f"  {products}, {rows[-1]['train_at_once']} training and "
                    f"{rows[-1]['val_at_once']} validation images at once: {peak / 2**20:.0f} MiB, "
                    f"{peak / plain:.2f} times plain training"
                )
                del joint
        if not out.quick:
            for steps in (5, 40):
                found = {"norm": norm_layer, **accuracy(norm_layer, steps)}
                accuracies.append(found)
                print(
                    f"  by differences after {steps} steps: H·v cosine "
                    f"{found['product_cosine']:.6f}, error {found['product_error']:.1e}; "
                    f"hypergradient cosine {found['hypergradient_cosine']:.6f}, error "
                    f"{found['hypergradient_error']:.1e}"
                )
    if out.out is not None:
        out.out.mkdir(parents=True, exist_ok=True)
        for name, table in (("memory", rows), ("accuracy", accuracies)):
            frame = pd.DataFrame(table)
            frame.to_csv(out.out / f"{name}.csv", index=False)
            frame.to_parquet(out.out / f"{name}.parquet")
        (out.out / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


BUDGETS = {"exact": 3.2, "difference": 2.5}
"""Of the peak of plain training, what an outer step is given, with the data that are in memory."""


if __name__ == "__main__":
    main()
