"""What a pack computes: kernels for all members, and batches of many steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ift_tune import Batches
from ift_tune.joint.packed.kernels import StackedKernels
from ift_tune.joint.packed.walks import Course

MEMBERS, ROWS, INPUTS, CLASSES = 3, 5, 4, 3

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def layers(x: Tensor, w: Tensor, b: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b).tanh(), targets)


CASES: dict[str, Loss] = {
    "layers": layers,
    "by its module's keywords": lambda x, w, b, t: F.linear(x, weight=w, bias=b).square().sum(),
    "no bias": lambda x, w, b, t: F.linear(x, w).square().sum() + b.square().sum(),
    "further dimensions": lambda x, w, b, t: F.linear(x[None], w, b).square().sum(),
    "a bias for each example": lambda x, w, b, t: F.linear(x, w, b * x[:, :1]).square().sum(),
    "a number for a bias": lambda x, w, b, t: F.linear(x, w, b.sum()).square().sum(),
    "one example": lambda x, w, b, t: F.linear(x[0], w, b).square().sum(),
    "inputs that depend": lambda x, w, b, t: F.linear(x * w.sum(), w, b).square().sum(),
    "a frozen layer": lambda x, w, b, t: (
        F.linear(F.linear(x, torch.eye(INPUTS, dtype=x.dtype), x[0]), w, b).square().sum()
    ),
    "each loss": lambda x, w, b, t: (
        F.cross_entropy(F.linear(x, w, b), t, reduction="none").square().sum()
    ),
    "sum": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t, reduction="sum"),
    "ignored": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t, ignore_index=1),
    "weighed": lambda x, w, b, t: F.cross_entropy(
        F.linear(x, w, b), t, torch.arange(1.0, 4.0, dtype=x.dtype)
    ),
    "smoothed": lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t, label_smoothing=0.1),
    "probabilities": lambda x, w, b, t: F.cross_entropy(
        F.linear(x, w, b), F.one_hot(t, CLASSES).to(x.dtype)
    ),
}


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += not func.is_view
        return func(*args, **(kwargs or {}))


def derived(loss: Loss, *, stacked: bool) -> tuple[list[Tensor], int]:
    """Return losses, gradients and products; and how many operations the first two took."""
    x = numbers(*([MEMBERS] * stacked), ROWS, INPUTS, seed=0)
    targets = torch.arange(x[..., 0].numel()).reshape(x.shape[:-1]) % CLASSES
    w = numbers(MEMBERS, CLASSES, INPUTS, seed=1).requires_grad_()
    b = numbers(MEMBERS, CLASSES, seed=2).requires_grad_()
    own = 0 if stacked else None
    with Counting() as counting:
        losses = vmap(loss, in_dims=(own, 0, 0, own))(x, w, b, targets)
        slopes = torch.autograd.grad(losses.sum(), [w, b], create_graph=True)
    along = [numbers(*s.shape, seed=3) for s in slopes]
    products = torch.autograd.grad(slopes, [w, b], along, allow_unused=True)
    found = [losses, *slopes, *(p for p in products if p is not None)]
    return [f.detach() for f in found], counting.operations


@pytest.mark.parametrize("stacked", [False, True], ids=["one batch", "a batch each"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_for_all_members_have_the_derivatives_of_vmaps_own(
    name: str, stacked: bool
) -> None:
    expected, _ = derived(CASES[name], stacked=stacked)
    with StackedKernels():
        found, _ = derived(CASES[name], stacked=stacked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_wrong_reduction_is_refused_as_ever() -> None:
    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x, torch.zeros(ROWS, dtype=torch.long), reduction="avg")

    with StackedKernels(), pytest.raises(ValueError, match="avg"):
        vmap(loss)(numbers(MEMBERS, ROWS, CLASSES, seed=0))


def test_class_numbers_may_be_bytes_as_without_vmap() -> None:
    x, targets = numbers(MEMBERS, ROWS, CLASSES, seed=0), torch.arange(ROWS) % CLASSES
    with StackedKernels():
        found = vmap(lambda row: F.cross_entropy(row, targets.byte()))(x)
    torch.testing.assert_close(found, torch.stack([F.cross_entropy(row, targets) for row in x]))


def test_they_are_fewer() -> None:
    _, taken_apart = derived(layers, stacked=True)
    with StackedKernels():
        _, operations = derived(layers, stacked=True)
    assert operations <= 0.6 * taken_apart


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("features", [2, 2**18], ids=["small rows", "rows of a megabyte"])
@pytest.mark.parametrize("seeds", [(1, 2, 3), (1, 1, 1), (1, 1, 2)], ids=str)
def test_rows_of_many_steps_are_those_of_each(
    seeds: tuple[int, ...], features: int, shuffle: bool
) -> None:
    steps = (5, 4, 2) if features > 2 else (40, 17, 3)
    rows_in_all = 8
    data = torch.arange(float(rows_in_all * features)).reshape(rows_in_all, features)
    index = torch.arange(rows_in_all)
    loaders = [Batches(data, index, batch_size=4, seed=s, shuffle=shuffle) for s in seeds]
    each = [
        [places for _ in range(n) for places in loader.places()][:n]
        for n, loader in zip(steps, loaders, strict=True)
    ]
    course = Course(loaders[0], each)
    for step in range(steps[0]):
        active = sum(step < n for n in steps)
        gathered = course.at(step, active)
        for member in range(active):
            rows, numbered = gathered.of(member)
            torch.testing.assert_close(numbered, each[member][step])
            torch.testing.assert_close(rows, data[each[member][step]])


def test_places_are_those_of_the_batches_from_one_generator() -> None:
    one, other = (Batches(torch.arange(10), batch_size=3, seed=5) for _ in range(2))
    for _ in range(3):
        batches = [rows for (rows,) in one]
        assert all(torch.equal(a, b) for a, b in zip(batches, other.places(), strict=True))
    assert torch.equal(one.generator.get_state(), other.generator.get_state())
    assert [p.tolist() for p in Batches(torch.arange(3)).places()] == [[0, 1, 2]]
