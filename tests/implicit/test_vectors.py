"""Vector arithmetic against the same arithmetic on one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ift_tune.base.errors import UsageError
from ift_tune.implicit import vectors

SHAPES = st.lists(
    st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4
)  # the empty shape is a scalar
SEEDS = st.integers(0, 10_000)
SCALES = st.floats(-10.0, 10.0)
LAW = settings(derandomize=True, deadline=None, max_examples=25)


def draw(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@LAW
@given(shapes=SHAPES, seed=SEEDS, scale=SCALES)
def test_arithmetic_equals_that_of_the_flat_vector(
    shapes: list[tuple[int, ...]], seed: int, scale: float
) -> None:
    a, b = draw(shapes, seed), draw(shapes, seed + 1)
    x, y = flat(a), flat(b)
    torch.testing.assert_close(vectors.dot(a, b), x @ y)
    torch.testing.assert_close(vectors.norm(a), x.norm())
    torch.testing.assert_close(flat(vectors.add(a, b)), x + y)
    torch.testing.assert_close(flat(vectors.sub(a, b)), x - y)
    torch.testing.assert_close(flat(vectors.mul(a, scale)), scale * x)
    torch.testing.assert_close(flat(vectors.mul(a, torch.tensor(scale))), scale * x)
    torch.testing.assert_close(flat(vectors.axpy(a, scale, b)), x + scale * y)
    torch.testing.assert_close(vectors.flatten(a), x)
    assert vectors.count(a) == x.numel()
    torch.testing.assert_close(flat(a), x, rtol=0.0, atol=0.0)
    torch.testing.assert_close(flat(b), y, rtol=0.0, atol=0.0)


@LAW
@given(shapes=SHAPES, seed=SEEDS, scale=SCALES)
def test_axpy_in_place_changes_only_its_first_argument(
    shapes: list[tuple[int, ...]], seed: int, scale: float
) -> None:
    a, b = draw(shapes, seed), draw(shapes, seed + 1)
    expected, y = flat(vectors.axpy(a, scale, b)), flat(b)
    vectors.axpy_(a, scale, b)
    torch.testing.assert_close(flat(a), expected)
    assert torch.equal(flat(b), y)


@LAW
@given(shapes=SHAPES, seed=SEEDS)
def test_unflatten_inverts_flatten(shapes: list[tuple[int, ...]], seed: int) -> None:
    a = draw(shapes, seed)
    back = vectors.unflatten(vectors.flatten(a), a)
    assert [t.shape for t in back] == [t.shape for t in a]
    assert all(torch.equal(x, y) for x, y in zip(back, a, strict=True))


def test_strides_do_not_matter() -> None:
    a = [torch.arange(6.0, dtype=torch.float64).reshape(2, 3).T]
    b = [torch.arange(6.0, 12.0, dtype=torch.float64).reshape(3, 2)]
    assert float(vectors.dot(a, b)) == float((a[0] * b[0]).sum())
    assert torch.equal(vectors.unflatten(vectors.flatten(a), a)[0], a[0])


def test_missing_tensors_become_zeros() -> None:
    like = [torch.ones(2), torch.ones(3, dtype=torch.float64)]
    given_, filled = vectors.fill_missing((like[0], None), like)
    assert given_ is like[0]
    assert torch.equal(filled, torch.zeros(3, dtype=torch.float64))
    assert all(not bool(z.any()) and z.dtype == x.dtype for z, x in _paired_zeros(like))


def _paired_zeros(like: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(vectors.zeros_like(like), like, strict=True))


@pytest.mark.parametrize("make", [vectors.randn_like, vectors.scattered_like])
def test_random_vectors_depend_on_the_seed_alone(
    make: Callable[[vectors.Tensors, int], list[Tensor]],
) -> None:
    like = [torch.zeros(4, 2, dtype=torch.float64), torch.zeros((), dtype=torch.float32)]
    before = torch.get_rng_state()
    first, again, other = (make(like, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert [(x.shape, x.dtype) for x in first] == [(x.shape, x.dtype) for x in like]


def test_scattered_numbers_look_drawn() -> None:
    size = (1 << 20) + 4096  # longer than they are made at once
    (x,), (y,) = (vectors.scattered_like([torch.zeros(size)], seed) for seed in (0, 1))
    assert float(x.abs().min()) > 0.0
    assert float(x.abs().max()) < 1.0
    noise = 5.0 / size**0.5
    assert float(x.mean()) == pytest.approx(0.0, abs=noise)
    assert float(x.var()) == pytest.approx(1 / 3, rel=noise)
    for lag in (1, 2, 64, 1 << 20):
        assert float((x[lag:] * x[:-lag]).mean()) == pytest.approx(
            0.0, abs=5.0 / (3 * (size - lag) ** 0.5)
        )
    assert float((x * y).mean()) == pytest.approx(0.0, abs=noise)
    many = [torch.zeros(size - 10), torch.zeros(2, 5)]
    assert torch.equal(vectors.flatten(vectors.scattered_like(many, 0)), x)


def test_different_lengths_are_refused() -> None:
    one, two = [torch.ones(1)], [torch.ones(1), torch.ones(1)]
    with pytest.raises(ValueError, match="zip"):
        vectors.dot(one, two)
    with pytest.raises(ValueError, match="zip"):
        vectors.fill_missing((None,), two)


def test_named_takes_modules_mappings_and_iterables() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net[1].bias.requires_grad_(False)
    from_module = vectors.named(net, "weights")
    assert list(from_module) == ["0.weight", "0.bias", "1.weight"]
    from_mapping = vectors.named(from_module, "weights")
    assert list(from_mapping.items()) == list(from_module.items())
    from_list = vectors.named(iter(from_module.values()), "weights")
    assert list(from_list) == ["weights[0]", "weights[1]", "weights[2]"]
    assert all(x is y for x, y in zip(from_list.values(), from_module.values(), strict=True))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ([], "weights is empty"),
        ({}, "weights is empty"),
        (nn.ReLU(), "weights is empty"),
        (torch.ones(2, requires_grad=True), r"pass \[weights\]"),
        ([1.0], r"weights\[0\] is a float"),
        ({"w": torch.ones(2, dtype=torch.float16, requires_grad=True)}, "w is torch.float16"),
        ([torch.ones(2, dtype=torch.bfloat16, requires_grad=True)], "keep the parameters in float"),
        ({"w": torch.ones(2)}, r"call w.requires_grad_\(\)"),
    ],
)
def test_named_refuses_with_the_mend(source: object, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        vectors.named(source, "weights")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    huge = torch.full((1000,), 0.9 * torch.finfo(dtype).max, dtype=dtype)  # the sum overflows
    assert vectors.all_finite([torch.randn(7, dtype=dtype), huge, torch.zeros(0, dtype=dtype)])
    for wrong in (math.nan, math.inf, -math.inf):
        for place in (0, 500, 999):
            tensor = torch.randn(1000, dtype=dtype)
            tensor[place] = wrong
            assert not vectors.all_finite([torch.zeros(3, dtype=dtype), tensor])
            tensor[(place + 1) % 1000] = -wrong  # infinities that would cancel
            assert not vectors.all_finite([tensor])
    assert vectors.largest_entry([torch.tensor([-3.0, 2.0]), torch.zeros(0)]) == 3.0
    assert math.isnan(vectors.largest_entry([torch.tensor([1.0, math.nan]), torch.tensor([5.0])]))
