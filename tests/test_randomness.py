"""Random numbers of one's own: nobody else's are seen or moved."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ift_tune.base.checkpoints import load_checkpoint, save_checkpoint
from ift_tune.base.randomness import GlobalState, RandomStream, derive_seed

CPU = torch.device("cpu")
Draws: TypeAlias = tuple[float, float, float, float, float]


def _draw() -> Draws:
    """Draw from all three generators; the Gaussians leave a half-used pair behind."""
    return (
        float(torch.rand(())),
        float(np.random.rand()),
        float(np.random.randn()),
        random.random(),
        random.gauss(0.0, 1.0),
    )


def test_derived_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed() == 2078750766
    assert derive_seed(0, "batches") == 270159397
    assert derive_seed(3, ("a", 1.5)) == 2762065457


_parts = st.lists(st.integers() | st.text(max_size=3), max_size=3)


@given(_parts, _parts)
def test_derived_seeds_depend_on_every_part(a: list[object], b: list[object]) -> None:
    assert 0 <= derive_seed(*a) < 2**32
    assert derive_seed(*a) == derive_seed(*a)
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)
    assert derive_seed(*a, 1) != derive_seed(*a, 2)


def test_a_number_and_its_text_give_different_seeds() -> None:
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed(1, 2) != derive_seed(12)


def test_global_state_restores_all_three_generators() -> None:
    _draw()
    state = GlobalState(CPU)
    first = _draw()
    state.restore()
    assert _draw() == first


def test_global_state_survives_a_checkpoint_to_the_bit(tmp_path: Path) -> None:
    _draw()
    state = GlobalState(CPU)
    first = _draw()
    save_checkpoint(tmp_path / "c.pt", state.state_dict())
    other = GlobalState(CPU)
    other.load_state_dict(load_checkpoint(tmp_path / "c.pt"))
    other.restore()
    assert _draw() == first


def test_a_stream_neither_sees_nor_moves_the_global_numbers() -> None:
    before = GlobalState(CPU)
    undisturbed = [_draw() for _ in range(3)]
    before.restore()
    stream = RandomStream(5, CPU)
    found = []
    for _ in range(3):
        with stream.active():
            inside = _draw()
        assert inside not in undisturbed
        found.append(_draw())
    assert found == undisturbed


def test_a_stream_goes_on_where_it_was_left() -> None:
    whole, pieces = RandomStream(5, CPU), RandomStream(5, CPU)
    with whole.active():
        expected = [_draw() for _ in range(4)]
    found = []
    for _ in range(4):
        torch.manual_seed(0)
        with pieces.active():
            found.append(_draw())
    assert found == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40])
def test_equal_seeds_give_equal_streams_and_others_others(seed: int) -> None:
    def first(seed: int) -> Draws:
        with RandomStream(seed, CPU).active():
            return _draw()

    assert first(seed) == first(seed)
    assert first(seed)[0] != first(seed + 1)[0]


def test_streams_can_be_nested() -> None:
    def inner_of(outer: RandomStream, inner: RandomStream) -> tuple[Draws, Draws, Draws]:
        with outer.active():
            first = _draw()
            with inner.active():
                second = _draw()
            return first, second, _draw()

    first, second, third = inner_of(RandomStream(1, CPU), RandomStream(2, CPU))
    with RandomStream(1, CPU).active():
        assert (first, third) == (_draw(), _draw())
    with RandomStream(2, CPU).active():
        assert second == _draw()


def test_an_error_inside_gives_the_outside_its_numbers_back() -> None:
    before = GlobalState(CPU)
    expected = _draw()
    before.restore()
    stream = RandomStream(5, CPU)
    with pytest.raises(ZeroDivisionError), stream.active():
        1 / (_draw()[0] * 0.0)
    assert _draw() == expected


def test_a_saved_stream_goes_on_to_the_bit(tmp_path: Path) -> None:
    stream, other = RandomStream(5, CPU), RandomStream(6, CPU)
    with stream.active():
        _draw()
    save_checkpoint(tmp_path / "c.pt", stream.state_dict())
    other.load_state_dict(load_checkpoint(tmp_path / "c.pt"))

    def three(draw: Callable[[], Draws], source: RandomStream) -> list[Draws]:
        with source.active():
            return [draw() for _ in range(3)]

    assert three(_draw, other) == three(_draw, stream)
