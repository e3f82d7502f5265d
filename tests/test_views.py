"""Pictures as data survive the way through a file."""

from __future__ import annotations

import json

import torch

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
    shown = IMAGES.clamp(0.0, 1.0)
    torch.testing.assert_close(grid.images, shown, rtol=0, atol=0.5001 / 255)  # 256 shades
    assert (grid.columns, grid.captions, grid.low, grid.high) == (2, ("a", "b", "λ"), 0.0, 1.0)
    torch.testing.assert_close(heat.values.double(), DECAYS, rtol=1e-6, atol=0)
    assert (heat.rows, heat.columns, heat.log) == ("to", "from", True)
    assert list(histogram.values) == ["clean", "corrupted"]
    assert torch.equal(histogram.values["clean"], CLEAN)
    assert histogram.values["corrupted"].numel() == 0


def test_views_do_not_depend_on_memory_layout() -> None:
    images = torch.rand(1, 4, 5, 3).permute(0, 3, 1, 2)
    (again,) = unpack(pack([ImageGrid("t", images)]))
    assert isinstance(again, ImageGrid)
    torch.testing.assert_close(again.images, images, rtol=0, atol=1.0001 / 255)


def test_views_of_a_kind_that_is_not_known_are_left_out() -> None:
    plain = json.loads(pack(VIEWS))
    plain[0]["kind"] = "Hologram"
    assert [view.title for view in unpack(json.dumps(plain))] == ["decays", "weights"]
