"""Whether splits share examples: then what judges has been trained on."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ift_tune.problem.batches import tensors_of
from ift_tune.problem.problem import BilevelProblem
from ift_tune.testing.symptoms import Finding, Level, batches_of, curvature_split

_LOOKED_AT = 64  # batches of a split
_SHARED = 0.05  # of a split: rows of few values, as short texts, may be equal by chance
_PAIRS = (("val", "train"), ("search", "train"), ("test", "train"), ("search", "val"))


def shared_examples(problem: BilevelProblem) -> list[Finding]:
    """Say so where a split has inputs, to the bit, that another one has too.

    Looked at are the first tensors of the first batches, which are the inputs; a loader that
    changes them at each pass, as an augmentation does, hides what is shared.

    Args:
        problem: Whose loaders are passed over, at most 64 batches of each split.

    Example:
        >>> import torch, ift_tune
        >>> from ift_tune.testing.overlap import shared_examples
        >>> rows = ift_tune.Batches(torch.randn(8, 3), torch.arange(8) % 2)
        >>> others = [ift_tune.Batches(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(3)]
        >>> model = torch.nn.Linear(3, 2)
        >>> splits = ift_tune.Splits(rows, rows, *others[:2])
        >>> problem = ift_tune.ClassificationProblem(model, ift_tune.WeightDecay(model), splits)
        >>> [finding.sentence for finding in shared_examples(problem)]
        ['8 of 8 examples of the val split are in the train split too: ...']
    """
    known = {name: list(_inputs(problem, name)) for name in ("val", "search", "test")}
    known["train"] = list(_inputs(problem, curvature_split(problem)))
    found = []
    for split, other in _PAIRS:
        there = set(known[other])
        shared, total = sum(row in there for row in known[split]), len(known[split])
        if total and shared >= _SHARED * total:
            text = (
                f"{shared:,} of {total:,} examples of the {split} split are in the {other} split "
                "too: cut the data so that each is in one, or what is measured there is no check"
            )
            numbers = {"shared": float(shared), "examples": float(total)}
            found.append(Finding("overlap", Level.ADVICE, text, numbers))
    return found


def _inputs(problem: BilevelProblem, split: str) -> Iterator[bytes]:
    """Yield the inputs of each example, as bytes."""
    for batch in batches_of(problem, split, _LOOKED_AT):
        tensors = tensors_of(batch)
        # A single number an example may be equal by chance, and may be its position.
        if tensors and tensors[0].ndim > 1 and tensors[0].layout is torch.strided:
            rows = tensors[0].detach().cpu().flatten(1).contiguous().view(torch.uint8)
            yield from (row.tobytes() for row in rows.numpy())
