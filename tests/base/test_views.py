"""Pictures as data: arrays, whatever they are made of, that survive the way through a file."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ift_tune.base.files import parse_json
from ift_tune.base.views import HeatMap, Histogram, ImageGrid, pack, unpack

IMAGES, DECAYS, CLEAN = torch.rand(3, 1, 4, 5) - 0.5, torch.rand(2, 7).double(), torch.rand(5)
VIEWS = (
    ImageGrid("digits", IMAGES, columns=2, captions=("a", "b", "λ"), low=0.0),
    HeatMap("decays", DECAYS, rows="to", columns="from", log=True),
    Histogram("weights", {"clean": CLEAN, "corrupted": torch.zeros(0)}, axis="weight"),
)


def test_views_make_the_round_trip() -> None:
    grid, heat, histogram = unpack(pack(VIEWS))
    assert isinstance(grid, ImageGrid)
    assert isinstance(heat, HeatMap)
    assert isinstance(histogram, Histogram)
    shown = IMAGES.clamp(0.0, 1.0).numpy()
    np.testing.assert_allclose(grid.images, shown, rtol=0, atol=0.5001 / 255)  # 256 shades
    assert (grid.columns, grid.captions, grid.low, grid.high) == (2, ("a", "b", "λ"), 0.0, 1.0)
    np.testing.assert_allclose(heat.values, DECAYS.numpy(), rtol=1e-6, atol=0)
    assert (heat.rows, heat.columns, heat.log) == ("to", "from", True)
    assert list(histogram.values) == ["clean", "corrupted"]
    np.testing.assert_array_equal(histogram.values["clean"], CLEAN.numpy())
    assert histogram.values["corrupted"].size == 0


def test_views_do_not_depend_on_memory_layout() -> None:
    images = torch.rand(1, 4, 5, 3).permute(0, 3, 1, 2)
    (again,) = unpack(pack([ImageGrid("t", images)]))
    assert isinstance(again, ImageGrid)
    np.testing.assert_allclose(again.images, images.numpy(), rtol=0, atol=1.0001 / 255)


def test_views_of_a_kind_that_is_not_known_are_left_out() -> None:
    plain = parse_json(pack(VIEWS))["views"]  # as earlier versions wrote it
    plain[0]["kind"] = "Hologram"
    assert [view.title for view in unpack(json.dumps(plain))] == ["decays", "weights"]


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_numbers_are_copied_into_arrays(kind: Any) -> None:
    given = kind([[1.0, 2.0]])
    heat = HeatMap("t", given)
    (group,) = Histogram("t", {"all": given}).values.values()
    given[0][0] = 7.0  # as an optimiser would
    for found in (heat.values, group):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, [[1.0, 2.0]])


def test_a_tensor_with_a_gradient_is_taken_without_it() -> None:
    weights = torch.ones(1, 2, requires_grad=True)
    np.testing.assert_allclose(HeatMap("t", weights.exp()).values, [[np.e, np.e]], rtol=1e-6)


def test_pixels_that_no_shade_stands_for_are_black_or_at_an_end() -> None:
    images = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).reshape(1, 1, 2, 2)
    (again,) = unpack(pack([ImageGrid("t", images)]))
    assert isinstance(again, ImageGrid)
    np.testing.assert_allclose(again.images.ravel(), [-1.0, 1.0, -1.0, 0.0], atol=0.5001 * 2 / 255)
